"""A part of the values, `server.fraction` of them: the same for all clients in a round, and another one in each round.

    period   = ceil(1 / fraction)
    size     = ceil(fraction n)
    places_t = [pi(i mod n) for i in j size ... (j + 1) size - 1],   j = t mod period, pi ~ (seed, t div period)

So no places have to be sent, and every value is sent in each period of rounds. A random mask of updates: Konecny et al.
(arXiv 1610.05492). Here it is the same mask for all clients, so that a server which only learns the sum of the updates
can use it, and what is not sent is kept as error feedback (compressor.py).

Tensors of one value are in every part, because they may be whole numbers (a rank). Shapes: n values in the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedsb.adapters.layout import Layout
from fedsb.utils.rng import keyed_generator

Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of the values that is sent in one round."""

    seed: int
    round: int
    fraction: float

    def size(self, values: int, exact: int = 0) -> int:
        """Returns how many values are sent of `values` and of `exact` tensors of one value."""
        return part_size(values, self.fraction) + exact

    def places(self, layout: Layout) -> Places:
        """Returns the places in the layout's vector of the values that are sent: tensors of one value come first."""
        return _places(self, layout)


def part_size(values: int, fraction: float) -> int:
    """Returns how many of `values` are sent in a round."""
    return math.ceil(fraction * values)


@lru_cache(maxsize=16)
def single_values(layout: Layout) -> NDArray[np.bool_]:
    """Returns (P,), true for the tensors of one value."""
    sizes = np.array(layout.sizes, dtype=np.int64)
    return np.repeat(sizes == 1, sizes)


@lru_cache(maxsize=4)  # the updates of a round have the same
def _places(part: Part, layout: Layout) -> Places:
    exact = single_values(layout)
    others = np.flatnonzero(~exact)
    period, size = math.ceil(1 / part.fraction), part.size(len(others))
    cycle, index = divmod(part.round, period)
    order = keyed_generator(part.seed, "part", cycle).permutation(len(others))
    chosen = others[order[np.arange(index * size, (index + 1) * size) % max(len(others), 1)]]
    places: Places = np.concatenate([np.flatnonzero(exact), np.sort(chosen)])
    places.flags.writeable = False
    return places
