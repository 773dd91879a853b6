"""Law 8: sites that are elsewhere make the same adapter as clients in one process, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import adapter_bytes, labelled_rows, set_all
from fedsb.config.load import load_config
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import read_request
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.record import Record
from fedsb.runs.run import federate, resume
from fedsb.secagg.server import SumServer
from fedsb.utils.errors import RunError
from support.sites import Calls, Federation

METHODS: dict[str, dict[str, Any]] = {
    "fed-sb": {"method": {"name": "fed-sb", "rank": 4}},
    "personal": {"method": {"name": "fed-sb-personal", "rank": 4}, "rounds": 4, "server": {"clients_per_round": 2}},
    "weights": {"method": {"name": "fed-sb", "rank": 4}, "basis": {"kind": "weights"}},
    "core": {"method": {"name": "fed-sb", "rank": 4}, "basis": {"kind": "core", "samples": 20}},
    "ravan": {"method": {"name": "ravan", "rank": 2, "blocks": 2}},
    "fedit": {"method": {"name": "fedit", "rank": 2}},
    "ffa-lora": {"method": {"name": "ffa-lora", "rank": 2}},
    "fedex-lora": {"method": {"name": "fedex-lora", "rank": 2}},
    "flora": {"method": {"name": "flora", "rank": 2}},
    "flora-na": {"method": {"name": "flora-na", "rank": 2}},
    "flexlora": {"method": {"name": "flexlora", "rank": 2}},
    "fedsvd": {"method": {"name": "fedsvd", "rank": 2}},
    "rolora": {"method": {"name": "rolora", "rank": 2}},
    "partial": {"method": {"name": "flora", "rank": 2}, "server": {"clients_per_round": 2}, "rounds": 4},
    "int4": {"method": {"name": "fed-sb", "rank": 4}, "server": {"codec": "int4", "clients_per_round": 2}},
    "part": {"method": {"name": "fed-sb", "rank": 4}, "server": {"codec": "int4", "fraction": 0.3}, "rounds": 4},
    "rolora int8": {"method": {"name": "rolora", "rank": 2}, "server": {"codec": "int8"}},
    "moments": {"method": {"name": "fed-sb", "rank": 4}, "train": {"local_steps": 2, "persist_optimizer_state": True}},
    "ranks": {"method": {"name": "fed-sb", "rank": 4, "tied": True}, "clients": {"total_ranks": {"site 1": 2}}},
    "secure": {"method": {"name": "fed-sb", "rank": 4}, "server": {"secure_aggregation": True}},
}


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        **config,
        **{
            key: {**config.get(key, {}), **value} if isinstance(value, dict) and key != "method" else value
            for key, value in changes.items()
        },
    }


def both(tiny_config: dict[str, Any], changes: dict[str, Any], folder: Path) -> tuple[Path, Path, Federation]:
    """The folders of the same run, in one process and with real sites."""
    config = merged({**tiny_config, "engine": {"clients_per_forward": 1}}, changes)
    here = federate(load_config(set_all(config, name="here"))).folder
    sites = federation(folder)
    remote = load_config(remote_of(tiny_config, changes))
    return here, federate(remote, open_federation=sites.open_federation).folder, sites


def remote_of(tiny_config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return merged(merged(tiny_config, changes), {"name": "remote", "engine": {"name": "flower"}})


def federation(folder: Path) -> Federation:
    """The rows of `tiny_config`, each client's at a site of its own."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in labelled_rows(90, 0):
        rows.setdefault(row["client"], []).append(row)
    return Federation(folder / "sites", rows)


@pytest.mark.parametrize("name", METHODS)
def test_sites_elsewhere_make_the_same_adapter(name: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    here, remote, _ = both(tiny_config, METHODS[name], tmp_path)
    assert adapter_bytes(remote) == adapter_bytes(here)
    losses = [[row["loss"] for row in read_rows(folder / "rounds.jsonl")] for folder in (here, remote)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    counted = [
        sorted(
            (row["round"], row["client"], row["direction"], row["kind"], row["values"], row["bytes"]) for row in rows
        )
        for rows in (read_rows(folder / "traffic.jsonl") for folder in (here, remote))
    ]
    assert counted[0] == counted[1]


def test_every_site_keeps_the_adapter(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    _, remote, sites = both(tiny_config, METHODS["fed-sb"], tmp_path)
    (weights,) = adapter_bytes(remote).values()
    for name in sites.rows:
        (own,) = (sites.folder / name).glob("runs/*/adapter/adapter_model.safetensors")
        assert own.read_bytes() == weights


def test_every_site_keeps_its_own_adapter_where_clients_have_their_own(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """The shared core with its own one; the coordinator has the shared one alone."""
    here, remote, sites = both(tiny_config, METHODS["personal"], tmp_path)
    (shared,) = adapter_bytes(remote).values()
    for name in sites.rows:
        (own,) = (sites.folder / name).glob("runs/*/adapter/adapter_model.safetensors")
        assert own.read_bytes() == (here / "clients" / name / "adapter_model.safetensors").read_bytes() != shared
    assert not (remote / "clients").exists()


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The coordinator is killed while it writes the round behind this one: its checkpoint is not there."""
    checkpoint = Record.checkpoint

    def torn(self: Record, state: Any, keep: int) -> None:
        if state.round > after:
            raise KeyboardInterrupt
        checkpoint(self, state, keep)

    monkeypatch.setattr(Record, "checkpoint", torn)


@pytest.mark.parametrize("name", ["fed-sb", "flora", "partial", "int4", "rolora int8", "moments", "core", "secure"])
def test_a_coordinator_and_sites_that_were_killed_go_on(
    name: str, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, whole, _ = both(tiny_config, METHODS[name], tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_off(patched, after=1)
        config = load_config(merged(remote_of(tiny_config, METHODS[name]), {"name": "cut"}))
        sites = federation(tmp_path / "cut")
        with pytest.raises(KeyboardInterrupt):
            federate(config, open_federation=sites.open_federation)
    sites.kill_all()
    cut = whole.parent / "cut"
    folder = resume(cut, open_federation=sites.taken_up(cut)).folder
    assert adapter_bytes(folder) == adapter_bytes(here)


@pytest.mark.parametrize("name", ["fed-sb", "core", "flora", "rolora int8", "moments"])
def test_sites_killed_between_requests_are_not_noticed(name: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    here, _, _ = both(tiny_config, METHODS[name], tmp_path / "whole")
    sites = federation(tmp_path / "killed")

    def fresh(site: str) -> Callable[[bytes], bytes]:
        return lambda request: sites.restarted(site)(request)

    sites.channel = Calls({site: fresh(site) for site in sites.rows}, sites.folder)
    config = load_config(merged(remote_of(tiny_config, METHODS[name]), {"name": "killed"}))
    assert adapter_bytes(federate(config, open_federation=sites.open_federation).folder) == adapter_bytes(here)


def test_a_sum_that_was_cut_off_is_begun_again(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _, _ = both(tiny_config, METHODS["secure"], tmp_path / "whole")
    sites = federation(tmp_path / "cut")
    config = load_config(merged(remote_of(tiny_config, METHODS["secure"]), {"name": "cut"}))
    with monkeypatch.context() as patched:
        patched.setattr(SumServer, "confirmations", interrupted)
        with pytest.raises(KeyboardInterrupt):
            federate(config, open_federation=sites.open_federation)
    sites.kill_all()
    folder = resume(tmp_path / "runs" / "cut", open_federation=sites.open_federation).folder
    assert adapter_bytes(folder) == adapter_bytes(here)


def interrupted(_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_change_goes_into_one_sum_only(tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """A coordinator that asks for a second sum of the same round, with other survivors, is refused by each site."""
    sites = federation(tmp_path)
    config = load_config(merged(remote_of(tiny_config, METHODS["secure"]), {"rounds": 1}))
    folder = federate(config, open_federation=sites.open_federation).folder
    shutil.rmtree(folder / "checkpoints")
    (folder / "result.json").unlink()
    ask = Calls.ask

    def without_one(self: Calls, requests: Any, timeout_s: float | None = None) -> Any:
        first = sorted(requests)[0]
        for name, answer in ask(self, requests, timeout_s):
            note = read_request(requests[name])
            dropped = note.verb == "train" and name == first
            yield name, NoResponse("late") if dropped else answer

    monkeypatch.setattr(Calls, "ask", without_one)
    with pytest.raises(RunError, match="1: 0 of 3 clients sent 'shares'"):
        resume(folder, open_federation=sites.open_federation)
    assert "a second sum would reveal the difference" in str([answer for _, _, answer in sites.channel.log])


def test_a_run_is_taken_up_without_a_site_that_is_away(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was there at the start need not be there at the resume; back again, it ends with the model of the others."""
    sites = federation(tmp_path)
    config = load_config(merged(remote_of(tiny_config, METHODS["flora"]), {"rounds": 4, "name": "cut"}))
    with monkeypatch.context() as patched:
        cut_off(patched, after=1)
        with pytest.raises(KeyboardInterrupt):
            federate(config, open_federation=sites.open_federation)
    folder = tmp_path / "runs" / "cut"
    sites.kill_all()
    honest, asked = sites.channel.handles["site 0"], []

    def away_at_first(request: bytes) -> bytes:
        asked.append(read_request(request).verb)
        if len(asked) == 1:
            raise RunError("away")
        return honest(request)

    sites.channel.handles["site 0"] = away_at_first
    resume(folder, open_federation=sites.taken_up(folder))
    dropped = [[drop["client"] for drop in row["dropped"]] for row in read_rows(folder / "rounds.jsonl")]
    assert dropped == [[], [], ["site 0"], []]  # the second round's answer was stored, and was sent again
    assert set(asked) == {"train", "finish"}
    (weights,) = (sites.folder / "site 0").glob("runs/*/adapter/adapter_model.safetensors")
    assert weights.read_bytes() == (folder / "adapter" / "adapter_model.safetensors").read_bytes()
