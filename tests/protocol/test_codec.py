"""Codecs: numbers by hand, errors within their bounds, no bias, the stated bytes, and nothing that crashes."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import scipy.linalg

from fedsb.config.training import Codec
from fedsb.protocol.codec import BLOCK, CODECS, Q_MAX, decode, encode, payload_bytes
from fedsb.protocol.rotated import CHUNK, LEVELS
from fedsb.utils.rng import keyed_generator

ROUNDED: tuple[Codec, ...] = ("int8", "int4")
ROTATED: tuple[Codec, ...] = ("int3", "int2")
LARGEST = float(np.finfo(np.float32).max)


def through(x: np.ndarray, codec: Codec, key: int = 0) -> np.ndarray:
    return decode(encode(x.astype(np.float32), codec, keyed_generator(key, "codec")), codec, x.size)


def steps(x: np.ndarray, codec: Codec) -> np.ndarray:
    """An upper bound of each value's step: max |block| / q_max, rounded up by at most 2^-7."""
    blocks = np.pad(x.astype(np.float64), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    step = np.abs(blocks).max(axis=1, initial=0) / Q_MAX[codec] * (1 + 2**-7) + 2.0**-133
    return np.repeat(step, BLOCK)[: x.size]


# --- by hand ---


@pytest.mark.parametrize(
    ("codec", "count", "size"),
    [
        ("float32", 100, 400),
        ("bfloat16", 100, 200),
        ("int8", 100, 100 + 2 * 2),  # two blocks of 64
        ("int4", 100, 50 + 2 * 2),
        ("int4", 101, 51 + 2 * 2),
        ("int8", 64, 64 + 2),
        ("int8", 65, 65 + 4),
        ("int4", 1, 1 + 2),
        ("int3", 100, 3 * 16 + 2 + 4),  # a block of 128, its scale, the key of the signs
        ("int2", 257, (256 + 1) // 4 + 1 + 2 * 2 + 4),
        *((codec, 0, 0) for codec in CODECS),
    ],
)
def test_bytes_by_hand(codec: Codec, count: int, size: int) -> None:
    assert payload_bytes(codec, count) == size
    assert payload_bytes(codec, count, exact=3) == size + 12
    assert len(encode(np.ones(count, np.float32), codec, keyed_generator(0))) == size


def test_int8_by_hand() -> None:
    """The largest value, 127, makes the step 1: whole numbers are themselves, whatever the draw. 1.0 is 0x3F80."""
    x = np.array([127, -127, 5, 0], np.float32)
    data = encode(x, "int8", keyed_generator(0))
    assert data.tolist() == [127, 256 - 127, 5, 0, 0x80, 0x3F]
    assert decode(data, "int8", 4).tolist() == x.tolist()


def test_int4_by_hand() -> None:
    """Two a byte, the first in the lower half, in two's complement; the odd one out is followed by a zero."""
    x = np.array([7, -7, 1, -1, 3], np.float32)
    data = encode(x, "int4", keyed_generator(0))
    assert data.tolist() == [0x97, 0xF1, 0x03, 0x80, 0x3F]
    assert decode(data, "int4", 5).tolist() == x.tolist()


def test_a_block_of_its_own_scale() -> None:
    """64 values of 7 and one of 0.07: the small one is not drowned, it has a block of its own."""
    x = np.array([7.0] * 64 + [0.07], np.float32)
    got = through(x, "int4")
    assert got[:64].tolist() == [7.0] * 64
    assert got[64] == pytest.approx(0.07, rel=2**-7 + 1 / 7)


@pytest.mark.parametrize(
    ("x", "bits"),
    [
        (1.0, 0x3F80),
        (-2.5, 0xC020),
        (1 + 2**-8, 0x3F80),  # halfway between 1 and 1 + 2^-7: to the even 1
        (1 + 3 * 2**-8, 0x3F82),  # halfway between 1 + 2^-7 and 1 + 2^-6: to the even 1 + 2^-6
        (1 + 2**-8 + 2**-20, 0x3F81),  # above the half
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (2.0**-133, 0x0001),  # the smallest
        (math.inf, 0x7F80),
        (-math.inf, 0xFF80),
        (LARGEST, 0x7F80),  # nearer to infinity than to the largest bfloat16
    ],
)
def test_bfloat16_by_hand(x: float, bits: int) -> None:
    assert encode(np.array([x], np.float32), "bfloat16").view("<u2").tolist() == [bits]


def test_bfloat16_agrees_with_torch_on_random_bits() -> None:
    import torch

    bits = keyed_generator(0, "bits").integers(0, 2**32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)
    got = decode(encode(x, "bfloat16"), "bfloat16", x.size)
    wanted = torch.from_numpy(x.copy()).to(torch.bfloat16).float().numpy()
    assert np.array_equal(got, wanted, equal_nan=True)


# --- errors and bias ---


@pytest.mark.parametrize("codec", ROUNDED)
@pytest.mark.parametrize("seed", range(30))
def test_the_error_stays_below_a_step(codec: Codec, seed: int) -> None:
    """Random lengths, spreads over 60 powers of ten, zeros among them."""
    draw = keyed_generator(seed, "errors")
    x = draw.standard_normal(int(draw.integers(0, 400))) * 10.0 ** draw.uniform(-40, 20)
    x = np.where(draw.random(x.size) < 0.2, 0, x * 10.0 ** draw.uniform(-3, 3, x.size)).astype(np.float32)
    got = through(x, codec, seed)
    assert got.dtype == np.float32 and got.shape == x.shape
    assert np.all(np.abs(got.astype(np.float64) - x) <= steps(x, codec) * (1 + 1e-6))
    assert np.all(got[x == 0] == 0)
    assert np.all((np.sign(got) == np.sign(x)) | (got == 0))


@pytest.mark.parametrize("codec", ROTATED)
def test_no_bias_over_the_signs(codec: Codec) -> None:
    """The mean of 400 codings is 1 / 400 of the squared error away, and no shorter."""
    x = keyed_generator(0, "values").standard_normal(512).astype(np.float32)
    mean = np.mean([through(x, codec, key) for key in range(400)], axis=0, dtype=np.float64)
    assert np.square(mean - x).sum() < 2 / 400 * 0.1331 * np.square(x).sum()
    assert (mean @ x) / (x @ x) == pytest.approx(1.0, abs=0.003)


@pytest.mark.parametrize("codec", ROUNDED)
def test_no_bias(codec: Codec) -> None:
    """The mean of 4,000 codings of 64 values: 6 standard errors of the mean, each at most step / 2 / sqrt(4000).

    The keys are fixed, so the outcome is: it cannot fail by chance.
    """
    x = keyed_generator(0, "values").standard_normal(BLOCK).astype(np.float32)
    mean = np.mean([through(x, codec, key) for key in range(4000)], axis=0, dtype=np.float64)
    assert np.all(np.abs(mean - x) < 6 * steps(x, codec) / 2 / math.sqrt(4000))
    nearest = np.round(x / steps(x, codec)) * steps(x, codec)  # which has a bias that this test would see
    assert np.any(np.abs(nearest - x) > 6 * steps(x, codec) / 2 / math.sqrt(4000))


def test_bfloat16_error() -> None:
    x = keyed_generator(0).standard_normal(1000).astype(np.float32)
    assert np.all(np.abs(through(x, "bfloat16") - x) <= np.abs(x) * 2**-8)


@pytest.mark.parametrize("codec", [*ROUNDED, *ROTATED])
def test_the_same_key_gives_the_same_bytes(codec: Codec) -> None:
    x = keyed_generator(0).standard_normal(200).astype(np.float32)
    one, same, other = (encode(x, codec, keyed_generator(*key)).tobytes() for key in ((1, "a"), (1, "a"), (1, "b")))
    assert one == same != other


# --- the edges ---


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "x",
    [
        pytest.param([], id="empty"),
        pytest.param([3.0], id="one"),
        pytest.param([0.0] * 130, id="zeros"),
        pytest.param([-0.0, 0.0], id="minus zero"),
        pytest.param([2.0**-140, -(2.0**-149), 0.0], id="denormal"),
        pytest.param([1e38, -1e38, 1e-38], id="huge and small"),
    ],
)
def test_edges(codec: Codec, x: list[float]) -> None:
    values = np.array(x, np.float32)
    got = through(values, codec)
    assert got.shape == values.shape and np.all(np.isfinite(got))
    bound = {"float32": 0 * values, "bfloat16": np.abs(values) * 2.0**-8 + 2.0**-134}
    bound |= {codec: steps(values, codec) for codec in ROUNDED}
    bound |= dict.fromkeys(ROTATED, np.abs(values).max(initial=0.0) + 2.0**-149)
    assert np.all(np.abs(got.astype(np.float64) - values) <= bound[codec])


@pytest.mark.parametrize("codec", ROUNDED)
def test_the_largest_float_stays_finite(codec: Codec) -> None:
    """Its scale is rounded up, so q_max times the scale is above the largest float32."""
    got = through(np.array([LARGEST, -LARGEST], np.float32), codec)
    assert np.all(np.isfinite(got)) and got[0] > 0.98 * LARGEST * (1 - 1 / Q_MAX[codec])


@pytest.mark.parametrize(("codec", "block"), [("int8", BLOCK), ("int4", BLOCK), ("int3", 256), ("int2", 256)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_spoils_its_block_and_no_other(codec: Codec, block: int, bad: float) -> None:
    """So that the server sees it and drops the update, as it would in float32."""
    x = np.ones(3 * block, np.float32)
    x[block + 5] = bad
    got = through(x, codec).reshape(3, block)
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


def test_a_scale_that_lies_is_seen() -> None:
    for scale in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):  # both infinities and two NaNs
        data = np.array([1, 0, scale & 0xFF, scale >> 8], np.uint8)
        assert np.isnan(decode(data, "int8", 2)).all()


@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_of_the_right_length_decode_and_others_are_refused(codec: Codec) -> None:
    draw = keyed_generator(0, codec)
    for count in (0, 1, 2, 63, 64, 65, 200):
        size = payload_bytes(codec, count)
        for _ in range(20):
            data = np.frombuffer(draw.bytes(size), np.uint8)
            assert decode(data, codec, count).shape == (count,)
        for wrong in (size + 1, size - 1, 0, size + 4):
            if 0 <= wrong != size:
                with pytest.raises(ValueError, match=f"{wrong} bytes; {count} values in {codec} are {size}"):
                    decode(np.zeros(wrong, np.uint8), codec, count)


def test_rounding_by_chance_needs_a_draw() -> None:
    for codec in (*ROUNDED, *ROTATED):
        with pytest.raises(ValueError, match=f"{codec} draws: give a generator"):
            encode(np.ones(2, np.float32), codec)


# --- rotated ---


def shapes_of_values(n: int) -> dict[str, np.ndarray]:
    draw = keyed_generator(n, "values")
    x = draw.standard_normal(n)
    spike = 1e-3 * x
    spike[n // 3] = 1.0
    return {
        "normal": x,
        "spike": spike,
        "heavy": x**5,
        "sparse": x * (draw.random(n) < 0.02),
        "tensors": x * 10.0 ** (4 * (np.arange(n) > 0.9 * n)),
    }


@pytest.mark.parametrize("n", [1000, 1023, 1024, 4227])
@pytest.mark.parametrize("kind", ["normal", "spike", "heavy", "sparse", "tensors"])
@pytest.mark.parametrize(("codec", "error"), [("int2", 0.1331), ("int3", 0.03578)])
def test_the_error_is_at_most_that_of_a_normal_distribution_whatever_the_values(
    codec: Codec, error: float, kind: str, n: int
) -> None:
    """e / (1 - e), with e the least error of 4 and 8 levels (Max, 1960). A few large values may do better."""
    x = shapes_of_values(n)[kind].astype(np.float32)
    errors = [float(np.square(through(x, codec, key) - x).sum() / np.square(x).sum()) for key in range(20)]
    assert np.mean(errors) < 1.06 * error
    assert kind != "normal" or np.mean(errors) > 0.94 * error


@pytest.mark.parametrize("codec", ROTATED)
def test_levels_are_the_best_ones(codec: Codec) -> None:
    """Each level is the mean of the normal values that are rounded to it."""
    levels = LEVELS[codec]
    ends = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    below = lambda z: math.erfc(-z / math.sqrt(2)) / 2  # noqa: E731
    for level, low, high in zip(levels, ends, ends[1:], strict=False):
        assert (density(low) - density(high)) / (below(high) - below(low)) == pytest.approx(level, abs=2e-4)


@pytest.mark.parametrize("codec", ROTATED)
@pytest.mark.parametrize("n", [1, 2, 3, 64, 100, 256, 257, 700])
def test_a_message_by_hand(codec: Codec, n: int) -> None:
    """Rotations as matrices, from their definition."""
    x = keyed_generator(n).standard_normal(n).astype(np.float32)
    data = encode(x, codec, keyed_generator(n, "key"))
    sizes = [256] * (n // 256) + ([2 ** math.ceil(math.log2(n % 256))] if n % 256 else [])
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(data[-4:].tobytes()).digest(n), np.uint8))
    signs, padded, want = 1.0 - 2.0 * bits[: sum(sizes)], np.pad(x.astype(float), (0, sum(sizes) - n)), []
    for size, start in zip(sizes, np.cumsum([0, *sizes]), strict=False):
        here = slice(start, start + size)
        rotation = scipy.linalg.hadamard(size) / math.sqrt(size) * signs[here]
        y = rotation @ padded[here]
        nearest = LEVELS[codec][np.abs(LEVELS[codec][:, None] - y / np.sqrt(np.mean(y * y))).argmin(axis=0)]
        want.append(rotation.T @ nearest * (y @ y) / (y @ nearest))
    assert np.allclose(decode(data, codec, n), np.concatenate(want)[:n], rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("codec", ROTATED)
def test_a_long_message_is_coded_in_parts(codec: Codec) -> None:
    """As its blocks would be, one by one."""
    n = 256 * CHUNK + 300
    x = keyed_generator(0).standard_normal(n).astype(np.float32)
    x[256 * CHUNK + 270] = np.inf
    got = through(x, codec)
    assert np.isnan(got[-44:]).all() and np.isfinite(got[:-44]).all()
    for part in (slice(256 * (CHUNK - 1), 256 * CHUNK), slice(256 * CHUNK, 256 * CHUNK + 256)):
        assert np.square(got[part] - x[part]).sum() < 0.2 * np.square(x[part]).sum()


@pytest.mark.parametrize("codec", ROTATED)
def test_a_rotated_message_stays_finite(codec: Codec) -> None:
    got = through(np.array([LARGEST, -LARGEST, LARGEST], np.float32), codec)
    assert np.all(np.isfinite(got)) and np.abs(got).max() > 0.5 * LARGEST
    huge = encode(np.ones(50, np.float32), codec, keyed_generator(0)).copy()
    huge[-6:-4] = (0x7F, 0x7F)  # the largest bfloat16 as the scale
    assert np.all(np.isfinite(decode(huge, codec, 50)))
