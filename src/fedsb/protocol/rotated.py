"""Codecs of 2 and 3 bits per value: blocks are rotated at random, and each value is rounded to one of 4 or 8 levels.

    y = H D x / sqrt(m)           a block of m = 256 values; D: random signs, H: Hadamard matrix
    code_i = the nearest level to y_i / rms(y)
    x' = D H (scale level(codes)) / sqrt(m),    scale = |y|^2 / <y, level(codes)>

After the rotation the values of a block are close to normal, whatever x is. The levels are those with the least squared
error for a normal distribution (Lloyd, IEEE Transactions on Information Theory 28, 1982; Max, IRE Transactions on
Information Theory 6, 1960). With this scale x' is x on average over the signs, so that the errors of many clients
cancel out, and its relative squared error is 0.133 with 2 bits and 0.036 with 3, on average over blocks. (The scale of
least error, <y, level> / |level|^2, would have 0.118 and 0.035, and make every message 12 or 3 % shorter.) Random
rotations before rounding: Suresh, Yu, Kumar, McMahan (ICML 2017, arXiv 1611.00429); this scale: Vargaftik et al.
(DRIVE, NeurIPS 2021, arXiv 2105.08339).

    message: codes of all blocks | scale of each block, bfloat16 | key of the signs, 4 bytes

The last block is padded with zeros to a power of two, so the number of bytes depends on n alone. The rotation consists
of sums of two numbers, so every machine decodes the same values. A block with a NaN or an infinity decodes to NaN.
Shapes: n values of a message, in blocks of m.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedsb.protocol.bfloat16 import from_bfloat16, to_bfloat16

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]

POSITIVE = {  # the positive levels, for a normal distribution with variance 1
    "int2": (0.4528, 1.5104),
    "int3": (0.2451, 0.7560, 1.3439, 2.1520),
}
LEVELS = {codec: np.array([-x for x in reversed(half)] + [*half]) for codec, half in POSITIVE.items()}
BITS = {"int2": 2, "int3": 3}
BLOCK = 256
CHUNK = 1024  # blocks that are coded at once, so that little memory is needed
KEY_BYTES, SCALE_BYTES = 4, 2
LARGEST = float(from_bfloat16(np.array([0x7F7F], np.uint16))[0])


def rotated_bytes(codec: str, values: int) -> int:
    """Returns the bytes of a message."""
    full, last = _blocks(values)
    codes = -(-(BLOCK * full + last) * BITS[codec] // 8)
    return codes + SCALE_BYTES * (full + (last > 0)) + KEY_BYTES if values else 0


def encode_rotated(x: Floats, codec: str, draw: np.random.Generator) -> Bytes:  # (n,) -> (rotated_bytes(codec, n),)
    """Encodes the values; the key of the signs is drawn."""
    if not len(x):
        return np.zeros(0, np.uint8)
    key = draw.bytes(KEY_BYTES)
    signs = _signs(key, len(x))
    parts = [_encoded(x[here], signs, here, m, codec) for here, m in _chunks(len(x))]
    codes, scales = (np.concatenate(each) for each in zip(*parts, strict=True))
    return np.concatenate([codes, np.frombuffer(scales.tobytes(), np.uint8), np.frombuffer(key, np.uint8)])


def decode_rotated(data: Bytes, codec: str, count: int) -> Floats:  # (count,)
    """Decodes the values of `encode_rotated`."""
    x = np.zeros(count, np.float32)
    if not count:
        return x
    full, last = _blocks(count)
    end = len(data) - KEY_BYTES - SCALE_BYTES * (full + (last > 0))
    scales = from_bfloat16(data[end:-KEY_BYTES].copy().view("<u2"))
    scales = np.where(np.isfinite(scales), scales, np.float32(np.nan))
    signs, limit = _signs(data[-KEY_BYTES:].tobytes(), count), float(np.finfo(np.float32).max)
    bits = BITS[codec]
    for here, m in _chunks(count):
        size = here.stop - here.start
        blocks = -(-size // m)
        codes = _unpack(data[here.start * bits // 8 : end], bits, blocks * m).reshape(blocks, m)
        steps = scales[here.start // BLOCK :][:blocks].astype(np.float64)
        y = _hadamard(LEVELS[codec][codes] * steps[:, None]).reshape(-1)[:size]
        x[here] = np.clip(y * _plus_minus(signs, here), -limit, limit)
    return x


def _blocks(values: int) -> tuple[int, int]:
    """Returns (the number of blocks of 256, the size of the last one: the power of two that the rest fits into)."""
    full, rest = divmod(values, BLOCK)
    return full, 1 << (rest - 1).bit_length() if rest else 0


def _chunks(values: int) -> Iterator[tuple[slice, int]]:
    """Yields (values that are coded at once, the size of their blocks)."""
    full, last = _blocks(values)
    for first in range(0, full, CHUNK):
        yield slice(BLOCK * first, BLOCK * min(first + CHUNK, full)), BLOCK
    if last:
        yield slice(BLOCK * full, values), last


def _encoded(x: Floats, signs: Bytes, here: slice, m: int, codec: str) -> tuple[Bytes, NDArray[np.uint16]]:
    """Returns (packed codes, a scale of each block) of the values of one chunk, which is `here` in the message."""
    block = np.pad(x * _plus_minus(signs, here), (0, -len(x) % m)).reshape(-1, m)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(block.sum(axis=1))
    y = _hadamard(np.where(finite[:, None], block, 0.0))
    levels, rms = LEVELS[codec], np.sqrt(np.square(y).mean(axis=1, keepdims=True))
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, y / np.where(rms > 0, rms, 1.0)).astype(np.uint8)
    inner = (y * levels[codes]).sum(axis=1)
    scale = np.square(y).sum(axis=1) / np.where(inner > 0, inner, 1.0)
    scale = np.where(finite, np.minimum(scale, LARGEST), np.nan)
    return _pack(codes.reshape(-1), BITS[codec]), to_bfloat16(scale.astype(np.float32))


def _hadamard(x: Doubles) -> Doubles:  # (blocks, m), its own inverse
    """Returns the orthonormal Walsh-Hadamard transform of each row."""
    (blocks, m), half, y = x.shape, 1, x
    while half < m:
        pairs = y.reshape(blocks, -1, 2, half)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
    return y.reshape(blocks, m) / math.sqrt(m)


def _signs(key: bytes, count: int) -> Bytes:
    """Returns random bits, the same ones on every machine, one for each value."""
    return np.frombuffer(hashlib.shake_128(key).digest(-(-count // 8)), np.uint8)


def _plus_minus(signs: Bytes, here: slice) -> Doubles:
    """Returns 1.0 and -1.0 for the values `here`, whose first is a multiple of 8."""
    bits = np.unpackbits(signs[here.start // 8 : -(-here.stop // 8)], count=here.stop - here.start)
    return np.asarray(1 - 2 * bits.astype(np.int8), np.float64)


def _pack(codes: Bytes, bits: int) -> Bytes:
    return np.packbits((codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1)


def _unpack(data: Bytes, bits: int, count: int) -> Bytes:
    places = np.unpackbits(data[: -(-count * bits // 8)], count=count * bits).reshape(count, bits)
    codes: Bytes = places @ (1 << np.arange(bits, dtype=np.uint8))
    return codes
