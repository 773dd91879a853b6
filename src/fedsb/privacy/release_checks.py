"""Tests of what an audited run released: its noise, its clipping and its sampling, each compared with the plan.

An audit knows the clipped sums under each release, so it also knows the noise itself: released - sums. If the code
follows the plan, z = noise / (sigma C) is standard normal and independent over values, tensors and steps. Each test
gives a score that is then standard normal too. With many tests the limit is raised, so that correct code fails in one
of 1 / FALSE_ALARM audits.

    size          of each tensor's noise: chi-square of its sum of squares, over all steps
    mean, shape   of all noise: its mean, and its fourth moment (3 for a normal)
    tensors       the correlation of each pair of tensors of one shape: noise that layers share
    steps         the correlation of a step with the one before, and the size of each tensor's noise summed over all
                  steps: noise that steps share
    draws         how many rows were drawn, and how many of them in two consecutive steps
    clip          the length of a long gradient after clipping: over all tensors, and in each tensor alone
    again         the correlation with the noise that a second source makes for the same step: noise from a seed
    divisor       of a step with shared noise: the released mean against the sum of the shares over the expected batch

Limits: only what happens between the clipped gradients and their release is tested. Gradients that depend on other rows
are not detected.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fedsb.utils.tensors import Tensors

FALSE_ALARM = 1e-6  # the probability that an audit of correct code fails any of these tests
FEWEST = 20.0  # expected rows: with fewer, a count is not close to normal and is not tested
KINDS = ("size", "mean", "shape", "tensors", "steps", "draws", "clip", "again", "divisor")


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of one test."""

    kind: str  # of KINDS
    what: str  # a tensor's name, or what was counted
    score: float  # standard normal if the code follows the plan; 0 or, if it does not, large for a clip and a divisor


@dataclass
class _Noise:
    """Statistics of one tensor's noise, in units of its planned standard deviation."""

    total: Tensor  # (n,) over the steps
    last: Tensor  # (n,)
    steps: int = 1
    squares: float = 0.0
    with_last: float = 0.0  # sum over the steps of <z, the step before>
    last_squares: float = 0.0


class ReleaseChecks:
    """Collects the noise and the draws of a client, step by step."""

    def __init__(self, q: float) -> None:
        self.q = q
        self._noise: dict[str, _Noise] = {}
        self._pairs: dict[tuple[str, ...], Tensor] = {}  # tensors of one shape -> (L, L) inner products, all steps
        self._values, self._sum, self._fourth = 0, 0.0, 0.0
        self._steps, self._rows, self._drawn, self._again = 0, 0, 0, 0
        self._before: frozenset[int] = frozenset()
        self.clipped: dict[tuple[str, ...], dict[str, float]] = {}  # tensors of a step -> lengths after clipping
        self._with_again, self._again_squares = 0.0, 0.0
        self._divisor: float | None = None  # the largest relative error of a mean

    def record_noise(self, noise: Tensors, std: float) -> None:
        """Adds the noise of one release, float64 on the CPU, with its planned standard deviation."""
        shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for key in sorted(noise):
            z = noise[key].double().flatten() / std
            self._values += len(z)
            self._sum += float(z.sum())
            self._fourth += float(z.pow(4).sum())
            shapes[tuple(noise[key].shape)].append(key)
            if (seen := self._noise.get(key)) is None:
                self._noise[key] = _Noise(total=z, last=z, squares=float(z @ z))
            else:
                seen.with_last += float(z @ seen.last)
                seen.last_squares += float(seen.last @ seen.last)
                seen.total, seen.last = seen.total + z, z
                seen.steps, seen.squares = seen.steps + 1, seen.squares + float(z @ z)
        for keys in shapes.values():
            if len(keys) > 1:
                z_Ln = torch.stack([self._noise[key].last for key in keys])
                self._pairs[tuple(keys)] = self._pairs.get(tuple(keys), 0.0) + z_Ln @ z_Ln.T

    def record_draw(self, drawn: Sequence[int], rows: int) -> None:
        """Adds the rows that a step drew from `rows` rows."""
        now = frozenset(drawn)
        if self._steps:
            self._again += len(now & self._before)
        self._before, self._rows = now, rows
        self._steps, self._drawn = self._steps + 1, self._drawn + len(drawn)

    def record_clipped(self, layout: tuple[str, ...], lengths: Mapping[str, float]) -> None:
        """Adds the lengths, in clips, of long gradients of these tensors after clipping, by where they were long."""
        self.clipped[layout] = dict(lengths)

    def record_again(self, noise: Tensor, again: Tensor) -> None:
        """Adds the noise of one release and that of a second source for the same release, (P,) each."""
        scale = noise.double().square().mean().sqrt().clamp(min=1e-300)
        self._with_again += float((noise.double() / scale) @ again.double())
        self._again_squares += float(again.double().square().sum())

    def record_mean(self, mean: Tensor, wanted: Tensor) -> None:
        """Adds the mean that was released of a step, and what it should be by the plan."""
        error = float((mean - wanted).norm() / wanted.norm().clamp(min=1e-300))
        self._divisor = max(self._divisor or 0.0, error)

    def scores(self, slack: float) -> list[Score]:
        """Returns the results of all tests. A clipped gradient may exceed the clip by the relative `slack`."""
        return [
            *self._sizes(),
            *self._all_noise(),
            *self._shared(),
            *self._draws(),
            *self._clips(slack),
            *self._others(),
        ]

    def _sizes(self) -> Iterable[Score]:
        for key, noise in self._noise.items():
            yield Score(kind="size", what=key, score=_chi_square(noise.squares, noise.steps * len(noise.last)))

    def _all_noise(self) -> Iterable[Score]:
        n, squares = self._values, sum(noise.squares for noise in self._noise.values())
        if n:
            yield Score(kind="mean", what="all noise", score=self._sum / math.sqrt(n))
        if squares:
            excess = n * self._fourth / squares**2 - 3
            yield Score(kind="shape", what="all noise", score=excess / math.sqrt(24 / n))

    def _shared(self) -> Iterable[Score]:
        for keys, products in self._pairs.items():
            own = products.diagonal().clamp(min=1e-300)
            score_LL = products / own.sqrt()[:, None]  # normal, whatever the first of the two is
            for i, first in enumerate(keys):
                for j in range(i + 1, len(keys)):
                    yield Score(kind="tensors", what=f"{first}, {keys[j]}", score=float(score_LL[i, j]))
        for key, noise in self._noise.items():
            if noise.steps > 1:
                score = noise.with_last / math.sqrt(max(noise.last_squares, 1e-300))
                yield Score(kind="steps", what=f"{key}, one after another", score=score)
                size = float(noise.total @ noise.total) / noise.steps
                yield Score(kind="steps", what=f"{key}, summed", score=_chi_square(size, len(noise.total)))

    def _draws(self) -> Iterable[Score]:
        q, n, steps = self.q, self._rows, self._steps
        if (expected := n * steps * q) >= FEWEST and q < 1:
            yield Score(kind="draws", what="rows drawn", score=(self._drawn - expected) / math.sqrt(expected * (1 - q)))
        if (expected := n * (steps - 1) * q**2) >= FEWEST and q < 1:
            variance = expected * (1 - q**2) + 2 * n * (steps - 2) * (q**3 - q**4)
            yield Score(kind="draws", what="rows drawn again", score=(self._again - expected) / math.sqrt(variance))

    def _clips(self, slack: float) -> Iterable[Score]:
        for what, length in [pair for lengths in self.clipped.values() for pair in lengths.items()]:
            yield Score(kind="clip", what=what, score=0.0 if length <= 1 + slack else 1000 * length)

    def _others(self) -> Iterable[Score]:
        if self._again_squares:
            yield Score(kind="again", what="all noise", score=self._with_again / math.sqrt(self._again_squares))
        if self._divisor is not None:
            yield Score(
                kind="divisor", what="the worst step", score=0.0 if self._divisor < 1e-5 else 1e4 * self._divisor
            )


def limit(tests: int) -> float:
    """Returns the absolute score above which one of `tests` tests fails."""
    return -NormalDist().inv_cdf(FALSE_ALARM / (2 * max(tests, 1)))


def failed(scores: Sequence[Score]) -> list[Score]:
    """Returns the worst failed test of each kind."""
    most = limit(len(scores))
    worst = (max((s for s in scores if s.kind == kind), key=lambda s: abs(s.score), default=None) for kind in KINDS)
    return [score for score in worst if score is not None and not abs(score.score) <= most]


def _chi_square(squares: float, values: int) -> float:
    """Returns a normal score for a sum of squares of `values` standard normals (Wilson and Hilferty, PNAS 1931)."""
    spread = 2 / (9 * values)
    return (math.cbrt(squares / values) - (1 - spread)) / math.sqrt(spread)
