"""Metrics of a whole table, which are not a mean over its rows: F1, Matthews, Pearson, Spearman.

scikit-learn and scipy compute them, with GLUE's conventions (Wang et al., arXiv 1804.07461): F1 is that of the second
of two classes (label 1), and the plain mean for more classes. A quotient of 0 / 0 (no row of a class, true or
predicted; constant predictions) counts as 0: such a model has shown nothing. Shapes: every argument (N,), float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def accuracy(predicted: Values, true: Values) -> float:
    """Returns the fraction of rows whose class is predicted."""
    return float((predicted == true).mean())


def f1(predicted: Values, true: Values, classes: int) -> float:
    """Returns F1 of the second of two classes, else the mean over all classes that are true or predicted somewhere."""
    from sklearn.metrics import f1_score

    labels = [1] if classes == 2 else None
    return float(f1_score(true.astype(int), predicted.astype(int), labels=labels, average="macro", zero_division=0.0))


def matthews(predicted: Values, true: Values) -> float:
    """Returns Matthews' correlation coefficient, R_K for more than two classes."""
    from sklearn.metrics import matthews_corrcoef

    constant = _is_constant(predicted) or _is_constant(true)
    return 0.0 if constant else float(matthews_corrcoef(true.astype(int), predicted.astype(int)))


def pearson(predicted: Values, true: Values) -> float:
    """Returns the linear correlation."""
    from scipy.stats import pearsonr

    return 0.0 if _is_constant(predicted) or _is_constant(true) else float(pearsonr(predicted, true).statistic)


def spearman(predicted: Values, true: Values) -> float:
    """Returns the rank correlation."""
    from scipy.stats import spearmanr

    return 0.0 if _is_constant(predicted) or _is_constant(true) else float(spearmanr(predicted, true).statistic)


def _is_constant(values: Values) -> bool:
    return bool((values == values[0]).all())
