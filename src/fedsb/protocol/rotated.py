"""Codecs of 2 and 3 bits per value: blocks are rotated at random, and each value is rounded to one of 4 or 8 levels.

    y = H D x / sqrt(m)           a block of m = 256 values; D: random signs, H: Hadamard matrix
    code_i = the nearest level to y_i / rms(y)
    x' = D H (scale level(codes)) / sqrt(m),    scale = <y, level(codes)> / |level(codes)|^2, the best one

After the rotation the values of a block are close to normal, whatever x is, and the levels are those with the least
squared error for a normal distribution (Lloyd, IEEE Transactions on Information Theory 28, 1982; Max, IRE Transactions
on Information Theory 6, 1960): a block's relative squared error is at most about 0.118 with 2 bits and 0.035 with 3.
The error feedback of the messages corrects it (compressor.py). Random rotations before rounding: Suresh, Yu, Kumar,
McMahan (ICML 2017, arXiv 1611.00429); Vargaftik et al. (DRIVE, NeurIPS 2021, arXiv 2105.08339).

    message: codes of all blocks | scale of each block, bfloat16 | key of the signs, 4 bytes

The last block is padded with zeros to a power of two, so the number of bytes depends on n alone. The rotation consists
of sums of two numbers, so every machine decodes the same values. A block with a NaN or an infinity decodes to NaN.
Shapes: n values of a message, padded to p in blocks of m.
"""

from __future__ import annotations

import hashlib
import math

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
KEY_BYTES, SCALE_BYTES = 4, 2
LARGEST = float(from_bfloat16(np.array([0x7F7F], np.uint16))[0])


def rotated_bytes(codec: str, values: int) -> int:
    """Returns the bytes of a message."""
    sizes = _blocks(values)
    return -(-sum(sizes) * BITS[codec] // 8) + SCALE_BYTES * len(sizes) + KEY_BYTES if values else 0


def encode_rotated(x: Floats, codec: str, draw: np.random.Generator) -> Bytes:  # (n,) -> (rotated_bytes(codec, n),)
    """Encodes the values; the key of the signs is drawn."""
    if not len(x):
        return np.zeros(0, np.uint8)
    key, sizes = draw.bytes(KEY_BYTES), _blocks(len(x))
    padded = np.pad(x.astype(np.float64), (0, sum(sizes) - len(x))) * _signs(key, sum(sizes))
    codes, scales = [], []
    for block in _cut(padded, sizes):  # (blocks, m)
        finite = np.isfinite(block.sum(axis=1))
        y = _hadamard(np.where(finite[:, None], block, 0.0))
        found, scale = _nearest(y, LEVELS[codec])
        codes.append(found.reshape(-1))
        scales.append(np.where(finite, scale, np.nan))
    return np.concatenate(
        [
            _pack(np.concatenate(codes), BITS[codec]),
            np.frombuffer(to_bfloat16(np.concatenate(scales).astype(np.float32)).tobytes(), np.uint8),
            np.frombuffer(key, np.uint8),
        ]
    )


def decode_rotated(data: Bytes, codec: str, count: int) -> Floats:  # (count,)
    """Decodes the values of `encode_rotated`."""
    if not count:
        return np.zeros(0, np.float32)
    sizes = _blocks(count)
    key, end = data[-KEY_BYTES:].tobytes(), len(data) - KEY_BYTES - SCALE_BYTES * len(sizes)
    scales = from_bfloat16(data[end:-KEY_BYTES].copy().view("<u2"))
    steps = np.repeat(np.where(np.isfinite(scales), scales, np.float32(np.nan)).astype(np.float64), sizes)
    y = steps * LEVELS[codec][_unpack(data[:end], BITS[codec], sum(sizes))]
    x = np.concatenate([_hadamard(block).reshape(-1) for block in _cut(y, sizes)]) * _signs(key, sum(sizes))
    limit = float(np.finfo(np.float32).max)
    return np.clip(x[:count], -limit, limit).astype(np.float32)


def _blocks(values: int) -> list[int]:
    """Returns the size of each block: 256, and the power of two that the rest fits into."""
    full, rest = divmod(values, BLOCK)
    return [BLOCK] * full + ([1 << (rest - 1).bit_length()] if rest else [])


def _cut(x: Doubles, sizes: list[int]) -> list[Doubles]:
    """Returns the full blocks (blocks, 256), and the last one (1, m) if it is smaller."""
    full = BLOCK * sizes.count(BLOCK)
    return [part.reshape(-1, m) for part, m in ((x[:full], BLOCK), (x[full:], sizes[-1])) if len(part)]


def _hadamard(x: Doubles) -> Doubles:  # (blocks, m), its own inverse
    """Returns the orthonormal Walsh-Hadamard transform of each row."""
    (blocks, m), half, y = x.shape, 1, x
    while half < m:
        pairs = y.reshape(blocks, -1, 2, half)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
    return y.reshape(blocks, m) / math.sqrt(m)


def _nearest(y: Doubles, levels: Doubles) -> tuple[NDArray[np.int64], Doubles]:
    """Returns (the code of each value (blocks, m), the scale of each block)."""
    rms = np.sqrt(np.square(y).mean(axis=1, keepdims=True))
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, y / np.where(rms > 0, rms, 1.0))
    found = levels[codes]
    return codes, np.clip((y * found).sum(axis=1) / np.square(found).sum(axis=1), -LARGEST, LARGEST)


def _signs(key: bytes, count: int) -> NDArray[np.int8]:
    """Returns random signs, the same ones on every machine."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(key).digest(-(-count // 8)), np.uint8))[:count]
    signs: NDArray[np.int8] = 1 - 2 * bits.astype(np.int8)
    return signs


def _pack(codes: NDArray[np.int64], bits: int) -> Bytes:
    return np.packbits((codes[:, None] >> np.arange(bits)) & 1)


def _unpack(data: Bytes, bits: int, count: int) -> NDArray[np.int64]:
    places = np.unpackbits(data, count=count * bits).reshape(count, bits)
    codes: NDArray[np.int64] = places @ (1 << np.arange(bits))
    return codes
