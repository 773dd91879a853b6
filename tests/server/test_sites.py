"""A coordinator checks everything that a site sends before it uses it."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import adapter_bytes, set_all
from fedsb.client.handler import SiteHandler
from fedsb.client.round import ClientView
from fedsb.client.session import StartedClient
from fedsb.config.load import load_config
from fedsb.protocol.messages import Describe, Stale, StartReply, Train, read_reply, read_request
from fedsb.protocol.payload import PayloadError, unpack
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import Silent, federate
from fedsb.utils.errors import RunError, UserError
from laws.test_channels import federation, merged, remote_of
from support.replies import RawMessage, Spoil, nan, spoiled, with_fields, with_parts, with_update
from support.sites import Federation

BAD: dict[str, tuple[Spoil, str]] = {
    "garbage": (lambda _: b"garbage", "Not a message of fedsb"),
    "another verb": (lambda message: replace(message, verb="describe"), "Its reply to 'train' has the verb 'describe'"),
    "no update": (with_parts(), "sent 0 updates"),
    "two updates": (lambda message: replace(message, parts=message.parts * 2), "with 2 payloads"),
    "bytes that are not an update": (with_parts(b"x" * 100), "Not a payload of fedsb"),
    "a loss in words": (with_fields(loss="low"), "The fields of its message 'train' are not valid: loss"),
    "an infinite loss": (with_fields(loss=float("inf")), "The fields of its message 'train' are not valid: loss"),
    "an unknown field": (with_fields(more=1), "are not valid: more"),
    "NaN": (with_update(nan), "NaN"),
    "a wrong shape": (with_update(lambda t: {key: x[..., :1] for key, x in t.items()}), "shape"),
    "a wrong key": (with_update(lambda t: {f"{key}x": x for key, x in t.items()}), "wrong keys"),
    "of another round": (with_update(dict, round=9), "its round is 10"),
    "of another client": (with_update(dict, client="site 1"), "its client is 'site 1'"),
    "of another run": (with_update(dict, run="x"), "its run is 'x'"),
    "a thousand times the norm": (with_update(lambda t: {key: x + 1000 for key, x in t.items()}), "norm"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_drops_its_site_and_no_other(name: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoil, reason = BAD[name]
    spoiled(sites, "site 0", "train", spoil)
    folder = federate(load_config(remote_of(tiny_config, {})), open_federation=sites.open_federation).folder
    for row in read_rows(folder / "rounds.jsonl"):
        assert [drop["client"] for drop in row["dropped"]] == ["site 0"]
        assert reason in row["dropped"][0]["reason"]


@pytest.mark.parametrize(
    ("verb", "spoil"),
    [
        ("describe", with_fields(labels=[{"a": 1}])),
        ("describe", with_fields(rows=-1)),
        ("prepare", with_fields(rows=10**12)),
        ("prepare", with_fields(rows="many")),
        ("start", with_fields(shared=7)),
    ],
)
def test_a_bad_reply_before_the_first_round_ends_the_run(
    verb: str, spoil: Spoil, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", verb, spoil)
    with pytest.raises(RunError, match=rf"site 0: The fields of its message '{verb}' are not valid"):
        federate(load_config(remote_of(tiny_config, {})), open_federation=sites.open_federation)


class Notes(Silent):
    """Collects a run's notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_notes_name_the_site_that_a_round_waits_for(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site 0 is slow in every round, and is asked last, when the others have replied."""
    monkeypatch.setattr("fedsb.server.exchange.NOTE_S", 0.3)
    sites, display = federation(tmp_path), Notes()

    def slowly(message: RawMessage) -> RawMessage:
        time.sleep(1.0)
        return message

    spoiled(sites, "site 0", "train", slowly)
    config = load_config(remote_of(set_all(tiny_config, rounds=2), {}))
    federate(config, display, open_federation=sites.open_federation)
    for round in (1, 2):
        said = [note for note in display.notes if note.startswith(f"Round {round} waits")]
        assert re.fullmatch(rf"Round {round} waits for site 0 \([0-9]+ s\)", said[-1]), display.notes


def test_labels_of_different_types_are_refused(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "describe", with_fields(labels=[0, 1]))
    with pytest.raises(UserError, match=r"of different types \(int: .*; str: .*\): write"):
        federate(load_config(remote_of(tiny_config, {})), open_federation=sites.open_federation)


def test_a_label_of_a_single_site_is_shown(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """A misspelt label widens the head for all clients, and no score shows it."""
    rows = {name: list(rows) for name, rows in federation(tmp_path).rows.items()}
    label = rows["site 1"][0]["label"]
    rows["site 1"][0] = {**rows["site 1"][0], "label": f"{label}s"}
    sites = Federation(tmp_path / "misspelt", rows)
    folder = federate(load_config(remote_of(tiny_config, {})), open_federation=sites.open_federation).folder
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    (shown,) = [row for row in settings if row["key"] == "data.labels"]
    assert f"one site alone has '{label}s' (site 1): meant so, or misspelt?" in shown["reason"]


def test_a_false_ledger_drops_its_site(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    private = {
        "privacy": {"unit": "example", "epsilon": 5.0, "delta": 1e-3},
        "clients": {"holdout_fraction": 0.0},
        "basis": {"share_samples": 0},
    }
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "train", with_fields(entries=[{"run": "x"}]))
    folder = federate(load_config(remote_of(tiny_config, private)), open_federation=sites.open_federation).folder
    for row in read_rows(folder / "rounds.jsonl"):
        assert "the entries of its ledger are not valid" in row["dropped"][0]["reason"]


def test_a_site_that_is_offline_misses_the_round_and_returns(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """FLoRA: it receives the whole residual that it missed, and ends with the model of the others."""
    sites = federation(tmp_path)
    honest, asked = sites.channel.handles["site 0"], []

    def away_once(request: bytes) -> bytes:
        if read_request(request).verb == "train":
            asked.append(request)
            if len(asked) == 2:
                raise RunError("away")
        return honest(request)

    sites.channel.handles["site 0"] = away_once
    config = load_config(merged(remote_of(tiny_config, {"method": {"name": "flora", "rank": 2}}), {"rounds": 4}))
    folder = federate(config, open_federation=sites.open_federation).folder
    dropped = [[drop["client"] for drop in row["dropped"]] for row in read_rows(folder / "rounds.jsonl")]
    assert dropped == [[], ["site 0"], [], []]
    (weights,) = (sites.folder / "site 0").glob("runs/*/adapter/adapter_model.safetensors")
    assert weights.read_bytes() == (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("change", "messages"), [(1e-7, ["sketch"]), (1e-4, ["sketch", "basis"])])
def test_a_site_that_derives_another_basis_receives_the_coordinators(
    change: float, messages: list[str], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """On other hardware the last bits can differ: such a site keeps its own."""
    sites, values = federation(tmp_path), dict[str, int]()
    honest = sites.channel.handles["site 0"]
    assert isinstance(honest, SiteHandler)

    def other_bits(request: bytes) -> bytes:
        reply = honest(request)
        if read_request(request).verb == "start":
            client = honest.client
            assert isinstance(client, StartedClient)
            view = client.store.view(0)
            assert view is not None
            other = {key: x * (1 + change) for key, x in view.shared.items()}
            values.update(
                sketch=sum(min(x.shape) for x in other.values()), basis=sum(x.numel() for x in other.values())
            )
            client.store.save_start(ClientView(other), 0)
            return StartReply(shared=ClientView(other).hash).pack()
        return reply

    sites.channel.handles["site 0"] = other_bits
    folder = federate(load_config(remote_of(tiny_config, {})), open_federation=sites.open_federation).folder
    sent = [row for row in read_rows(folder / "traffic.jsonl") if row["kind"] == "basis"]
    assert [(row["client"], row["direction"], row["round"]) for row in sent] == [("site 0", "down", 0)] * len(messages)
    assert [row["values"] for row in sent] == [values[message] for message in messages]
    assert all(not row["dropped"] for row in read_rows(folder / "rounds.jsonl"))
    assert len(json.loads((folder / "result.json").read_text())["clients"]) == 3


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_update(nan), "NaN or infinite"),
        (with_parts(b"x" * 900), "Not a payload of fedsb"),
    ],
)
def test_a_bad_basis_gradient_ends_the_run(
    spoil: Spoil, said: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "basis_gradient", spoil)
    config = load_config(merged(remote_of(tiny_config, {}), {"basis": {"kind": "core", "samples": 20}}))
    with pytest.raises(RunError, match=f"What site 0 sent for the basis cannot be used: .*{said}"):
        federate(config, open_federation=sites.open_federation)


def test_a_bad_reply_at_the_end_is_harmless(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "finish", with_fields(score="best"))
    folder = federate(load_config(remote_of(tiny_config, {})), open_federation=sites.open_federation).folder
    assert (folder / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("phase", ["advert", "sealed", "held", "masked", "confirm", "shares"])
def test_a_phase_of_a_sum_without_a_message(phase: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """A site whose masked change has arrived is in the sum, whatever it sends after that."""
    sites = federation(tmp_path)
    honest = sites.channel.handles["site 0"]

    def silent(request: bytes) -> bytes:
        asked, reply = read_request(request), honest(request)
        spoils = asked.verb == "train" if phase == "masked" else getattr(asked, "phase", "") == phase
        return replace(RawMessage.read(reply), parts=()).pack() if spoils else reply

    sites.channel.handles["site 0"] = silent
    config = load_config(merged(remote_of(tiny_config, {}), {"server": {"secure_aggregation": True}}))
    reason = "sent 0 updates" if phase == "masked" else "has no keys for this sum: .*A message 'secagg' with 0 payloads"
    for row in read_rows(federate(config, open_federation=sites.open_federation).folder / "rounds.jsonl"):
        dropped = {drop["client"]: drop["reason"] for drop in row["dropped"]}
        assert list(dropped) == ([] if phase in ("confirm", "shares") else ["site 0"])
        assert all(re.match(reason, found) for found in dropped.values())


def test_a_site_that_fails_while_it_catches_up_misses_the_round(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    honest = sites.channel.handles["site 0"]

    def forgetful(request: bytes) -> bytes:
        asked = read_request(request)
        if asked.verb == "set_shared":
            raise RunError("the disk is full")
        if asked.verb == "train" and unpack(asked.payload).round == 1:
            return Stale(shared="something else").pack()
        return honest(request)

    sites.channel.handles["site 0"] = forgetful
    folder = federate(load_config(remote_of(tiny_config, {})), open_federation=sites.open_federation).folder
    rows = read_rows(folder / "rounds.jsonl")
    assert [[drop["reason"] for drop in row["dropped"]] for row in rows] == [
        [],
        ["failed: RunError at the site (the site's log has the reason)"],
        [],
    ]


@pytest.mark.parametrize("server", [{"codec": "int4"}, {"codec": "int4", "clients_per_round": 2}])
def test_a_site_whose_start_differs_receives_the_servers(
    tiny_config: dict[str, Any], tmp_path: Path, server: dict[str, Any]
) -> None:
    """Other hardware may draw a head that differs in its last bits."""

    def run(folder: Path, change: float) -> tuple[Path, dict[str, int]]:
        sites = federation(folder)
        honest = sites.channel.handles["site 0"]

        def other_start(request: bytes) -> bytes:
            asked = read_request(request)
            if asked.verb == "train" and unpack(asked.payload).kind == "start":
                store = honest.client.store  # type: ignore[attr-defined]
                view = store.view(0)
                store.save_start(replace(view, tensors={key: x + change for key, x in view.tensors.items()}), 0)
            return honest(request)

        sites.channel.handles["site 0"] = other_start
        config = set_all(remote_of(tiny_config, {}), server=server, out=str(folder / "runs"))
        found = federate(load_config(config), open_federation=sites.open_federation).folder
        sent = [row for row in read_rows(found / "traffic.jsonl") if row["round"] == 1 and row["direction"] == "down"]
        return found, {row["client"]: row["values"] for row in sent if row["values"]}

    same, nothing = run(tmp_path / "same", 0.0)
    other, values = run(tmp_path / "other", 1e-6)
    assert nothing == {} and values.keys() == {"site 0"}
    assert adapter_bytes(same) == adapter_bytes(other)


def test_only_a_round_has_the_deadline(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """Loading a model may take longer than a round."""
    sites, given = federation(tmp_path), dict[str, float | None]()
    ask = sites.channel.ask

    def noting(requests: Any, timeout_s: float | None = None) -> Any:
        given.update({read_request(request).verb: timeout_s for request in requests.values()})
        return ask(requests, timeout_s)

    sites.channel.ask = noting  # type: ignore[method-assign]
    config = load_config(merged(remote_of(tiny_config, {}), {"engine": {"deadline_s": 5.0}}))
    federate(config, open_federation=sites.open_federation)
    assert given == {"describe": 3600.0, "prepare": 3600.0, "start": 3600.0, "train": 5.0, "finish": 3600.0}


def test_a_reply_is_checked_against_its_request() -> None:
    request, stale = Train(run="x", total_rank=None, state_round=0, parts=(b"",)), Stale(shared="x")
    assert read_reply(stale.pack(), request) == stale
    with pytest.raises(PayloadError, match="A message 'stale' with 1 payloads"):
        read_reply(RawMessage("stale", {"shared": "x"}, (b"",)).pack(), request)
    with pytest.raises(PayloadError, match="Its reply to 'describe' has the verb 'stale'"):
        read_reply(stale.pack(), Describe(run="x", config={}, versions={}))
