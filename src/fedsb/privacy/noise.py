"""The randomness of a private run: Gaussian noise, and Poisson sampling of rows.

The bits are the key stream of AES-256 in counter mode under a key from the operating system, which is never stored.
Uniforms have 53 bits. Normals are Box and Muller's ("A Note on the Generation of Random Normal Deviates", Annals of
Mathematical Statistics 1958) in float64.

Known limits:
- Floating point (Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012): only
  some of all float64 values can occur as a normal, so the last bits of a noised float64 value can reveal which value
  was noised; the proof of epsilon is for real numbers. Add the noise in float64 and release only the sum rounded to
  float32, or to a grid much coarser than float64: some 2^29 float64 values round to one float32 value, and which of
  them could occur is no longer visible. That stops the known attack and proves nothing; a proof needs discrete noise
  (Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, arXiv 2004.00010).
- No normal is beyond 8.57 (the smallest uniform is 2^-53); a true one is with a probability of 1e-17.
- The key stays in this process's memory.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsb.utils.extras import needs_extra
from fedsb.utils.rng import Key, keyed_generator

PAIRS = 1 << 16  # normals are generated in chunks of this many pairs, which fit into the processor's cache


class Noise(Protocol):
    """A source of randomness for private releases."""

    @property
    def secret(self) -> bool:
        """True if nobody can reproduce the numbers. If it is False, the run is not private."""

    def normal(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        """Returns independent standard normals of this shape."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Returns multiples of 2^-53 in [0, 1), of shape (count,)."""

    def poisson_sample(self, rows: int, q: float) -> list[int]:
        """Returns the sampled rows of 0..rows-1 in order, each independently with probability q (to 2^-53)."""


class NoiseStream(ABC):
    """Normals and samples from a stream of bits."""

    @abstractmethod
    def _bits(self, count: int) -> NDArray[np.uint64]:
        """Returns the next `count` words of the stream, of shape (count,)."""

    def normal(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        size = math.prod(shape) if isinstance(shape, tuple) else shape
        normals = np.empty(size + size % 2)
        for start in range(0, size, 2 * PAIRS):
            part = normals[start : start + 2 * PAIRS]
            pairs = len(part) // 2
            uniform = self.uniform(2 * pairs)
            radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:pairs]))  # 1 - u is in (0, 1]: the logarithm is finite
            angle = (2.0 * math.pi) * uniform[pairs:]
            np.multiply(radius, np.cos(angle), out=part[:pairs])
            np.multiply(radius, np.sin(angle), out=part[pairs:])
        return normals[:size].reshape(shape)

    def poisson_sample(self, rows: int, q: float) -> list[int]:
        return [int(row) for row in np.flatnonzero(self.uniform(rows) < q)]

    def uniform(self, count: int) -> NDArray[np.float64]:
        return (self._bits(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class SecretNoise(NoiseStream):
    """Noise for a private run, with a random key that can be neither copied nor pickled.

    A process that is forked from this one starts a separate stream with its first draw.
    """

    def __init__(self) -> None:
        self._start()

    @property
    def secret(self) -> bool:
        return True

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("Secret noise cannot be copied or pickled, because two releases would have the same noise.")

    def _start(self) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher
            from cryptography.hazmat.primitives.ciphers.algorithms import AES
            from cryptography.hazmat.primitives.ciphers.modes import CTR
        except ImportError as error:
            raise needs_extra("cryptography") from error
        self._process = os.getpid()
        self._cipher = Cipher(AES(os.urandom(32)), CTR(bytes(16))).encryptor()

    def _bits(self, count: int) -> NDArray[np.uint64]:
        if os.getpid() != self._process:
            self._start()
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")


class SeededNoise(NoiseStream):
    """Reproducible noise for tests: the same seed and key give the same numbers. A run with it is not private."""

    def __init__(self, seed: int, *key: Key) -> None:
        self._generator = keyed_generator(seed, "noise", *key)

    @property
    def secret(self) -> bool:
        return False

    def _bits(self, count: int) -> NDArray[np.uint64]:
        return self._generator.integers(0, 2**64, size=count, dtype=np.uint64)
