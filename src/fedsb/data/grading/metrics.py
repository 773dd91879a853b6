"""Metrics of a whole table, which are no mean over its rows: F1, Matthews, Pearson, Spearman.

With n_ij the rows of class i that were called j, c classes, N rows:

    F1        2 TP / (2 TP + FP + FN), of the second of two classes (GLUE: label 1); of more classes the plain mean
    Matthews  (N tr n - sum_k t_k p_k) / sqrt((N^2 - sum_k p_k^2)(N^2 - sum_k t_k^2))     t_k true, p_k called k
    Pearson   cov(x, y) / (sd x sd y);  Spearman: the same of the ranks, ties at their mean rank

Matthews of more than two classes is R_K (Gorodkin, "Comparing two K-category assignments by a K-category correlation
coefficient", 2004). As in GLUE (Wang et al., arXiv 1804.07461). Where a quotient is 0 / 0 (no row of a class, true or
called so; all predictions alike) it is 0, as scikit-learn has it: such a model has shown nothing.
Shapes: every argument (N,), float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def accuracy(predicted: Values, true: Values) -> float:
    return float((predicted == true).mean())


def f1(predicted: Values, true: Values, classes: int) -> float:
    """Of the second class where there are two, else the mean over all classes that are true or called somewhere."""
    if classes == 2:
        return _f1_of(predicted, true, 1)
    met = np.union1d(predicted, true)
    return sum(_f1_of(predicted, true, label) for label in met) / len(met)


def _f1_of(predicted: Values, true: Values, label: float) -> float:
    called, are = predicted == label, true == label
    return _divided(2 * float((called & are).sum()), float(called.sum() + are.sum()))


def matthews(predicted: Values, true: Values) -> float:
    labels = np.union1d(predicted, true)
    called_k, true_k = ((values[:, None] == labels).sum(0).astype(np.float64) for values in (predicted, true))
    n, right = float(len(true)), float((predicted == true).sum())
    spread = (n * n - float(called_k @ called_k)) * (n * n - float(true_k @ true_k))
    return _divided(n * right - float(called_k @ true_k), spread**0.5)


def pearson(predicted: Values, true: Values) -> float:
    if is_constant(predicted) or is_constant(true):
        return 0.0  # not what rounding makes of 0 / 0
    x, y = predicted - predicted.mean(), true - true.mean()
    return _divided(float(x @ y), float(np.sqrt((x @ x) * (y @ y))))


def spearman(predicted: Values, true: Values) -> float:
    return pearson(ranks(predicted), ranks(true))


def ranks(values: Values) -> Values:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def is_constant(values: Values) -> bool:
    return bool((values == values[0]).all())


def _divided(above: float, below: float) -> float:
    return above / below if below else 0.0
