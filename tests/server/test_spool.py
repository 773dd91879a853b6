"""The server keeps one update in memory at a time; the others are on disk."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fedsb.adapters.layout import Layout
from fedsb.protocol.payload import Payload, pack
from fedsb.server.spool import Spool
from fedsb.server.validation import UpdateRules, UpdateSpec, validate_updates

SIZE = 250_000  # values: a megabyte


def test_updates_are_read_as_they_were_added(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    updates = [
        {
            "a.R": torch.from_numpy(draw.normal(size=(2, 3, 3))).float(),
            "b": torch.tensor([[k]]),
            "empty": torch.zeros(0),
        }
        for k in (0.0, 1.0, 2.0, 3.0, 4.0)
    ]
    spool, layout = Spool(tmp_path), Layout.of(updates[0])
    for update in updates:
        spool.add(layout, layout.flatten(update).numpy())
    read = list(spool.read())
    for tensors, update in zip(read, updates, strict=True):
        assert tensors.keys() == update.keys()
        assert all(torch.equal(tensors[key], update[key]) for key in update)
    read[0]["b"] += 1  # a view, which may be written to
    assert not list(tmp_path.iterdir())  # the file has no name, so it cannot remain


def test_an_empty_spool() -> None:
    assert list(Spool().read()) == []


def test_validation_keeps_one_payload_in_memory_at_a_time(tmp_path: Path) -> None:
    """Forty updates of a megabyte take no more memory than ten."""
    layout = Layout((("x", (SIZE,)),))
    expected = UpdateSpec(layout=layout, reference=np.zeros(SIZE, np.float32), model=np.ones(SIZE, np.float32))
    rules = UpdateRules(run="r", round=0, basis="", expected=expected)

    def payloads(count: int) -> Iterator[tuple[str, bytes]]:
        for k in range(count):
            x = np.full(SIZE, k + 1, np.float32)
            name = f"c{k:02d}"  # good updates are returned in the order of names
            payload = Payload(kind="update", run="r", round=0, client=name, samples=1, layout=layout, vector=x)
            yield name, pack(payload)

    peaks = []
    for count in (10, 40):
        tracemalloc.start()
        updates, dropped = validate_updates(payloads(count), rules, Spool(tmp_path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(updates) == count and not dropped
        assert [float(update.tensors["x"][7]) for update in updates] == [k + 1 for k in range(count)]
    assert peaks[1] < peaks[0] + SIZE
