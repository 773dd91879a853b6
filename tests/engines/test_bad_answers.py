"""A site may send anything: it misses the round with a reason, and the others go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.in_process import Calls, Federation
from fedsb.channel import Handle
from fedsb.config import load_config
from fedsb.engines.notes import Note, pack_note, read_note
from fedsb.errors import RunError
from fedsb.federation.payload import pack, unpack
from fedsb.record import read_rows
from fedsb.run import federate
from laws.test_engines import federation, merged, remote_of

Spoil = Callable[[Note], bytes]
PRIVATE = {
    "privacy": {"unit": "example", "epsilon": 5.0, "clip": 1.0, "delta": 1e-3},
    "clients": {"held_out": 0.0},
    "basis": {"share_samples": 0},
}


def spoiling(handle: Handle, verb: str, spoil: Spoil, round: int | None = None) -> Handle:
    """A site whose answers to `verb` are spoiled, in that round alone where one is said."""

    def spoiled(request: bytes) -> bytes:
        asked, answer = read_note(request), handle(request)
        there = asked.verb == verb and (round is None or unpack(asked.parts[0]).round + 1 == round)
        return spoil(read_note(answer)) if there else answer

    return spoiled


def facts(**changes: Any) -> Spoil:
    return lambda note: pack_note(replace(note, facts={**note.facts, **changes}))


def run(tiny_config: dict[str, Any], sites: Federation, verb: str, spoil: Spoil, *, changes: dict[str, Any]) -> Path:
    handles = dict(sites.channel.handles)
    handles["site 1"] = spoiling(handles["site 1"], verb, spoil, 2 if verb == "round" else None)
    sites.channel = Calls(handles)
    return federate(load_config(merged(remote_of(tiny_config, {}), changes)), open_engine=sites.open_engine).folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda note: b"\x00" * 40, "not a message of fedsb"),
        (lambda note: pack_note(replace(note, parts=(b"\x01" * 900,))), "not an envelope of fedsb"),
        (lambda note: pack_note(replace(note, parts=())), "its answer has no update"),
        (lambda note: pack_note(replace(note, parts=note.parts * 2)), "2 envelopes, wanted 1"),
        (lambda note: pack_note(replace(note, verb="finish")), "an answer to 'finish', and 'round' was asked"),
        (facts(loss="low"), "says loss = 'low', which cannot be"),
        (facts(loss=float("nan")), "says loss = nan, which cannot be"),
        (facts(entries=None), "says entries = None, which cannot be"),
    ],
)
def test_a_bad_answer_costs_its_site_the_round(
    spoil: Spoil, said: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    rows = read_rows(run(tiny_config, federation(tmp_path), "round", spoil, changes={}) / "rounds.jsonl")
    assert [len(row["dropped"]) for row in rows] == [0, 1, 0]
    assert rows[1]["dropped"][0]["client"] == "site 1" and said in rows[1]["dropped"][0]["reason"]


@pytest.mark.parametrize("entries", [["x"], [{"run": "x"}], [{"q": 0.0}]])
def test_a_ledger_that_cannot_be(entries: list[Any], tiny_config: dict[str, Any], tmp_path: Path) -> None:
    folder = run(tiny_config, federation(tmp_path), "round", facts(entries=entries), changes=PRIVATE)
    rows = read_rows(folder / "rounds.jsonl")
    assert [len(row["dropped"]) for row in rows] == [0, 1, 0]
    assert "what it says of its ledger cannot be" in rows[1]["dropped"][0]["reason"]


@pytest.mark.parametrize(
    ("verb", "spoil", "said"),
    [
        ("look", facts(labels="red"), "site 1: its answer to 'look' says labels = 'red'"),
        ("look", facts(labels=[["red"]]), "labels are of different types|labels are no labels"),
        ("look", facts(labels=[["red"]] * 3), "labels are of different types|labels are no labels"),
        ("open", facts(rows=-1), "site 1: its answer to 'open' says rows = -1"),
        ("start", facts(holds=3), "site 1: its answer to 'start' says holds = 3"),
    ],
)
def test_a_bad_answer_in_the_opening_ends_the_run_with_its_name(
    verb: str, spoil: Spoil, said: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError if verb == "look" and "types" in said else RunError, match=said):
        run(tiny_config, federation(tmp_path), verb, spoil, changes={})


def not_a_number(note: Note) -> bytes:
    told = unpack(note.parts[0])
    tensors = {key: np.full_like(x, np.nan) for key, x in told.tensors.items()}
    return pack_note(replace(note, parts=(pack(replace(told, tensors=tensors)),)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (not_a_number, "NaN or infinite"),
        (lambda note: pack_note(replace(note, parts=(b"\x01" * 900,))), "not an envelope of fedsb"),
    ],
)
def test_a_part_of_the_basis_that_is_bad(spoil: Spoil, said: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"what site 1 sent for the basis cannot be used.*{said}"):
        run(tiny_config, federation(tmp_path), "sums", spoil, changes={"basis": {"kind": "core", "samples": 20}})


def test_a_bad_answer_at_the_end_is_no_harm(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    folder = run(tiny_config, federation(tmp_path), "finish", facts(score="best"), changes={})
    assert (folder / "adapter" / "adapter_config.json").exists()


def test_a_sum_without_a_message(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    def nothing(note: Note) -> bytes:
        return pack_note(replace(note, parts=()))

    folder = run(tiny_config, federation(tmp_path), "sum", nothing, changes={"server": {"secure_sum": True}})
    for row in read_rows(folder / "rounds.jsonl"):
        (dropped,) = row["dropped"]
        assert dropped["client"] == "site 1" and "has 0 envelopes, wanted 1" in dropped["reason"]


def test_a_site_that_fails_while_it_is_brought_up_misses_the_round(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    lost = sites.channel.handles["site 1"]

    def forgetful(request: bytes) -> bytes:
        note = read_note(request)
        if note.verb == "hold":
            raise RunError("the disk is full")
        if note.verb == "round" and unpack(note.parts[0]).round == 1:
            return pack_note(Note("behind", {"holds": "something else"}))
        return lost(request)

    sites.channel = Calls({**sites.channel.handles, "site 1": forgetful})
    folder = federate(load_config(remote_of(tiny_config, {})), open_engine=sites.open_engine).folder
    rows = read_rows(folder / "rounds.jsonl")
    assert [[drop["reason"] for drop in row["dropped"]] for row in rows] == [[], ["the disk is full"], []]


def test_only_a_round_has_the_deadline(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """A model takes its time to load: no site is lost for that."""
    sites, given = federation(tmp_path), dict[str, float | None]()
    ask = sites.channel.ask

    def noting(requests: Any, timeout_s: float | None = None) -> Any:
        given.update({read_note(request).verb: timeout_s for request in requests.values()})
        return ask(requests, timeout_s)

    sites.channel.ask = noting  # type: ignore[method-assign]
    federate(
        load_config(merged(remote_of(tiny_config, {}), {"engine": {"deadline_s": 5}})), open_engine=sites.open_engine
    )
    assert given == {"look": 3600.0, "open": 3600.0, "start": 3600.0, "round": 5.0, "finish": 3600.0}
