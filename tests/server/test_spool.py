"""A server's memory: one envelope at a time, the rest on disk."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fedsb.protocol.payload import Payload, pack
from fedsb.server.spool import Spool
from fedsb.server.validation import UpdateRules, UpdateSpec, validate_updates

SIZE = 250_000  # values: a megabyte


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    updates = [
        {
            "a.R": draw.normal(size=(2, 3, 3)).astype(np.float32),
            "b": np.float32([[k]]),
            "empty": np.zeros(0, np.float32),
        }
        for k in range(5)
    ]
    spool = Spool(tmp_path)
    for update in updates:
        spool.add(update)
    read = list(spool.read())
    for tensors, update in zip(read, updates, strict=True):
        assert tensors.keys() == update.keys()
        assert all(torch.equal(tensors[key], torch.from_numpy(update[key])) for key in update)
    read[0]["b"] += 1  # a view that may be written to
    assert not list(tmp_path.iterdir())  # the file has no name: it cannot be left behind


def test_an_empty_spool() -> None:
    assert list(Spool().read()) == []


def test_the_doorkeeper_holds_one_envelope_at_a_time(tmp_path: Path) -> None:
    """Forty updates of a megabyte take no more memory than ten."""
    wanted = UpdateSpec(shapes={"x": (SIZE,)}, reference={"x": np.zeros(SIZE, np.float32)})
    rules = UpdateRules(run="r", round=0, basis="", wanted=wanted)

    def envelopes(count: int) -> Iterator[tuple[str, bytes]]:
        for k in range(count):
            x = np.full(SIZE, k + 1, np.float32)
            name = f"c{k:02d}"  # good updates come back in the order of names
            yield name, pack(Payload(kind="update", run="r", round=0, client=name, samples=1, tensors={"x": x}))

    peaks = []
    for count in (10, 40):
        tracemalloc.start()
        updates, dropped = validate_updates(envelopes(count), rules, Spool(tmp_path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(updates) == count and not dropped
        assert [float(update.tensors["x"][7]) for update in updates] == [k + 1 for k in range(count)]
    assert peaks[1] < peaks[0] + SIZE
