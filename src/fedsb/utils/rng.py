"""All random numbers in fedsb are drawn from a key, never from an order of calls.

The key of a draw says what it is for, such as (seed, "batches", client name, round). The same key gives the same
numbers in any process, whatever was drawn before. Clients can therefore be trained in any order, together or
separately, and a resumed run draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = int | str


def keyed_generator(*key: Key) -> np.random.Generator:
    """Returns a separate Philox generator for this key.

    >>> first, second = (keyed_generator(0, "batches", "site-a", 3) for _ in range(2))
    >>> first.integers(10) == second.integers(10)
    np.True_
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
