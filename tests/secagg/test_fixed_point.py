"""Floats in a ring of up to 32 bits: numbers by hand, the stated bound, no overflow, and what is refused."""

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


# --- narrow rings ---

WIDTHS = range(12, 33)


@pytest.mark.parametrize("bits", range(2, 33))
def test_numbers_travel_packed_in_as_many_bits_as_the_ring_has(bits: int) -> None:
    grid = FixedPoint(clients=1, clip=1.0, bits=bits)
    for size in (1, 2, 3, 5, 7, 8, 9, 31, 64, 1001):
        numbers = keyed_generator("pack", bits, size).integers(0, 2**bits, size, dtype=np.uint32)
        packed = grid.pack(numbers)
        assert len(packed) == grid.packed_bytes(size) == (size * bits + 7) // 8
        back = grid.unpack(packed, size)
        assert back.dtype == np.uint32 and back.flags.c_contiguous
        assert np.array_equal(back, numbers)
    for number in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        assert grid.unpack(grid.pack(np.full(3, number, np.uint32)), 3).tolist() == [number] * 3


def test_packed_bytes_by_hand() -> None:
    grid = FixedPoint(clients=1, clip=1.0, bits=12)
    assert grid.pack(np.array([0xABC, 0x123, 0xF], np.uint32)).hex() == "abc12300f0"
    assert FixedPoint(clients=1, clip=1.0).pack(np.array([0x01020304], np.uint32)).hex() == "04030201"


@pytest.mark.parametrize("bits", [12, 17, 31, 32])
def test_what_is_above_the_ring_is_not_sent(bits: int) -> None:
    """Masks are numbers of 32 bits. In a narrow ring only their lowest bits count."""
    grid = FixedPoint(clients=3, clip=1.0, bits=bits)
    numbers = keyed_generator("above").integers(0, 2**32, 9, dtype=np.uint32)
    sent = grid.unpack(grid.pack(numbers), 9)
    assert np.array_equal(sent, grid.reduce(numbers))
    assert np.array_equal(sent, numbers % np.uint64(2**bits))
    values, weight = grid.decode(numbers)
    assert np.array_equal(values, grid.decode(sent)[0]) and weight == grid.decode(sent)[1]


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_stated_bound_is_kept_in_every_ring(bits: int) -> None:
    n, size, clip = 6, 5000, 0.7
    grid = FixedPoint(clients=n, clip=clip, bits=bits)
    assert grid.largest == (2 ** (bits - 1) - 1) // n and grid.step == clip / grid.largest
    x = keyed_generator("x", bits).uniform(-1.2 * clip, 1.2 * clip, (n, size)).astype(np.float32)
    p = keyed_generator("p", bits).uniform(0.01, 1, n)
    rings = [grid.encode(x[k], p[k], keyed_generator(k)) for k in range(n)]
    assert all(ring.dtype == np.uint32 and int(ring.max()) < 2**bits for ring in rings)
    for stay in (1, 4, n):
        values, weight = grid.decode(np.sum(rings[:stay], axis=0, dtype=np.uint32))
        errors = np.abs(values - p[:stay] @ np.clip(x[:stay].astype(np.float64), -clip, clip))
        assert 0.4 * grid.bound(stay) < errors.max() <= grid.bound(stay)
        assert abs(weight - p[:stay].sum()) <= grid.bound(stay) / clip


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 100, 1000])
def test_no_overflow_in_a_narrow_ring_where_all_are_at_the_clip_bound(bits: int, n: int) -> None:
    grid = FixedPoint(clients=n, clip=0.37, bits=bits)
    x = np.array([0.37, -0.37, 1e30, -1e30], np.float32)
    total = sum((grid.encode(x, 1.0, keyed_generator(k)) for k in range(min(n, 8))), np.zeros(5, np.uint32))
    total += grid.encode(x, 1.0, keyed_generator("rest")) * np.uint32(n - min(n, 8))  # n clients in all
    values, weight = grid.decode(total)
    assert values == pytest.approx(n * 0.37 * np.array([1, -1, 1, -1]), abs=grid.bound(n))
    assert weight == n
    assert n * grid.largest < 2 ** (bits - 1) <= n * (grid.largest + 1)  # and M is as large as it can be


@pytest.mark.parametrize("bits", [2, *WIDTHS])
def test_whole_numbers_are_summed_exactly(bits: int) -> None:
    grid = FixedPoint(clients=1, clip=grid_clip(bits), bits=bits)  # a step of 1
    top = 2 ** (bits - 1)
    values = np.array([0, 1, -1, top - 1, -top], np.int64)
    ring = grid.encode_whole(values)
    assert ring.dtype == np.uint32 and int(ring.max()) < 2**bits
    decoded, weight = grid.decode(ring)
    assert decoded.tolist() == values.tolist() and weight == 1.0


def grid_clip(bits: int) -> float:
    return float(2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_sum_outside_the_ring_wraps(bits: int) -> None:
    grid = FixedPoint(clients=2, clip=float((2 ** (bits - 1) - 1) // 2), bits=bits)  # a step of 1
    top = 2 ** (bits - 1)
    one, other = np.array([top - 1, -top, top - 1, 5], np.int64), np.array([1, -1, top - 1, -7], np.int64)
    values, weight = grid.decode(grid.encode_whole(one) + grid.encode_whole(other))
    assert values.tolist() == [-top, top - 1, -2, -2] and weight == 2.0
    far = grid.decode(grid.encode_whole(np.array([2**40 + 3, -(2**40) - 3], np.int64)))[0]
    assert far.tolist() == [3.0, -3.0]


def test_noise_is_added_after_clipping_and_not_to_the_weight() -> None:
    grid = FixedPoint(clients=2, clip=1.0, bits=16)
    noise = np.array([3, -5, 10], np.int64)
    plain, noisy = (
        grid.encode(np.array([9, -9, 0], np.float32), 1.0, keyed_generator(0), one) for one in (None, noise)
    )
    assert ((noisy - plain) % 2**16).tolist() == [3, 2**16 - 5, 10, 0]


@pytest.mark.parametrize(("bits", "clients"), [(1, 1), (0, 1), (33, 1), (12, 2**11), (2, 2)])
def test_a_ring_that_is_too_narrow_or_too_wide_is_refused(bits: int, clients: int) -> None:
    with pytest.raises(UserError, match=f"impossible in a ring of {bits} bits"):
        FixedPoint(clients=clients, clip=1.0, bits=bits)
