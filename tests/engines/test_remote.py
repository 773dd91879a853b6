"""A coordinator believes nothing that a site says before it has looked at it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import set_all
from engines.in_process import Federation
from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.protocol.messages import Note, Trained, pack_note, read_answer, read_note
from fedsb.protocol.payload import PayloadError, pack, unpack
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.server.remote import RemoteEngine
from fedsb.utils.errors import RunError, UserError
from laws.test_engines import federation, merged, remote_of

Spoil = Callable[[Note], Note | bytes]


def spoiled(sites: Federation, name: str, verb: str, spoil: Spoil) -> None:
    """From now on the site spoils its answers to requests of this verb."""
    honest = sites.channel.handles[name]

    def handle(request: bytes) -> bytes:
        answer = honest(request)
        if read_note(request).verb != verb:
            return answer
        made = spoil(read_note(answer))
        return made if isinstance(made, bytes) else pack_note(made)

    sites.channel.handles[name] = handle


def with_facts(**facts: Any) -> Spoil:
    return lambda note: Note(note.verb, {**note.facts, **facts}, note.parts)


def with_update(change: Callable[[dict[str, Any]], dict[str, Any]], **header: Any) -> Spoil:
    def spoil(note: Note) -> Note:
        payload = unpack(note.parts[0])
        return Note(note.verb, note.facts, (pack(replace(payload, tensors=change(payload.tensors), **header)),))

    return spoil


def nan(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: np.full_like(x, np.nan) for key, x in tensors.items()}


BAD: dict[str, tuple[Spoil, str]] = {
    "garbage": (lambda _: b"garbage", "not a message of fedsb"),
    "another verb": (lambda note: Note("look", note.facts, note.parts), "an answer 'look'"),
    "no update": (lambda note: Note(note.verb, note.facts), "sent 0 updates"),
    "two updates": (lambda note: Note(note.verb, note.facts, (*note.parts, *note.parts)), "with 2 envelopes"),
    "bytes that are no update": (lambda note: Note(note.verb, note.facts, (b"x" * 100,)), "not an envelope of fedsb"),
    "a loss in words": (with_facts(loss="low"), "its answer to 'round' is not one: loss"),
    "an endless loss": (with_facts(loss=float("inf")), "its answer to 'round' is not one: loss"),
    "an unknown fact": (with_facts(more=1), "is not one: more"),
    "NaN": (with_update(nan), "NaN"),
    "a wrong shape": (with_update(lambda t: {key: x[..., :1] for key, x in t.items()}), "shape"),
    "a wrong key": (with_update(lambda t: {f"{key}x": x for key, x in t.items()}), "wrong keys"),
    "of another round": (with_update(dict, round=9), "its round is 10"),
    "of another client": (with_update(dict, client="site 1"), "its client is 'site 1'"),
    "of another run": (with_update(dict, run="x"), "its run is 'x'"),
    "a thousand times the norm": (with_update(lambda t: {key: x + 1000 for key, x in t.items()}), "norm"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_drops_its_site_and_no_other(name: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoil, reason = BAD[name]
    spoiled(sites, "site 0", "round", spoil)
    folder = federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine).folder
    for row in read_rows(folder / "rounds.jsonl"):
        assert [drop["client"] for drop in row["dropped"]] == ["site 0"]
        assert reason in row["dropped"][0]["reason"]


@pytest.mark.parametrize(
    ("verb", "spoil"),
    [
        ("look", with_facts(labels=[{"a": 1}])),
        ("look", with_facts(rows=-1)),
        ("open", with_facts(rows=10**12)),
        ("open", with_facts(rows="many")),
        ("start", with_facts(holds=7)),
    ],
)
def test_a_bad_answer_before_the_first_round_ends_the_run(
    verb: str, spoil: Spoil, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", verb, spoil)
    with pytest.raises(RunError, match=rf"site 0: its answer to '{verb}' is not one"):
        federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine)


def test_who_watches_learns_which_site_a_round_waits_for(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site 0 is slow in every round, and is asked last: by then the others have answered."""
    monkeypatch.setattr("fedsb.server.exchange.NOTE_S", 0.3)
    sites, notes = federation(tmp_path), list[str]()

    def slowly(note: Note) -> Note:
        time.sleep(1.0)
        return note

    spoiled(sites, "site 0", "round", slowly)

    def open_engine(config: Config, method: Method, run: str) -> RemoteEngine:
        return RemoteEngine(config, method, run, sites.channel, sites.directory, notes.append)

    federate(load_config(remote_of(set_all(tiny_config, rounds=2), {})), open_engine=open_engine)
    for round in (1, 2):
        said = [note for note in notes if note.startswith(f"Round {round} waits")]
        assert re.fullmatch(rf"Round {round} waits for site 0 \([0-9]+ s\)", said[-1]), notes


def test_labels_of_different_types_are_refused(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "look", with_facts(labels=[0, 1]))
    with pytest.raises(UserError, match=r"of different types \(int: .*; str: .*\): write"):
        federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine)


def test_a_label_that_one_site_alone_has_is_told(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """A misspelt label widens the head for all, and no score tells of it."""
    rows = {name: list(rows) for name, rows in federation(tmp_path).rows.items()}
    label = rows["site 1"][0]["label"]
    rows["site 1"][0] = {**rows["site 1"][0], "label": f"{label}s"}
    sites = Federation(tmp_path / "misspelt", rows)
    folder = federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine).folder
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    (told,) = [row for row in settings if row["key"] == "data.labels"]
    assert f"one site alone has '{label}s' (site 1): meant so, or misspelt?" in told["reason"]


def test_a_false_ledger_drops_its_site(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    private = {
        "privacy": {"unit": "example", "epsilon": 5.0, "delta": 1e-3},
        "clients": {"holdout_fraction": 0.0},
        "basis": {"share_samples": 0},
    }
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "round", with_facts(entries=[{"run": "x"}]))
    folder = federate(load_config(remote_of(tiny_config, private)), open_engine=sites.open_engine).folder
    for row in read_rows(folder / "rounds.jsonl"):
        assert "what it says of its ledger is not of one" in row["dropped"][0]["reason"]


def test_a_site_that_stays_away_misses_the_round_and_comes_back(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """FLoRA: what it missed is told as a whole, and it ends with the model of the others."""
    sites = federation(tmp_path)
    honest, asked = sites.channel.handles["site 0"], []

    def away_once(request: bytes) -> bytes:
        if read_note(request).verb == "round":
            asked.append(request)
            if len(asked) == 2:
                raise RunError("away")
        return honest(request)

    sites.channel.handles["site 0"] = away_once
    config = load_config(merged(remote_of(tiny_config, {"method": {"name": "flora", "rank": 2}}), {"rounds": 4}))
    folder = federate(config, open_engine=sites.open_engine).folder
    dropped = [[drop["client"] for drop in row["dropped"]] for row in read_rows(folder / "rounds.jsonl")]
    assert dropped == [[], ["site 0"], [], []]
    (weights,) = (sites.folder / "site 0").glob("runs/*/adapter/adapter_model.safetensors")
    assert weights.read_bytes() == (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_site_that_derives_another_basis_is_told_the_coordinators(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """As on other hardware, where last bits differ."""
    sites = federation(tmp_path)
    honest = sites.channel.handles["site 0"]
    part = honest.__self__ if hasattr(honest, "__self__") else honest

    def other_bits(request: bytes) -> bytes:
        answer = honest(request)
        if read_note(request).verb == "start":
            held = {key: x * (1 + 1e-7) for key, x in part.part._start.items()}
            return pack_note(Note("start", {"holds": part.part.hold(held)}))
        return answer

    sites.channel.handles["site 0"] = other_bits
    folder = federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine).folder
    told = [row for row in read_rows(folder / "traffic.jsonl") if row["kind"] == "basis"]
    assert [(row["client"], row["direction"], row["round"]) for row in told] == [("site 0", "down", 0)]
    assert all(not row["dropped"] for row in read_rows(folder / "rounds.jsonl"))
    assert len(json.loads((folder / "result.json").read_text())["clients"]) == 3


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_update(nan), "NaN or infinite"),
        (lambda note: Note(note.verb, note.facts, (b"x" * 900,)), "not an envelope of fedsb"),
    ],
)
def test_a_part_of_the_basis_that_is_bad(spoil: Spoil, said: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "sums", spoil)
    config = load_config(merged(remote_of(tiny_config, {}), {"basis": {"kind": "core", "samples": 20}}))
    with pytest.raises(RunError, match=f"what site 0 sent for the basis is of no use: .*{said}"):
        federate(config, open_engine=sites.open_engine)


def test_a_bad_answer_at_the_end_is_no_harm(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "finish", with_facts(score="best"))
    folder = federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine).folder
    assert (folder / "adapter" / "adapter_config.json").exists()


def test_a_sum_without_a_message(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    spoiled(sites, "site 0", "sum", lambda note: Note(note.verb, note.facts))
    config = load_config(merged(remote_of(tiny_config, {}), {"server": {"secure_aggregation": True}}))
    for row in read_rows(federate(config, open_engine=sites.open_engine).folder / "rounds.jsonl"):
        (dropped,) = row["dropped"]
        assert dropped["client"] == "site 0"
        assert "an answer 'sum' with 0 envelopes" in dropped["reason"]


def test_a_site_that_fails_while_it_is_brought_up_misses_the_round(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    honest = sites.channel.handles["site 0"]

    def forgetful(request: bytes) -> bytes:
        note = read_note(request)
        if note.verb == "hold":
            raise RunError("the disk is full")
        if note.verb == "round" and unpack(note.parts[0]).round == 1:
            return pack_note(Note("behind", {"holds": "something else"}))
        return honest(request)

    sites.channel.handles["site 0"] = forgetful
    folder = federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine).folder
    rows = read_rows(folder / "rounds.jsonl")
    assert [[drop["reason"] for drop in row["dropped"]] for row in rows] == [
        [],
        ["failed: RunError at the site (the site's log has the reason)"],
        [],
    ]


def test_only_a_round_has_the_deadline(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """A model takes its time to load: no site is lost for that."""
    sites, given = federation(tmp_path), dict[str, float | None]()
    ask = sites.channel.ask

    def noting(requests: Any, timeout_s: float | None = None) -> Any:
        given.update({read_note(request).verb: timeout_s for request in requests.values()})
        return ask(requests, timeout_s)

    sites.channel.ask = noting  # type: ignore[method-assign]
    config = load_config(merged(remote_of(tiny_config, {}), {"engine": {"deadline_s": 5.0}}))
    federate(config, open_engine=sites.open_engine)
    assert given == {"look": 3600.0, "open": 3600.0, "start": 3600.0, "round": 5.0, "finish": 3600.0}


def test_an_answer_is_of_its_kind() -> None:
    with pytest.raises(PayloadError, match="an answer 'behind' with 1 envelopes"):
        read_answer(pack_note(Note("behind", {"holds": "x"}, (b"",))), Trained)
