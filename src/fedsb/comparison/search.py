"""The search for a learning rate: first on a grid with factor two, then finer around the best rate.

Every contender gets the same number of trials. The search is deterministic, and each step depends only on the rates
tried so far, so an interrupted search resumes identically.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedsb.methods.base import AdapterKind

FACTOR_RATE = 1 / 8  # start rate of LoRA factors, relative to that of a core

Tried = Mapping[float, float | None]  # rate -> score; None: the loss was not finite


def start_rate(adapter: AdapterKind, lr: float, own: float | None) -> float:
    """Returns the first rate: the contender's own one, else the configuration's, which is meant for a core.

    LoRA factors start at an eighth of it. With orthonormal A and B, a step of size lr changes the weight by about
    lr * r, while a step of one factor changes it by lr times the norm of the other factor. On TREC, the best rates
    were 0.04 (core, r = 32) and 0.005 to 0.01 (factors).
    """
    if own is not None:
        return own
    return rounded(lr * (FACTOR_RATE if adapter == "factors" else 1.0))


def next_rate(tried: Tried, start: float, higher_is_better: bool) -> float:
    """Returns the next rate to try.

    First `start`. While the best rate is the highest tried, twice that rate; while it is the lowest, half of it. Once
    it lies between two others, the geometric mean with a neighbour: the more distant one or, at equal distance, the
    better one. So the factor of the grid is 2, then sqrt 2, then smaller.
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
    """Returns the rate with the best score, the first of equals; the lowest if no loss was finite."""
    finite = [lr for lr, score in tried.items() if score is not None]
    return max(finite, key=lambda lr: _worth(tried[lr], higher_is_better)) if finite else min(tried)


def at_boundary(tried: Tried, lr: float) -> bool:
    """Returns whether `lr` is the highest or the lowest rate tried, so that a better one may lie beyond it."""
    return lr in (min(tried), max(tried))


def rounded(lr: float) -> float:
    """Returns a rate with four digits, so that it is the same in a table, a file and a command."""
    return float(f"{lr:.4g}")


def _worth(score: float | None, higher_is_better: bool) -> float:
    if score is None:
        return -math.inf
    return score if higher_is_better else -score
