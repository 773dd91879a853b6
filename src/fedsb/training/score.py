"""Scores of a model on some rows, and their mean over clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over some examples, or over several clients' own models: their mean.

    `extra_metrics` are other figures of the same examples, by name. Floats are metrics; ints count faulty answers.
    """

    value: float
    count: int
    extra_metrics: Mapping[str, float] = field(default_factory=dict)
    by_client: Mapping[str, float] = field(default_factory=dict)
    confusion: list[list[int]] | None = None  # rows of each true class by predicted class; of one model, with classes


def mean_of(scores: Mapping[str, Score]) -> Score:
    """Returns the mean of clients' scores on the same rows, and of their extra metrics. Counts are summed."""
    one, *_ = scores.values()
    extra = {name: [score.extra_metrics[name] for score in scores.values()] for name in one.extra_metrics}
    return Score(
        value=sum(score.value for score in scores.values()) / len(scores),
        count=one.count,
        extra_metrics={k: sum(v) if isinstance(v[0], int) else sum(v) / len(v) for k, v in extra.items()},
        by_client={name: score.value for name, score in scores.items()},
    )
