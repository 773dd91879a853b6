"""Every random number in fedsb: drawn from a key, never from an order.

A draw is keyed by what it is for, such as (seed, "batches", client name, round). The same key gives the same
numbers in any process, whatever was drawn before, so clients can be trained in any order, together or apart, and
a resumed run draws what the unbroken one would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = int | str


def generator(*key: Key) -> np.random.Generator:
    """A Philox generator of its own for this key.

    >>> generator(0, "batches", "site-a", 3).integers(10) == generator(0, "batches", "site-a", 3).integers(10)
    np.True_
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
