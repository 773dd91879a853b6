"""Shared noise at real sites: the model of one process, kills at every step, and sites that leave.

A ledger may have a line too many, for a site that was killed after it was charged. It never has one too few.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import adapter_bytes
from fedsb.client.store import DiskStore
from fedsb.config.load import load_config
from fedsb.privacy.ledger import Ledger, read_ledger
from fedsb.protocol.messages import NoKeys, TrainReply, read_reply, read_request
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate, resume
from fedsb.utils.errors import RunError, UserError
from laws.test_channels import both, cut_off, federation, merged, remote_of
from support.kills import Killed, Mortal, cut_after, offline, seed_noise, step_of
from support.sites import Federation

ROUNDS = 3
SITES = ("site 0", "site 1", "site 2")
SHARED: dict[str, Any] = {
    "rounds": ROUNDS,
    "privacy": {"unit": "example", "noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-3},
    "server": {"secure_aggregation": True, "min_clients": 2},
    "train": {"local_steps": 1},
    "basis": {"share_samples": 0},
    "clients": {"holdout_fraction": 0.0},
    "eval": {"every": ROUNDS},
}
DONE = {name: [1, 2, 3] for name in SITES}  # a line per round, in every ledger
ALL = {"server": {"secure_aggregation": True, "min_clients": 3}}
WHOLE: dict[str, dict[str, bytes]] = {}  # adapters, by the changes of their runs


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_noise(monkeypatch)


def run(tiny_config: dict[str, Any], sites: Federation, name: str = "run", **changes: Any) -> Path:
    config = merged(merged(remote_of(tiny_config, SHARED), changes), {"name": name})
    return federate(load_config(config), open_federation=sites.open_federation).folder


def charged(sites: Federation) -> dict[str, list[int]]:
    """The rounds in the ledgers of all sites; none has lines of two steps."""
    found = {}
    for name in sites.rows:
        (path,) = (sites.folder / name).glob("runs/*/privacy/*.jsonl")
        entries = read_ledger(path)
        assert {entry.count for entry in entries} <= {1}
        found[name] = [entry.round for entry in entries]
    return found


def dropped(folder: Path) -> list[list[str]]:
    return [[drop["client"] for drop in row["dropped"]] for row in read_rows(folder / "rounds.jsonl")]


@pytest.fixture
def whole(tiny_config: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """The adapter of an uninterrupted run, which is made once."""

    def make(**changes: Any) -> dict[str, bytes]:
        if (key := str(changes)) not in WHOLE:
            WHOLE[key] = adapter_bytes(run(tiny_config, federation(tmp_path / "whole"), "whole", **changes))
        return WHOLE[key]

    return make


# --- the model ---


@pytest.mark.parametrize(
    ("method", "scaled"), [("fed-sb", False), ("fed-sb", True), ("ravan", False), ("rolora", True), ("fedsvd", False)]
)
def test_sites_elsewhere_make_the_same_adapter(
    method: str, scaled: bool, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    privacy = {**SHARED["privacy"], "scale_then_privatize": scaled}
    changes = {"method": {"name": method, "rank": 2}, "privacy": privacy}
    here, remote, sites = both(tiny_config, SHARED | changes, tmp_path)
    assert adapter_bytes(remote) == adapter_bytes(here)
    assert charged(sites) == DONE
    for name in SITES:
        (own,) = (sites.folder / name).glob("runs/*/privacy/*.jsonl")
        assert read_ledger(remote / "privacy" / own.name) == read_ledger(own)
        assert [e.release for e in read_ledger(here / "privacy" / own.name)] == [e.release for e in read_ledger(own)]
        (adapter,) = (sites.folder / name).glob("runs/*/adapter/adapter_model.safetensors")
        assert adapter.read_bytes() == (remote / "adapter" / "adapter_model.safetensors").read_bytes()
    for one, other in zip(read_rows(here / "rounds.jsonl"), read_rows(remote / "rounds.jsonl"), strict=True):
        assert one["epsilon"] == other["epsilon"] and one["loss"] is other["loss"] is None


def test_other_noise_makes_another_adapter(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _, _ = both(tiny_config, SHARED, tmp_path)
    monkeypatch.setattr("support.kills.RoundNoise.begin", lambda self, round: None)
    assert adapter_bytes(run(tiny_config, federation(tmp_path / "other"))) != adapter_bytes(here)


def test_a_sum_that_is_impossible_charges_nobody(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    with pytest.raises(UserError, match="A share of the noise would be"):
        run(tiny_config, sites, privacy={"noise_multiplier": 1e-3})
    assert charged(sites) == {name: [] for name in SITES}


# --- a site is killed ---

KILLS = {  # (step, moment): the rounds that site 1 is charged for, and those that it is dropped from
    (("advert", 1), "before"): ([2, 3], [1]),
    (("advert", 1), "idle"): ([2, 3], [1]),
    (("sealed", 1), "after"): ([2, 3], [1]),
    (("held", 1), "idle"): ([2, 3], [1]),
    (("train", 2), "before"): ([1, 3], [2]),
    (("train", 2), "after"): ([1, 2, 3], [2]),
    (("train", 2), "idle"): ([1, 2, 3], []),
    (("shares", 2), "before"): ([1, 2, 3], []),
    (("shares", 2), "after"): ([1, 2, 3], []),
    (("shares", 2), "idle"): ([1, 2], [3]),
}


OFTEN = ("train", "shares")  # the kills in every test run; those of an agreement in `make test-long`


@pytest.mark.parametrize(
    ("step", "moment"),
    [pytest.param(*kill, marks=[] if kill[0][0] in OFTEN else pytest.mark.long) for kill in KILLS],
)
def test_a_run_goes_on_without_a_killed_site_and_the_site_returns(
    step: tuple[str, int], moment: str, tiny_config: dict[str, Any], tmp_path: Path, whole: Any
) -> None:
    sites = federation(tmp_path)
    Mortal(sites, "site 1", step, moment)
    folder = run(tiny_config, sites)
    lines, missed = KILLS[step, moment]
    assert charged(sites) == DONE | {"site 1": lines}
    assert dropped(folder) == [["site 1"] if round in missed else [] for round in (1, 2, 3)]
    if not missed:
        assert adapter_bytes(folder) == whole()


@pytest.mark.parametrize("method", ["fedit", "fedsvd", "rolora"])
def test_a_site_that_missed_a_round_is_in_the_next_sum(
    method: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """Also if the others do not receive what it has missed."""
    sites = federation(tmp_path)
    Mortal(sites, "site 1", ("train", 2), "before")
    folder = run(tiny_config, sites, method={"name": method, "rank": 2})
    assert dropped(folder) == [[], ["site 1"], []]
    (adapter,) = (sites.folder / "site 1").glob("runs/*/adapter/adapter_model.safetensors")
    assert adapter.read_bytes() == (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def die_once(monkeypatch: pytest.MonkeyPatch, where: str) -> list[str]:
    """Site 1 is killed in its second round, at this point of it."""
    deaths: list[str] = []
    charge, save = Ledger.charge, DiskStore.save_round

    def dies(path: Path, round: int) -> bool:
        due = "site 1" in str(path) and "sites" in str(path) and round == 2 and not deaths
        deaths.extend(["site 1"] if due else [])
        return due

    def charging(self: Ledger, release: Any, *, round: int, clip: float) -> None:
        if where == "before the charge" and dies(self.path, round):
            raise Killed
        charge(self, release, round=round, clip=clip)
        if where == "after the charge" and dies(self.path, round):
            raise Killed

    def saving(self: DiskStore, shared: Any, *rest: Any) -> None:
        if where == "before the answer is stored" and dies(self.folder, shared.round + 1):
            raise Killed
        save(self, shared, *rest)
        if where == "after the answer is stored" and dies(self.folder, shared.round + 1):
            raise Killed

    monkeypatch.setattr(Ledger, "charge", charging)
    monkeypatch.setattr(DiskStore, "save_round", saving)
    return deaths


POINTS = {  # the rounds that the site is charged for, if the round is repeated and if it is not
    "before the charge": ([1, 2, 3], [1, 3]),
    "after the charge": ([1, 2, 2], [1, 2, 3]),
    "before the answer is stored": ([1, 2, 2], [1, 2, 3]),
    "after the answer is stored": ([1, 2, 3], [1, 2, 3]),
}


@pytest.mark.parametrize("where", POINTS)
def test_a_site_that_is_killed_while_it_trains(
    where: str, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = federation(tmp_path)
    Mortal(sites, "site 1", ("", 0), "")
    assert die_once(monkeypatch, where) == []
    folder = run(tiny_config, sites)
    assert dropped(folder) == [[], ["site 1"], []]
    assert charged(sites) == DONE | {"site 1": POINTS[where][1]}


@pytest.mark.parametrize("where", POINTS)
def test_a_repeated_round_is_charged_once_more_only_if_its_answer_was_not_stored(
    where: str, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """All three sites are needed: the run ends, and is resumed."""
    sites = federation(tmp_path)
    Mortal(sites, "site 1", ("", 0), "")
    die_once(monkeypatch, where)
    with pytest.raises(RunError, match=r"2 of 3 clients sent 'masked'(.|\n)*site 1: failed"):
        run(tiny_config, sites, **ALL)
    folder = tmp_path / "runs" / "run"
    lines = POINTS[where][0]
    if lines == [1, 2, 3]:
        assert adapter_bytes(resume(folder, open_federation=sites.taken_up(folder)).folder) == whole(**ALL)
    else:
        with pytest.raises(RunError, match=r"round 3 would raise epsilon to .* are charged again"):
            resume(folder, open_federation=sites.taken_up(folder))
        assert [row["round"] for row in read_rows(folder / "rounds.jsonl")] == [1, 2]
    assert charged(sites) == DONE | {"site 1": lines}


@pytest.mark.parametrize("step", [("advert", 1), ("sealed", 1), ("held", 1), ("train", 2), ("shares", 2)])
def test_a_round_is_repeated_with_new_keys_if_a_site_that_is_needed_was_restarted(
    step: tuple[str, int], tiny_config: dict[str, Any], tmp_path: Path, whole: Any
) -> None:
    """Keys are in memory only. What the site has trained is stored, so nothing is charged again."""
    sites = federation(tmp_path)
    Mortal(sites, "site 1", step, "idle")
    folder = run(tiny_config, sites, **ALL)
    assert adapter_bytes(folder) == whole(**ALL)
    assert charged(sites) == DONE
    assert dropped(folder) == [[], [], []]
    assert [row["cohort"] for row in read_rows(folder / "rounds.jsonl")] == [list(SITES)] * 3


def test_the_noise_of_a_client_is_charged_once_if_its_round_is_repeated(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites = federation(tmp_path)
    Mortal(sites, "site 1", ("train", 2), "idle")
    folder = run(tiny_config, sites, **merged(ALL, {"privacy": {"unit": "client"}, "server": {"weighting": "uniform"}}))
    assert charged(sites) == DONE
    (ledger,) = (folder / "privacy").glob("*.jsonl")
    assert [entry.round for entry in read_ledger(ledger)] == [1, 2, 3]


def test_a_reply_has_the_entries_of_the_ledger_that_the_coordinator_lacks(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites, sent = federation(tmp_path), dict[str, list[int]]()
    Mortal(sites, "site 1", ("train", 2), "after")  # this reply does not arrive

    def counted(name: str, handle: Any, data: bytes) -> bytes:
        answer = bytes(handle(data))
        reply = read_reply(answer, read_request(data))
        if isinstance(reply, TrainReply):
            sent.setdefault(name, []).append(len(reply.entries))
        return answer

    for name, handle in sites.channel.handles.items():
        sites.channel.handles[name] = partial(counted, name, handle)
    folder = run(tiny_config, sites)
    assert sent == {"site 0": [1, 1, 1], "site 1": [1, 2], "site 2": [1, 1, 1]}
    for name in SITES:
        (own,) = (sites.folder / name).glob("runs/*/privacy/*.jsonl")
        assert read_ledger(folder / "privacy" / own.name) == read_ledger(own)


def test_a_site_whose_ledger_is_an_older_copy_does_not_shorten_that_of_the_coordinator(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites = federation(tmp_path)

    class Restored(Mortal):
        def restart(self) -> None:
            super().restart()
            (ledger,) = (self.sites.folder / self.name).glob("runs/*/privacy/*.jsonl")
            ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))

    Restored(sites, "site 1", ("shares", 2), "after")
    sent, mortal = list[list[int]](), sites.channel.handles["site 1"]

    def watched(data: bytes) -> bytes:
        answer = mortal(data)
        if isinstance(reply := read_reply(answer, read_request(data)), TrainReply):
            sent.append([entry["round"] for entry in reply.entries])
        return answer

    sites.channel.handles["site 1"] = watched
    folder = run(tiny_config, sites)
    assert charged(sites) == DONE | {"site 1": [1, 3]}
    assert sent == [[1], [2], [3]]
    assert [entry.round for entry in read_ledger(folder / "privacy" / "site 1.jsonl")] == [1, 2, 3]


def test_a_site_that_never_has_keys_ends_the_run(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites, asked = federation(tmp_path), list[int]()
    honest = sites.channel.handles["site 1"]

    def forgetful(data: bytes) -> bytes:
        step = step_of(read_request(data))
        asked.extend([step[1]] if step[0] == "train" else [])
        return NoKeys().pack() if step == ("train", 2) else honest(data)

    sites.channel.handles["site 1"] = forgetful
    with pytest.raises(RunError, match=r"2 of 3 clients sent 'masked'(.|\n)*site 1: it was restarted since the keys"):
        run(tiny_config, sites, **ALL)
    assert asked == [1, 2, 2, 2]
    assert charged(sites) == {"site 0": [1, 2], "site 1": [1], "site 2": [1, 2]}


# --- the coordinator is killed ---

PHASES = ("advert", "sealed", "held", "train", "shares", "train", "shares")  # of the first two rounds


SOME = (8, 10, 12, 14)  # in every test run; the others in `make test-long`


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(n, marks=[] if n in SOME else pytest.mark.long)
        for n in (1, 3, 5, 6, 8, 9, 10, 12, 14, 15, 17, 18, 20, 21)
    ],
)
def test_a_coordinator_that_was_killed_goes_on(
    answers: int, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """In the middle of a phase the sites keep running; after it they are restarted too."""
    sites = federation(tmp_path)
    with monkeypatch.context() as patched:
        seen = cut_after(patched, answers)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_config, sites)
    assert len(seen) == answers and seen[-1][0] == PHASES[(answers - 1) // 3]
    if answers % 3 == 0:
        sites.kill_all()
    folder = tmp_path / "runs" / "run"
    assert adapter_bytes(resume(folder, open_federation=sites.taken_up(folder)).folder) == whole()
    assert charged(sites) == DONE
    assert dropped(folder) == [[], [], []]


def test_a_sum_that_was_unmasked_is_not_made_without_one_of_its_sites(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """Two sites have given their shares when the coordinator is killed. The round waits for the third one."""
    sites, back = federation(tmp_path), list[bool]()
    with monkeypatch.context() as patched:
        cut_after(patched, 14)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_config, sites)
    folder = tmp_path / "runs" / "run"
    offline(sites, "site 0", lambda _: not back)
    with pytest.raises(RunError, match=r"0 of 2 clients sent 'shares'(.|\n)*a second sum would reveal the difference"):
        resume(folder, open_federation=sites.taken_up(folder))
    back.append(True)
    assert adapter_bytes(resume(folder, open_federation=sites.taken_up(folder)).folder) == whole()
    assert charged(sites) == DONE


def test_a_checkpoint_that_was_not_written_costs_no_line(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """The newest checkpoint is lost too: the site has the answers of two rounds."""
    sites = federation(tmp_path)
    with monkeypatch.context() as patched:
        cut_off(patched, after=1)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_config, sites)
    folder = tmp_path / "runs" / "run"
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])
    assert adapter_bytes(resume(folder, open_federation=sites.taken_up(folder)).folder) == whole()
    assert charged(sites) == DONE


# --- a site leaves ---


@pytest.mark.parametrize(
    ("first", "own"),
    [
        (("train", 2), [1]),  # before it is asked for the second round
        (("shares", 2), [1, 2]),  # in the middle of it: its masked share has arrived
        (("train", 1), []),
        (("advert", 1), []),
    ],
)
def test_a_run_goes_on_without_a_site_that_left(
    first: tuple[str, int], own: list[int], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites, left = federation(tmp_path), []

    def away(step: tuple[str, int]) -> bool:
        left.extend([step] if step == first else [])
        return bool(left)

    offline(sites, "site 1", away)
    folder = run(tiny_config, sites)
    assert charged(sites) == DONE | {"site 1": own}
    assert dropped(folder) == [[] if round in own else ["site 1"] for round in (1, 2, 3)]
    for name in ("site 0", "site 2"):
        (path,) = (sites.folder / name).glob("runs/*/privacy/*.jsonl")
        assert read_ledger(folder / "privacy" / path.name) == read_ledger(path)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (("train", 2), "1 of 3 clients sent 'masked'; the threshold is 2"),
        (("shares", 2), "1 of 3 clients sent 'shares'; the threshold is 2"),
    ],
)
def test_below_the_threshold_a_run_ends_and_is_resumed_with_the_site(
    first: tuple[str, int], said: str, tiny_config: dict[str, Any], tmp_path: Path, whole: Any
) -> None:
    sites, left, back = federation(tmp_path), list[tuple[str, int]](), list[bool]()

    def away(step: tuple[str, int]) -> bool:
        left.extend([step] if step == first else [])
        return bool(left) and not back

    for name in ("site 0", "site 1"):
        offline(sites, name, away)
    with pytest.raises(RunError, match=said):
        run(tiny_config, sites)
    folder = tmp_path / "runs" / "run"
    assert [row["round"] for row in read_rows(folder / "rounds.jsonl")] == [1]
    with pytest.raises(RunError, match="1 of 3 clients sent 'advert'; the threshold is 2"):
        resume(folder, open_federation=sites.taken_up(folder))  # too early
    back.append(True)
    assert adapter_bytes(resume(folder, open_federation=sites.taken_up(folder)).folder) == whole()
    assert charged(sites) == DONE
