"""Whole numbers in a ring of up to 32 bits, so that the sum of all clients is exact and cannot overflow.

    M   = floor((2^(bits - 1) - 1) / n)        step = C / M
    q_k = floor(p_k clip(x_k, -C, C) / step + u),   u ~ U[0, 1),   |q_k| <= M        sent as q_k mod 2^bits
    sum_k p_k clip(x_k)  ~=  step * (sum_k q_k mod 2^bits, read as signed)           |sum_k q_k| <= n M < 2^(bits - 1)

n is the number of clients that may take part, C the clip bound of each value, p_k in (0, 1] a client's weight: n_k / W
with a public W, or 1 / n, or 1. Each client checks its own weight, and this is enough to prevent an overflow. The ring
vector has one value more than x: M, weighted like the others. The server therefore learns sum_k p_k over the clients
that stayed, and divides by it, without learning any n_k.

Rounding is stochastic and therefore unbiased. For a sum over K clients, each value has an error below K step, with a
standard deviation of at most sqrt(K) step / 2: with n = K = 8, C = 1 and 32 bits, 3.0e-8 and 5.3e-9, where float32
itself has an error of up to 3.0e-8 below 1. Limit: what a value exceeds C by is lost.

Values travel packed, `bits` bits each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsb.utils.errors import UserError

Ring = NDArray[np.uint32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Whole = NDArray[np.int64]

BITS = 32


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """The grid that all clients of a sum share. Raises UserError for an invalid number of clients or clip bound."""

    clients: int  # n: all that may take part, whether they stay or not
    clip: float  # C, in the unit of the values
    bits: int = BITS  # of the ring

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= BITS and self.clients >= 1 and self.largest >= 1):
            raise UserError(
                f"A sum of {self.clients} clients is impossible in a ring of {self.bits} bits. It supports 1 to "
                f"2^{min(self.bits, BITS) - 1} - 1 clients."
            )
        if not (np.isfinite(self.clip) and self.clip > 0 and self.step > 0):
            raise UserError(f"The clip bound {self.clip} is invalid. It must be positive and finite.")

    @property
    def largest(self) -> int:
        """M: the largest integer that one client sends."""
        return int((2 ** (self.bits - 1) - 1) // self.clients)

    @property
    def step(self) -> float:
        """The distance between two values of the grid."""
        return self.clip / self.largest

    def bound(self, clients: int) -> float:
        """Returns a bound of |decoded - sum_k p_k clip(x_k)| per value, if `clients` clients stayed.

        It is K step, and a millionth more for the rounding of float64 (each below 2^-21 step).
        """
        return clients * self.step * (1 + 2**-20)

    def encode(
        self,
        values: NDArray[np.floating],  # (size,)
        weight: float,  # p_k
        draw: np.random.Generator,  # for rounding; it need not be secret
        noise: Whole | None = None,  # (size,), in steps, added after clipping
    ) -> Ring:  # (size + 1,)
        """Returns the ring vector.

        Raises ValueError for values that are not finite or not flat, and for a weight outside (0, 1].
        """
        if not 0 < weight <= 1:
            raise ValueError(f"The weight {weight} is invalid. It must be above 0 and at most 1, such as n_k / W.")
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"Values of shape {values.shape} are invalid. They must be flat, and all finite.")
        weighted = np.append(np.clip(values.astype(np.float64), -self.clip, self.clip), self.clip) * weight
        rounded = np.floor(weighted / self.step + draw.random(weighted.shape)).astype(np.int64)
        whole = np.clip(rounded, -self.largest, self.largest)
        if noise is not None:
            whole[:-1] += noise  # rarely exceeds M: a wrapped value is wrong, but no less private
        return self._in_ring(whole)

    def encode_whole(self, values: Whole) -> Ring:  # (size,) in steps -> (size + 1,)
        """Returns the ring vector of whole numbers, with weight 1. A sum outside the ring wraps."""
        return self._in_ring(np.append(values, self.largest))

    def decode(self, total: Ring) -> tuple[Doubles, float]:
        """Returns (sum_k p_k x_k of shape (size,), sum_k p_k) from the ring's sum (size + 1,)."""
        unused = BITS - self.bits  # shifted up and down again, the sign is that of the ring's highest bit
        signed = (total << np.uint32(unused)).view(np.int32) >> np.int32(unused)
        sums = signed * np.float64(self.step)
        return sums[:-1], float(signed[-1] / self.largest)

    def reduce(self, numbers: Ring) -> Ring:
        """Returns the numbers modulo 2^bits."""
        return numbers & np.uint32(2**self.bits - 1)

    # --- bytes ---

    def packed_bytes(self, size: int) -> int:
        """Returns the length of `pack` for `size` values."""
        return -(-size * self.bits // 8)

    def pack(self, numbers: Ring) -> bytes:  # (size,)
        """Returns the lowest `bits` bits of each number, end to end."""
        if self.bits == BITS:
            return numbers.astype("<u4").tobytes()
        bits = np.unpackbits(numbers.astype(">u4").view(np.uint8)).reshape(-1, BITS)
        return np.packbits(bits[:, BITS - self.bits :].ravel()).tobytes()  # a copy: much faster than a view

    def unpack(self, data: bytes, size: int) -> Ring:
        """Returns the numbers (size,) that `pack` wrote."""
        if self.bits == BITS:
            return np.frombuffer(data, "<u4").astype(np.uint32, copy=False)
        bits = np.zeros((size, BITS), np.uint8)
        bits[:, BITS - self.bits :] = np.unpackbits(np.frombuffer(data, np.uint8), count=size * self.bits).reshape(
            size, self.bits
        )
        return np.packbits(bits).view(">u4").astype(np.uint32)

    def _in_ring(self, whole: Whole) -> Ring:
        ring: Ring = (whole & (2**self.bits - 1)).astype(np.uint32)  # negative values wrap
        return ring
