"""Codecs of values: float32, bfloat16, int8 and int4 with one scale per block, or int3 and int2 (rotated.py).

    int8, int4:   scale_j = max |x| over block j / q_max, rounded up to bfloat16       q_max = 127, 7
                  code_i  = floor(x_i / scale_j + u_i),  u_i ~ U[0, 1)                 E[scale_j code_i] = x_i

Stochastic rounding as in QSGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132). bfloat16 rounds to nearest, ties to
even.

Shapes: n values of a whole message. The coded tensors are concatenated, and blocks may span two tensors, so that the
number of bytes depends on n alone. For each value |decoded - x| < scale_j, which is at most max |block| / q_max
(1 + 2^-7). A block of zeros decodes to zeros. A block with a NaN or an infinity decodes to NaN, so that the server
detects it. Limits: values below 2^-133 may become 0. Rounding does not protect privacy, because anyone who knows the
seed knows the draws.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import NDArray

from fedsb.config.training import Codec as Codec
from fedsb.protocol.bfloat16 import from_bfloat16, to_bfloat16
from fedsb.protocol.rotated import BITS, decode_rotated, encode_rotated, rotated_bytes

CODECS: tuple[str, ...] = get_args(Codec)
BLOCK = 64  # values that share a scale; see docs/decisions.md
SCALE_BYTES = 2  # bfloat16
Q_MAX = {"int8": 127, "int4": 7}

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def payload_bytes(codec: Codec, values: int, exact: int = 0) -> int:
    """Returns the bytes of a message: `values` coded ones with their scales, and `exact` ones in float32."""
    if codec == "float32":
        return 4 * (values + exact)
    if codec == "bfloat16":
        return 2 * values + 4 * exact
    if codec in BITS:
        return rotated_bytes(codec, values) + 4 * exact
    codes = values if codec == "int8" else -(-values // 2)
    return codes + SCALE_BYTES * -(-values // BLOCK) + 4 * exact


def basis_codec(codec: Codec) -> Codec:
    """Returns the codec of a basis, which is sent once and without error feedback: int4 in place of int3 and int2."""
    return "int4" if codec in BITS else codec


def encode(
    x: Floats,  # (n,)
    codec: Codec,
    draw: np.random.Generator | None = None,  # int8 and int4 round by it, int3 and int2 rotate
) -> Bytes:  # (payload_bytes(codec, n),): the codes, then the scales
    """Encodes the values. Raises ValueError if a codec of integers is given no draw."""
    if codec == "float32":
        return _bytes(x.astype("<f4"))
    if codec == "bfloat16":
        return _bytes(to_bfloat16(x))
    if draw is None:
        raise ValueError(f"{codec} draws: give a generator, such as keyed_generator(seed, 'codec', ...)")
    if codec in BITS:
        return encode_rotated(x, codec, draw)
    blocks = np.pad(x, (0, -len(x) % BLOCK)).reshape(-1, BLOCK).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = _scales(np.abs(blocks).max(axis=1, initial=0.0) / Q_MAX[codec])
        steps = from_bfloat16(scales).astype(np.float64)
        steps = np.where(steps > 0, steps, 1.0)[:, None]  # a NaN's block: any codes, its scale says NaN
        rounded = np.floor(np.where(np.isfinite(blocks), blocks, 0.0) / steps + draw.random(blocks.shape))
    codes = np.clip(rounded, -Q_MAX[codec], Q_MAX[codec]).astype(np.int8).reshape(-1)[: len(x)]
    return np.concatenate([_bytes(codes) if codec == "int8" else _pack_nibbles(codes), _bytes(scales)])


def decode(data: Bytes, codec: Codec, count: int) -> Floats:  # (count,)
    """Decodes `count` values that `encode` coded. Raises ValueError if `data` has a wrong length."""
    if len(data) != payload_bytes(codec, count):
        raise ValueError(f"{len(data)} bytes; {count} values in {codec} are {payload_bytes(codec, count)}")
    if codec == "float32":
        return data.view("<f4").astype(np.float32)
    if codec == "bfloat16":
        return from_bfloat16(data.view("<u2"))
    if codec in BITS:
        return decode_rotated(data, codec, count)
    cut = len(data) - SCALE_BYTES * -(-count // BLOCK)
    codes = data[:cut].view(np.int8) if codec == "int8" else _unpack_nibbles(data[:cut], count)
    scales = from_bfloat16(data[cut:].copy().view("<u2"))
    steps = np.where(np.isfinite(scales), scales, np.float32(np.nan)).astype(np.float64)
    limit = float(np.finfo(np.float32).max)  # scales are rounded up: the largest of all values must not overflow
    x: Floats = np.clip(codes * np.repeat(steps, BLOCK)[:count], -limit, limit).astype(np.float32)
    return x


# --- bits ---


def _scales(x: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Rounds non-negative numbers up to bfloat16. A number that is not finite becomes NaN."""
    bits = x.astype(np.float32).view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0xFFFF)) >> 16, 0x7FC0).astype("<u2")


def _pack_nibbles(codes: NDArray[np.int8]) -> Bytes:
    """Codes -8..7 as two per byte, the first in the lower half. An odd number of codes is padded with a zero."""
    nibbles = np.pad(codes, (0, len(codes) % 2)).view(np.uint8) & np.uint8(0x0F)
    return nibbles[::2] | (nibbles[1::2] << np.uint8(4))


def _unpack_nibbles(data: Bytes, count: int) -> NDArray[np.int8]:
    nibbles = np.stack([data & 0x0F, data >> 4], axis=1).reshape(-1)[:count]
    return (nibbles ^ 8).astype(np.int8) - np.int8(8)


def _bytes(x: NDArray[np.generic]) -> Bytes:
    return np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
