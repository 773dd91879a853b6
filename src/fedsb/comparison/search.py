"""Which learning rate to try next: a climb on a grid of factors of two, then finer around the best.

Every contender gets the same number of trials, whatever its rates look like, so none is tuned more than another. The
search is deterministic, and each step is a function of what was tried: a search that was cut off goes on as it would
have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedsb.methods.base import AdapterKind

FACTOR_RATE = 1 / 8  # of the rate of a core

Tried = Mapping[float, float | None]  # rate -> score; None: the loss was not finite


def start_rate(adapter: AdapterKind, lr: float, own: float | None) -> float:
    """Where the search starts: at the contender's own rate, else at the configuration's, which is meant for a core.

    LoRA's factors start at an eighth of it. With orthonormal A and B a step of lr moves the weight by about lr r,
    while a step of the factors moves it by lr times their other factor's norm: on TREC the best rates were 0.04 (core,
    r = 32) and 0.005 to 0.01 (factors).
    """
    if own is not None:
        return own
    return rounded(lr * (FACTOR_RATE if adapter == "factors" else 1.0))


def next_rate(tried: Tried, start: float, higher_is_better: bool) -> float:
    """The rate to try after those tried.

    First `start`. While the best is the highest tried, twice that; while it is the lowest, half of it. Once it lies
    between two others, the geometric mean with a neighbour: with the farther one or, where both are as far, with the
    better. So the grid's factor is 2, then sqrt 2, then finer.
    """
    if not tried:
        return rounded(start)
    rates = sorted(tried)
    best = best_rate(tried, higher_is_better)
    at = rates.index(best)
    if at == len(rates) - 1 and tried[best] is not None:
        return rounded(best * 2)
    if at == 0:
        return rounded(best / 2)
    below, above = rates[at - 1], rates[at + 1]
    gap_below, gap_above = math.log(best / below), math.log(above / best)
    if math.isclose(gap_below, gap_above, rel_tol=0.01):  # rates are rounded
        go_down = _worth(tried[below], higher_is_better) >= _worth(tried[above], higher_is_better)
    else:
        go_down = gap_below > gap_above
    return rounded(math.sqrt(best * (below if go_down else above)))


def best_rate(tried: Tried, higher_is_better: bool) -> float:
    """The rate with the best score; of equals, the one tried first; where none was finite, the lowest."""
    finite = [lr for lr, score in tried.items() if score is not None]
    return max(finite, key=lambda lr: _worth(tried[lr], higher_is_better)) if finite else min(tried)


def at_an_end(tried: Tried, lr: float) -> bool:
    """Whether `lr` is the highest or the lowest tried, so that a better one may lie beyond."""
    return lr in (min(tried), max(tried))


def rounded(lr: float) -> float:
    """Four digits, so that a rate reads the same in a table, a file and a command."""
    return float(f"{lr:.4g}")


def _worth(score: float | None, higher_is_better: bool) -> float:
    if score is None:
        return -math.inf
    return score if higher_is_better else -score
