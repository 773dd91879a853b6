"""bfloat16 as whole numbers of 16 bits: the upper half of a float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even: adds half of the last place, less one where that place is even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")  # a NaN's carry would make it a number


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    floats: NDArray[np.float32] = (bits.astype(np.uint32) << 16).view(np.float32)
    return floats
