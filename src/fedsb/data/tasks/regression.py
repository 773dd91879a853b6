"""A number for one text or a pair of texts: squared error, Pearson, Spearman. One example is STS-B of GLUE.

    loss  (f(text) - y)^2

Reads the columns text, text_pair (if it is configured) and label, which is a number or its text. The model has one
output, as classifiers of transformers have it with num_labels = 1 and problem_type = "regression". Numbers are learned
as they are, not scaled. Pooling works as for classes. Shapes: b examples, t tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedsb.data.grading import metrics
from fedsb.data.rows import Row, place_of
from fedsb.data.tasks.base import Batch, Example, Scored, join_scores
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
        """Returns an empty list, because a number is not a class. Raises UserError if a label is not a number."""
        self._numbers(rows)
        return []

    def fit_labels(self, train_rows: list[Row], test_rows: list[Row]) -> None:
        """Sets one output with the label's name. Raises UserError for a label that is not a number, or equal labels."""
        for name, rows in (("training", train_rows), ("test", test_rows)):
            numbers = self._numbers(rows)
            if rows and min(numbers) == max(numbers):
                raise UserError(
                    f"Every {name} row has the label {numbers[0]:g} in the column {self.options.label!r}, so there is "
                    "nothing to learn or to correlate with. Check task.label."
                )
        self.label_names = [self.options.label]

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (the squared error (b,) of outputs (b, 1) or (b, t, 1), ones (b,))."""
        loss_b = (pooled(logits, batch)[:, 0] - batch["labels"].float()) ** 2
        return loss_b, loss_b.new_ones(loss_b.shape)

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (the output (b,), the label (b,))."""
        return pooled(logits, batch)[:, 0], batch["labels"].float()

    def measure(self, scored: Scored) -> dict[str, float]:
        """Returns both correlations, the task's metric first."""
        predicted, true = join_scores(scored)
        found = {"pearson": metrics.pearson(predicted, true), "spearman": metrics.spearman(predicted, true)}
        return {self.metric: found[self.metric]} | found

    def confusion(self, scored: Scored) -> list[list[int]] | None:
        """Returns None, because a number is not a class."""
        return None

    def best_guess(self, examples_test: list[Example]) -> float | None:
        """Returns None, because a constant prediction has no correlation."""
        return None

    def baseline(self, examples_train: list[Example], examples_test: list[Example]) -> float | None:
        """Returns None, because a constant prediction has no correlation."""
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
                    "number is expected. Correct it, or remove the row."
                )
        return found


def _number(value: object) -> float:
    """Returns a number; NaN for anything else, including true and false."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, np.number)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):  # OverflowError: an integer beyond the range of floats
        return math.nan
