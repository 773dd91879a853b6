"""F1, Matthews, Pearson and Spearman: by hand, at their edges, and by SciPy where it is installed."""

import math

import numpy as np
import pytest

from fedsb.data.grading import metrics


def of(*values):
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(
    ("predicted", "true", "accuracy", "f1", "matthews"),
    [
        # TP 2, FP 1, FN 1, TN 1:  F1 = 4 / (4 + 1 + 1),  Matthews = (2 - 1) / sqrt(3 * 3 * 2 * 2)
        ((1, 1, 1, 0, 0), (1, 1, 0, 1, 0), 3 / 5, 4 / 6, 1 / 6),
        ((1, 0, 1), (1, 0, 1), 1, 1, 1),
        ((0, 1, 0), (1, 0, 1), 0, 0, -1),
        ((1, 1, 1, 1), (1, 1, 1, 0), 3 / 4, 6 / 7, 0),  # one class for all: no correlation
        ((0, 0, 0), (1, 0, 1), 1 / 3, 0, 0),
        ((0, 0), (0, 0), 1, 0, 0),  # 0 / 0, as in scikit-learn
        ((1, 1), (1, 1), 1, 1, 0),
    ],
)
def test_two_classes_by_hand(predicted, true, accuracy, f1, matthews):
    predicted, true = of(*predicted), of(*true)
    assert metrics.accuracy(predicted, true) == pytest.approx(accuracy)
    assert metrics.f1(predicted, true, 2) == pytest.approx(f1)
    assert metrics.matthews(predicted, true) == pytest.approx(matthews)


def test_three_classes_by_hand():
    """Rows 0 0 1 1 2 2 called 0 1 1 1 2 0: F1 of the classes 1/2, 4/5, 2/3; R_K (6*4 - 12) / sqrt(22 * 24)."""
    predicted, true = of(0, 1, 1, 1, 2, 0), of(0, 0, 1, 1, 2, 2)
    assert metrics.f1(predicted, true, 3) == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    assert metrics.matthews(predicted, true) == pytest.approx((6 * 4 - 12) / math.sqrt((36 - 14) * (36 - 12)))
    assert metrics.f1(of(0, 1), of(0, 1), 3) == 1  # a class that is nowhere does not count


def test_correlations_by_hand():
    """x - mean = -1 0 1, y - mean = -7 -6 13 (thirds): r = 20 / sqrt(2 * 254 / 9) / 3."""
    assert metrics.pearson(of(1, 2, 3), of(0, 1 / 3, 20 / 3)) == pytest.approx(20 / math.sqrt(2 * 254))
    assert metrics.spearman(of(1, 2, 3), of(0, 1 / 3, 20 / 3)) == pytest.approx(1)
    assert metrics.pearson(of(1, 2), of(5, 4)) == pytest.approx(-1)


def test_what_is_alike_correlates_with_nothing():
    third = of(0.1, 0.1, 0.1)  # whose mean is not 0.1 in floats
    for one, other in ((third, of(1, 2, 3)), (of(1, 2, 3), third), (third, third)):
        assert metrics.pearson(one, other) == metrics.spearman(one, other) == 0.0
    assert metrics.pearson(of(2), of(3)) == 0.0


def test_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for _ in range(20):
        x, y = draw.normal(size=50), draw.integers(0, 6, size=50) + draw.normal(size=50).round(1)
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
        called, true = draw.integers(0, 2, size=50).astype(float), draw.integers(0, 2, size=50).astype(float)
        phi = stats.pearsonr(called, true).statistic  # Matthews of two classes is Pearson of their numbers
        assert metrics.matthews(called, true) == pytest.approx(phi, rel=1e-12)
