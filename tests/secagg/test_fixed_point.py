"""Floats in a ring of 32 bits: numbers by hand, the stated bound, no overflow at the worst, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from fedsb.secagg.fixed_point import FixedPoint
from fedsb.utils.errors import UserError
from fedsb.utils.rng import keyed_generator


def test_by_hand() -> None:
    grid = FixedPoint(clients=2, clip=2.0)  # M = 2^30 - 1
    assert grid.largest == 2**30 - 1
    ring = grid.encode(np.array([2, -2, 0, 5], np.float32), 1.0, keyed_generator(0))
    M = 2**30 - 1
    assert ring.dtype == np.uint32
    assert ring.tolist() == [M, 2**32 - M, 0, M, M]  # 5 is clipped; the last is the weight's
    values, weight = grid.decode(ring + ring)
    assert values.tolist() == [4.0, -4.0, 0.0, 4.0]
    assert weight == 2.0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 50, 1000])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_overflow_where_all_are_at_the_clip_bound(n: int, sign: int) -> None:
    grid = FixedPoint(clients=n, clip=0.37)
    x = np.full(3, sign * 0.37, np.float32)
    x[1] *= 1e30
    total = np.zeros(4, np.uint32)
    for k in range(n):
        total += grid.encode(x, 1.0, keyed_generator(k))
    values, weight = grid.decode(total)
    plain = n * sign * np.clip(np.abs(x.astype(np.float64)), 0, 0.37)
    assert np.abs(values - plain).max() <= grid.bound(n)
    assert abs(weight - n) <= grid.bound(n) / grid.clip


@pytest.mark.parametrize("clip", [1e-3, 1.0, 300.0])
def test_the_stated_bound_is_kept_and_not_wide(clip: float) -> None:
    n, size = 5, 20_000
    grid = FixedPoint(clients=n, clip=clip)
    x = keyed_generator("x").uniform(-1.2 * clip, 1.2 * clip, (n, size)).astype(np.float32)
    p = keyed_generator("p").uniform(0.01, 1, n)
    total = np.sum([grid.encode(x[k], p[k], keyed_generator(k)) for k in range(n)], axis=0, dtype=np.uint32)
    values, weight = grid.decode(total)
    errors = np.abs(values - p @ np.clip(x.astype(np.float64), -clip, clip))
    assert 0.4 * grid.bound(n) < errors.max() <= grid.bound(n)
    assert errors.std() < np.sqrt(n) * grid.step / 2
    assert abs(weight - p.sum()) <= grid.bound(n) / clip
    assert grid.bound(n) == pytest.approx(n * n * clip / 2**31, rel=1e-5)


def test_rounding_has_no_bias() -> None:
    grid = FixedPoint(clients=4, clip=1.0)
    x = np.full(100_000, 1000.3 * grid.step, np.float32)
    whole = grid.encode(x, 1.0, keyed_generator("round"))[:-1].astype(np.float64)
    exact = float(x[0]) / grid.step
    assert set(np.unique(whole)) == {np.floor(exact), np.ceil(exact)}
    assert abs(whole.mean() - exact) < 5 * 0.5 / np.sqrt(x.size)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        FixedPoint(clients=2, clip=1.0).encode(np.array([0, bad], np.float32), 1.0, keyed_generator(0))


def test_a_table_is_no_vector() -> None:
    with pytest.raises(ValueError, match="flat"):
        FixedPoint(clients=2, clip=1.0).encode(np.zeros((2, 2), np.float32), 1.0, keyed_generator(0))


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.0000001, np.nan])
def test_a_weight_that_could_overflow_or_says_nothing_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        FixedPoint(clients=2, clip=1.0).encode(np.zeros(2, np.float32), weight, keyed_generator(0))


@pytest.mark.parametrize("clip", [0.0, -1.0, np.inf, np.nan, 5e-324])
def test_a_clip_bound_that_is_no_bound_is_refused(clip: float) -> None:
    with pytest.raises(UserError, match="clip bound"):
        FixedPoint(clients=2, clip=clip)


@pytest.mark.parametrize("clients", [0, 2**31])
def test_a_sum_that_does_not_fit_is_refused(clients: int) -> None:
    with pytest.raises(UserError, match="clients"):
        FixedPoint(clients=clients, clip=1.0)
