"""A number for one text or a pair of texts: squared error, Pearson, Spearman. STS-B of GLUE is one.

    loss  (f(text) - y)^2

Reads the columns text, text_pair (where it is named) and label, which is a number or a text that is one. The model has
one output, as classifiers of transformers have it with num_labels = 1 and problem_type = "regression"; numbers are
learned as they stand, not scaled. Pooling is as for classes. Shapes: b examples, t tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedsb.data.grading import metrics
from fedsb.data.rows import Row, place_of
from fedsb.data.tasks.base import Batch, Example, Scored, together
from fedsb.data.tasks.classification import Classification, pooled
from fedsb.utils.errors import BadRowError, UserError

if TYPE_CHECKING:
    from torch import Tensor


class Regression(Classification):
    """A number for a text, or for a pair of texts: similarity, a rating."""

    metric = "pearson"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")
    problem_type = "regression"

    @property
    def classes(self) -> list[str]:
        return []

    def labels_in(self, rows: list[Row]) -> list[Any]:
        """Returns None: a number is not a class."""
        self._numbers(rows)
        return []

    def fit_labels(self, train_rows: list[Row], test_rows: list[Row]) -> None:
        """One output, of the label's name. Raises UserError where a label is no number, or all of a table's are one."""
        for name, rows in (("training", train_rows), ("test", test_rows)):
            numbers = self._numbers(rows)
            if rows and min(numbers) == max(numbers):
                raise UserError(
                    f"every {name} row has the label {numbers[0]:g} in the column {self.options.label!r}: there is "
                    "nothing to learn from or to correlate with"
                )
        self.label_names = [self.options.label]

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Squared error (b,) of outputs (b, 1) or (b, t, 1), and ones (b,)."""
        loss_b = (pooled(logits, batch)[:, 0] - batch["labels"].float()) ** 2
        return loss_b, loss_b.new_ones(loss_b.shape)

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The output (b,), and the label (b,)."""
        return pooled(logits, batch)[:, 0], batch["labels"].float()

    def measure(self, scored: Scored) -> dict[str, float]:
        """Both correlations, the metric first."""
        predicted, true = together(scored)
        found = {"pearson": metrics.pearson(predicted, true), "spearman": metrics.spearman(predicted, true)}
        return {self.metric: found[self.metric]} | found

    def confusion(self, scored: Scored) -> list[list[int]] | None:
        """Returns None: a number is not a class."""
        return None

    def best_guess(self, examples_test: list[Example]) -> float | None:
        """Returns None: one number for all rows correlates with nothing."""
        return None

    def baseline(self, examples_train: list[Example], examples_test: list[Example]) -> float | None:
        """None: one number for all rows correlates with nothing."""
        return None

    def _targets(self, rows: list[Row]) -> list[int] | list[float]:
        return self._numbers(rows)

    def _numbers(self, rows: list[Row]) -> list[float]:
        name = self.options.label
        found = [_number(row.get(name)) for row in rows]
        for number, (value, row) in enumerate(zip(found, rows, strict=True), start=1):
            if not math.isfinite(value):
                raise BadRowError(
                    f"{place_of(row, number)} has the label {row.get(name)!r:.60} in the column {name!r}, where a "
                    "number is needed"
                )
        return found


def _number(value: object) -> float:
    """NaN for what is none: true and false are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, np.number)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):  # OverflowError: an integer beyond the range of floats
        return math.nan
