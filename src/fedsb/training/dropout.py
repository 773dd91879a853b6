"""Adapter dropout with keyed masks, so that a client's masks do not depend on the clients that train with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsb.utils.rng import keyed_generator

Keys = Sequence[tuple[int | str, ...]]  # for each client, the key of its draws in this step


class Dropout:
    """Adapter dropout, keyed by client, step, layer and row, and therefore the same when a forward pass is repeated.

    A row's mask is drawn per token. It depends neither on the padding, nor on the other rows of the batch, nor on how
    a step's rows are split into micro-batches. A layer whose input has no axis of rows (its client is alone then) gets
    one mask for its whole input.

    Args:
        p: the share that is dropped.
        keys: of the clients, in the order of their rows.
        first: the micro-batch's first row, counted in the step.
        rows: of all clients in the micro-batch.
    """

    def __init__(self, p: float, keys: Keys, first: int, rows: int) -> None:
        self.p, self.keys, self.first, self.rows = p, keys, first, rows

    def __call__(self, layer: str, x: Tensor) -> Tensor:  # (K b, ..., n)
        if len(x) == self.rows:
            numbers = range(self.first, self.first + self.rows // len(self.keys))
            keys = [word(*k, layer, i) for k in self.keys for i in numbers]
            bits = random_words(x[0].numel(), keys, x.device).reshape(x.shape)
        else:
            bits = random_words(x.numel(), [word(*self.keys[0], layer, self.first)], x.device).reshape(x.shape)
        return x * (bits >= round(self.p * 2**32) - 2**31).to(x.dtype) / (1 - self.p)


def word(*key: int | str) -> int:
    """Returns the key as a signed 32-bit number."""
    return int(keyed_generator(*key).integers(-(2**31), 2**31))


def random_words(count: int, keys: Sequence[int], device: torch.device) -> Tensor:
    """Returns (len(keys), count) signed 32-bit words, made on the device: word i of a key is mix(mix(i) ^ key).

    Each word depends on its key and position only, and not on the length of a row or on other rows.
    """
    counter = mix(torch.arange(count, dtype=torch.int32, device=device))
    return mix(counter ^ torch.tensor(keys, dtype=torch.int32, device=device).unsqueeze(1))


def mix(x: Tensor) -> Tensor:
    """Returns a bijective hash of 32-bit words ("lowbias32" of Wellons' hash prospector), element by element."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
