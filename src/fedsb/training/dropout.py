"""Adapter dropout with keyed masks, so that a client's masks do not depend on the clients that train with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fedsb.utils.rng import keyed_generator
from fedsb.utils.tensors import to_device

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

    def __init__(self, p: float, keys: Keys, first: int, rows: int, device: torch.device) -> None:
        self.p, self.rows = p, rows
        numbers = range(first, first + rows // len(keys))
        words = [word(*key, number) for key in keys for number in numbers]
        self._row_keys = to_device(torch.tensor(words, dtype=torch.int32), device)  # (K b,)
        self._counters: dict[tuple[int, torch.device], Tensor] = {}  # values of a row -> a hashed counter, by device

    def __call__(self, layer: str, x: Tensor) -> Tensor:  # (K b, ..., n)
        keys = (self._row_keys if len(x) == self.rows else self._row_keys[:1]).to(x.device)
        count = x.numel() // len(keys)
        place = count, x.device
        if place not in self._counters:
            self._counters[place] = mix(torch.arange(count, dtype=torch.int32, device=x.device))
        bits = random_words(self._counters[place], keys ^ layer_word(layer)).view(x.shape)
        return torch.where(bits >= round(self.p * 2**32) - 2**31, x * (1 / (1 - self.p)), 0.0)


def word(*key: int | str) -> int:
    """Returns the key as a signed 32-bit number."""
    return int(keyed_generator(*key).integers(-(2**31), 2**31))


@cache
def layer_word(layer: str) -> int:
    """Returns the layer's part of its masks' keys, computed once per layer."""
    return word("dropout layer", layer)


def random_words(counter: Tensor, keys: Tensor) -> Tensor:
    """Returns (len(keys), len(counter)) signed 32-bit words, made on the device: mix(counter ^ key).

    Each word depends on its key and position only, and not on the length of a row or on other rows.
    """
    return mix(counter ^ keys.unsqueeze(1))


def mix(x: Tensor) -> Tensor:
    """Returns a bijective hash of 32-bit words ("lowbias32" of Wellons' hash prospector), element by element."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
