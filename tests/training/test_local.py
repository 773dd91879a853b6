"""Which rows a client trains on, for how many steps, at what rate: tables that can be checked by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest

from fedsb.training.local import LocalTraining, draw_batches


def batches(local: LocalTraining, rows: int, *, seed: int = 0, client: str = "a", round: int = 0) -> list[list[int]]:
    return list(draw_batches(local, rows=rows, seed=seed, client=client, round=round))


def test_draws_are_keyed() -> None:
    local = LocalTraining(steps=4, batch_size=5)
    first = batches(local, 23)
    assert batches(local, 23) == first
    for other in (batches(local, 23, client="b"), batches(local, 23, round=1), batches(local, 23, seed=1)):
        assert other != first


@pytest.mark.parametrize(
    ("epochs", "batch_size", "accumulate", "rows", "sizes"),
    [
        (1, 4, 1, 10, [4, 4, 2]),
        (2, 4, 1, 10, [4, 4, 2, 4, 4, 2]),  # each pass ends short
        (1, 4, 2, 10, [8, 2]),
        (1, 4, 1, 8, [4, 4]),
        (3, 4, 1, 2, [2, 2, 2]),  # fewer rows than a batch
        (1, 4, 1, 1, [1]),
    ],
)
def test_epochs_cover_every_row_once_a_pass(
    epochs: int, batch_size: int, accumulate: int, rows: int, sizes: list[int]
) -> None:
    local = LocalTraining(steps=None, epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    drawn = batches(local, rows)
    assert [len(batch) for batch in drawn] == sizes
    assert len(drawn) == local.steps_for(rows)
    assert Counter(row for batch in drawn for row in batch) == dict.fromkeys(range(rows), epochs)
    first_pass = [row for batch in drawn[: len(drawn) // epochs] for row in batch]
    assert sorted(first_pass) == list(range(rows))


@pytest.mark.parametrize(
    ("steps", "batch_size", "rows", "sizes"),
    [
        (3, 4, 10, [4, 4, 4]),  # over the end of a pass, all full
        (5, 4, 8, [4] * 5),
        (3, 8, 5, [5, 5, 5]),  # fewer rows than a step takes: all of them
        (2, 4, 1, [1, 1]),
    ],
)
def test_steps_are_full_and_even(steps: int, batch_size: int, rows: int, sizes: list[int]) -> None:
    """No row is drawn twice more often than another."""
    local = LocalTraining(steps=steps, batch_size=batch_size)
    drawn = batches(local, rows)
    assert [len(batch) for batch in drawn] == sizes
    assert len(drawn) == local.steps_for(rows) == steps
    counts = Counter(row for batch in drawn for row in batch)
    assert max(counts.values()) - min(counts.get(row, 0) for row in range(rows)) <= 1
    assert set(counts) <= set(range(rows))


def test_small_clients_see_each_row_once_a_step() -> None:
    assert all(sorted(batch) == [0, 1, 2] for batch in batches(LocalTraining(steps=4, batch_size=8), 3))


def factors(local: LocalTraining, steps: int) -> list[float]:
    """All rounds, end to end."""
    return [local.lr_factor(round, step, steps) for round in range(local.rounds) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "rounds", "steps", "expected"),
    [
        ("constant", 0.0, 2, 2, [1, 1, 1, 1]),
        ("linear", 0.0, 2, 2, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.0, 1, 4, [1, 0.75, 0.5, 0.25]),  # rounds do not matter, only the steps of them all
        ("linear", 0.0, 4, 1, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, 2, 2, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
        ("constant", 0.5, 2, 2, [0.5, 1, 1, 1]),
        ("linear", 0.5, 2, 4, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0.5, 2, 2, [0.5, 1, 1, 0.5]),
        ("linear", 0.2, 5, 2, [0.5, 1, *(1 - i / 8 for i in range(8))]),
        ("constant", 0.5, 1, 5, [0.4, 0.8, 1, 1, 1]),  # 2.5 steps of warm-up: never above 1
        ("constant", 0.9, 1, 2, [1 / 1.8, 1]),
        ("linear", 0.1, 1, 1, [1]),
    ],
)
def test_schedule(schedule: str, warmup: float, rounds: int, steps: int, expected: list[float]) -> None:
    local = LocalTraining(schedule=schedule, warmup=warmup, rounds=rounds)  # type: ignore[arg-type]
    assert factors(local, steps) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 0.37, 0.9, 0.99])
@pytest.mark.parametrize(("rounds", "steps"), [(1, 1), (1, 7), (8, 3), (16, 10), (50, 1)])
def test_schedules_stay_in_0_to_1_and_have_no_jumps(schedule: str, warmup: float, rounds: int, steps: int) -> None:
    """Up while it warms up, then never up again; a step falls by at most pi/2 times what a straight line would."""
    local = LocalTraining(schedule=schedule, warmup=warmup, rounds=rounds)  # type: ignore[arg-type]
    values = factors(local, steps)
    total = rounds * steps
    assert all(0 < value <= 1 for value in values)
    rising = math.ceil(warmup * total)
    assert values[:rising] == sorted(values[:rising])
    assert values[rising:] == sorted(values[rising:], reverse=True)
    down = math.pi / 2 / max(total * (1 - warmup), 1) + 1e-9
    assert all(before - after <= down for before, after in pairwise(values))
    if warmup == 0:
        assert values[0] == 1
