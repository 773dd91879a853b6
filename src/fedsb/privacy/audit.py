"""An audit in one run: what a private run releases, held against the epsilon that it states.

m canaries are planted among a client's rows, each with probability 1/2 by a secret coin. Who has seen all that is
released guesses for some of them whether they are in; v of r guesses are right. Under (epsilon, delta)-DP a coin stays
so uncertain to them that v is little more than binomial, whatever was guessed (Steinke, Nasr, Jagielski, "Privacy
Auditing with One (1) Training Run", NeurIPS 2023, arXiv 2305.08846, the theorem for approximate DP):

    Pr[V >= v]  <=  Pr[W >= v] + 2 m delta max_{i > 0} Pr[v - i <= W < v] / i      W ~ Binomial(r, 1 / (1 + e^-epsilon))

An epsilon for which the right side is below 5 % is refuted: the true one is above it, with 95 % confidence. r is not
known beforehand: a few splits are tried and share the 5 % among them.

A canary is a gradient, not a row: a random unit direction u_i over all trained tensors, 10 clips long, so that the real
clipping has to cut it. In each step the mechanism draws it like a row; what is clipped goes to the sum, then comes the
noise. Differential privacy lets an attacker know every other row and which of them a step drew, so that their sums are
taken off what is released:

    score_i = sum over the steps of < u_i, noised sum - sum of the rows' clipped gradients >

Scores are linear in what was released: only its sum over the steps is kept. Directions are made from a key whenever
they are needed, a chunk at a time. With d trained values, m canaries and s steps an audit takes m d normals at its end
and about s q m d / 2 on the way, some 15 ns each on one core; memory is a few times d and the chunk.

The noise itself, the draws and the clip are tested too (release_checks.py): those tests see much smaller faults.

Limits: a lower bound far below the stated epsilon proves nothing. At a delta of 1e-5 none is above 6.4, whatever m, and
a canary that no step draws cannot be told from one that is out (`ceiling`). Canaries take no part in a noised basis.
Which rows a step makes of the draw, and how a row's gradient comes about, is before the canaries and not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.noise import Noise
from fedsb.privacy.release_checks import ReleaseChecks
from fedsb.training.per_example import add_clipped
from fedsb.utils.rng import Key, keyed_generator
from fedsb.utils.tensors import Tensors

ERROR = 0.05  # the chance that a bound is above the true epsilon
SHARES = (2, 8, 32)  # "in" is guessed for the highest m/2, m/8 or m/32; "out" for as many of the lowest, or none
LENGTH = 10.0  # of a canary, in clips
CHUNK = 1 << 22  # values of the directions made at once
HIGHEST = 40.0  # no bound is above it: beside 1, e^-40 is 0 in float64


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound of epsilon, and the guesses that it follows from."""

    epsilon: float
    guessed_in: int
    guessed_out: int
    correct: int  # v, of r = guessed_in + guessed_out

    @property
    def guesses(self) -> int:
        return self.guessed_in + self.guessed_out


def p_value(epsilon: float, delta: float, *, canaries: int, guesses: int, correct: int) -> float:
    """How probable so many correct guesses are at most, if the mechanism is (epsilon, delta)-DP."""
    pmf = _binomial(guesses, epsilon)
    below = np.cumsum(pmf[:correct][::-1]) / np.arange(1, correct + 1)  # Pr[v - i <= W < v] / i for i = 1, 2, ..., v
    slack = 2 * canaries * delta * float(below.max(initial=0.0))
    return min(1.0, float(pmf[correct:].sum()) + slack)


@lru_cache(maxsize=4096)
def lower_bound(delta: float, *, canaries: int, guesses: int, correct: int, error: float = ERROR) -> float:
    """The largest epsilon that v of r correct guesses refute, to 1e-6; 0 where they refute none."""

    def refuted(epsilon: float) -> bool:
        return p_value(epsilon, delta, canaries=canaries, guesses=guesses, correct=correct) < error

    low, high = 0.0, HIGHEST  # which nothing refutes
    if not refuted(low):
        return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def best_bound(scores: NDArray[np.float64], inside: NDArray[np.bool_], delta: float, error: float = ERROR) -> Bound:
    """The best bound of all splits, with scores (m,) and coins (m,): each is held against its part of the error."""
    m = len(scores)
    order = np.argsort(-scores, kind="stable")
    splits = [(m // share, out) for share in SHARES for out in (m // share, 0)]
    bounds = []
    for high, low in splits:
        correct = int(inside[order[:high]].sum()) + int((~inside[order[m - low :]]).sum())
        epsilon = lower_bound(delta, canaries=m, guesses=high + low, correct=correct, error=error / len(splits))
        bounds.append(Bound(epsilon=epsilon, guessed_in=high, guessed_out=low, correct=correct))
    return max(bounds, key=lambda bound: bound.epsilon)


def ceiling(canaries: int, delta: float, q: float = 1.0, steps: int = 1) -> float:
    """Returns the epsilon that so many canaries can be expected to show at most, if there is no noise at all.

    Who is drawn in any of the steps, each with probability q, is then known. The rest look like canaries that are out.
    """
    drawn = round(canaries / 2 * (1 - (1 - q) ** steps))
    inside = (canaries / 2 - drawn) / (canaries - drawn)  # the share of canaries that are in, among those not drawn
    splits = [(canaries // share, out) for share in SHARES for out in (canaries // share, 0)]
    best = 0.0
    for high, low in splits:
        correct = min(high, drawn) + max(high - drawn, 0) * inside + low * (1 - inside)
        best = max(
            best,
            lower_bound(
                delta, canaries=canaries, guesses=high + low, correct=round(correct), error=ERROR / len(splits)
            ),
        )
    return best


Layout = tuple[tuple[str, tuple[int, ...]], ...]  # the tensors that a step trains, and their shapes


class Canaries:
    """A client's canaries: who takes part, their directions, and what was released with them, summed over the steps."""

    def __init__(self, count: int, noise: Noise, *key: Key) -> None:
        self.count = count
        self.inside = noise.poisson_sample(count, 0.5)  # by secret coins; the directions are no secret
        self.key = key
        self.drawn: list[int] = []  # by this step, numbered among those inside
        self.seen: dict[Layout, Tensor] = {}  # each (d,) float64; more than one where rounds train other tensors

    @property
    def taking_part(self) -> NDArray[np.bool_]:
        """(m,)"""
        return np.isin(np.arange(self.count), self.inside)

    def add(self, sums: Tensors, clip: float) -> Tensors:
        """A client's sums with the clipped gradients of the canaries that this step has drawn."""
        with_K = {key: sums[key].clone()[None] for key in sorted(sums)}
        size = sum(x.numel() for x in with_K.values())
        for _, u_bd in self._directions([self.inside[i] for i in self.drawn], size):
            g_bd = (LENGTH * clip * u_bd).to(with_K[min(with_K)].device)
            parts = torch.split(g_bd, [x.numel() for x in with_K.values()], dim=1)
            gradients = {key: g.reshape(-1, *sums[key].shape) for key, g in zip(with_K, parts, strict=True)}
            add_clipped(with_K, gradients, torch.zeros(len(g_bd), dtype=torch.long, device=g_bd.device), clip)
        return {key: x[0] for key, x in with_K.items()}

    def clipped_lengths(self, like: Tensors, clip: float) -> dict[str, float]:
        """Returns the lengths, in clips, of long gradients after clipping: of one over all tensors, and of one in each
        tensor alone."""
        found: dict[str, float] = {}
        for only in (None, *sorted(like)):
            g = {
                key: (torch.ones_like(x) if only in (None, key) else torch.zeros_like(x))[None]
                for key, x in like.items()
            }
            size = math.sqrt(sum(float(x.sum()) for x in g.values()))
            g = {key: x * (LENGTH * clip / size) for key, x in g.items()}
            sums = {key: torch.zeros_like(x)[None] for key, x in like.items()}
            add_clipped(sums, g, torch.zeros(1, dtype=torch.long, device=next(iter(g.values())).device), clip)
            total = sum(float(x.double().square().sum()) for x in sums.values())
            found[only or "all tensors together"] = math.sqrt(total) / clip
        return found

    def see(self, released: Tensors) -> None:
        """One step's noised sum, less what an attacker knows of it."""
        layout = tuple((key, tuple(released[key].shape)) for key in sorted(released))
        flat = torch.cat([released[key].flatten() for key in sorted(released)])
        self.seen[layout] = self.seen.get(layout, torch.zeros_like(flat)) + flat

    def scores(self) -> NDArray[np.float64]:
        """(m,): higher where a canary more likely took part."""
        scores = np.zeros(self.count)
        for seen in self.seen.values():
            for which, u_bd in self._directions(range(self.count), len(seen)):
                scores[which] += (u_bd @ seen.float()).double().numpy()
        return scores

    def _directions(self, which: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        """(canaries, their unit directions (b, d)), a chunk at a time."""
        step = max(1, CHUNK // size)
        for start in range(0, len(which), step):
            part = which[start : start + step]
            drawn = [keyed_generator(*self.key, "canary", i).standard_normal(size, np.float32) for i in part]
            u_bd = torch.from_numpy(np.stack(drawn))
            yield part, u_bd / torch.linalg.vector_norm(u_bd, dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class AuditedGuard(DPMechanism):
    """A client's mechanism with canaries among the rows: drawn by its draw, clipped as rows are, under its noise."""

    canaries: Canaries
    checks: ReleaseChecks

    @property
    def rows(self) -> int:
        """The client's own, and behind them the canaries that take part."""
        return self.plan.rows + len(self.canaries.inside)

    def draw(self) -> list[int]:
        drawn = super().draw()
        self.checks.see_draw(drawn, self.rows)
        self.canaries.drawn = [i - self.plan.rows for i in drawn if i >= self.plan.rows]
        return [i for i in drawn if i < self.plan.rows]

    def mean(self, sums: Tensors, rows: int) -> Tensors:
        with_canaries = self.canaries.add(sums, self.plan.clip)
        if (layout := tuple(sorted(sums))) not in self.checks.clipped:  # once for the tensors of a round
            self.checks.see_clipped(layout, self.canaries.clipped_lengths(sums, self.plan.clip))
        mean = super().mean(with_canaries, rows + len(self.canaries.drawn))
        released = {key: x.cpu().double() * self.plan.batch for key, x in mean.items()}
        self.canaries.see({key: x - sums[key].cpu() for key, x in released.items()})
        self.checks.see_noise({key: x - with_canaries[key].cpu() for key, x in released.items()}, self.plan.noise_std)
        return mean

    def basis_sum(self, sums: Tensors, rows: int) -> Tensors:
        noised, basis = super().basis_sum(sums, rows), self.plan.basis
        assert basis is not None
        noise = {f"basis, {key}": x.cpu().double() - sums[key].cpu() for key, x in noised.items()}
        self.checks.see_noise(noise, basis.sigma * basis.clip)
        return noised


def audited(mechanism: DPMechanism, canaries: Canaries) -> AuditedGuard:
    checks = ReleaseChecks(mechanism.plan.q)
    return AuditedGuard(
        plan=mechanism.plan, ledger=mechanism.ledger, noise=mechanism.noise, canaries=canaries, checks=checks
    )


def _binomial(n: int, epsilon: float) -> NDArray[np.float64]:
    """Pr[W = 0], ..., Pr[W = n] for W ~ Binomial(n, 1 / (1 + e^-epsilon))."""
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_right = -math.log1p(math.exp(-epsilon))
    log_pmf = log_factorial[n] - log_factorial - log_factorial[::-1] + k * log_right + (n - k) * (log_right - epsilon)
    pmf: NDArray[np.float64] = np.exp(log_pmf)
    return pmf
