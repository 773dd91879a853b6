"""A privacy audit in one run: the releases of a private run are compared with the epsilon that it states.

m canaries are planted among a client's rows, each with probability 1/2 by a secret coin. An attacker who has seen all
releases guesses for some of them whether they are in; v of r guesses are right. Under (epsilon, delta)-DP a coin stays
so uncertain to the attacker that v is hardly more than binomial, whatever was guessed (Steinke, Nasr, Jagielski,
"Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv 2305.08846, the theorem for approximate DP):

    Pr[V >= v]  <=  Pr[W >= v] + 2 m delta max_{i > 0} Pr[v - i <= W < v] / i      W ~ Binomial(r, 1 / (1 + e^-epsilon))

An epsilon for which the right side is below 5 % is refuted: the true one is above it, with 95 % confidence. r is not
known beforehand. A few splits are tried, and they share the 5 %.

A canary is a gradient, not a row: a random unit direction u_i over all trained tensors, 10 clips long, so that the real
clipping has to cut it. In each step the mechanism samples it like a row; its clipped gradient is added to the sum, then
comes the noise. Differential privacy lets an attacker know every other row and which of them a step sampled, so their
sums are subtracted from the release:

    score_i = sum over the steps of < u_i, noised sum - sum of the rows' clipped gradients >

Scores are linear in the releases, so only the sum of the releases over the steps is kept. Directions are generated from
a key whenever they are needed, one chunk at a time. With d trained values, m canaries and s steps an audit draws m d
normals at its end and about s q m d / 2 during training, some 15 ns each on one core. Memory is a few times d and the
chunk.

The noise itself, the sampling and the clipping are tested too (privacy/release_checks.py). Those tests detect much
smaller faults.

With shared noise all clients take part in the audit. The bound of the audited client's own share, whose noise alone
hides it from all others together, is compared with that epsilon; the noise of the whole sum and its divisor are tested
too. Every source of noise is compared with a second one of the same client: equal noise could be drawn again by others.

Limits: a lower bound far below the stated epsilon proves nothing. At a delta of 1e-5 no bound is above 6.4, whatever m,
and a canary that no step samples cannot be distinguished from one that is out (`ceiling`). Canaries take no part in a
noised basis. How a step uses the sampled rows, and how a row's gradient is computed, happens before the canaries and is
not tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom
from torch import Tensor

from fedsb.adapters.layout import Layout
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.noise import Noise
from fedsb.privacy.release_checks import ReleaseChecks
from fedsb.training.per_example import Rounding, add_clipped
from fedsb.utils.rng import Key, keyed_generator

ERROR = 0.05  # the probability that a bound is above the true epsilon
SHARES = (2, 8, 32)  # "in" is guessed for the highest m/2, m/8 or m/32 scores; "out" for as many of the lowest, or none
LENGTH = 10.0  # of a canary, in clips
CHUNK = 1 << 22  # values of the directions that are generated at once
MANY = 10**9  # rows: a bound of a sum's length that always holds
HIGHEST = 40.0  # no bound is above it: added to 1, e^-40 is 0 in float64


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
    """Returns the largest probability of `correct` or more correct guesses if the mechanism is (epsilon, delta)-DP."""
    pmf = _binomial(guesses, epsilon)
    below = np.cumsum(pmf[:correct][::-1]) / np.arange(1, correct + 1)  # Pr[v - i <= W < v] / i for i = 1, 2, ..., v
    slack = 2 * canaries * delta * float(below.max(initial=0.0))
    return min(1.0, float(pmf[correct:].sum()) + slack)


@lru_cache(maxsize=4096)
def lower_bound(delta: float, *, canaries: int, guesses: int, correct: int, error: float = ERROR) -> float:
    """Returns the largest epsilon that v of r correct guesses refute, to 1e-6; 0 if they refute none."""

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
    """Returns the best bound of all splits, with scores (m,) and coins (m,). The splits share the error equally."""
    m = len(scores)
    order = np.argsort(-scores, kind="stable")
    bounds = []
    for high, low in (splits := _splits(m)):
        correct = int(inside[order[:high]].sum()) + int((~inside[order[m - low :]]).sum())
        epsilon = lower_bound(delta, canaries=m, guesses=high + low, correct=correct, error=error / len(splits))
        bounds.append(Bound(epsilon=epsilon, guessed_in=high, guessed_out=low, correct=correct))
    return max(bounds, key=lambda bound: bound.epsilon)


def ceiling(canaries: int, delta: float, q: float = 1.0, steps: int = 1) -> float:
    """Returns the largest epsilon that an audit can be expected to show with this many canaries and no noise at all.

    The attacker then knows which canaries were sampled in any of the steps, each with probability q. The others look
    like canaries that are out.
    """
    drawn = round(canaries / 2 * (1 - (1 - q) ** steps))
    inside = (canaries / 2 - drawn) / (canaries - drawn)  # the share of canaries that are in, among those not drawn
    best = 0.0
    for high, low in (splits := _splits(canaries)):
        correct = round(min(high, drawn) + max(high - drawn, 0) * inside + low * (1 - inside))
        error = ERROR / len(splits)
        best = max(best, lower_bound(delta, canaries=canaries, guesses=high + low, correct=correct, error=error))
    return best


def _splits(canaries: int) -> list[tuple[int, int]]:
    """Returns (how many canaries are guessed to be in, how many to be out) of each split."""
    return [(canaries // share, out) for share in SHARES for out in (canaries // share, 0)]


class Canaries:
    """A client's canaries: which take part, their directions, and what was released with them over the steps."""

    def __init__(self, count: int, noise: Noise, *key: Key) -> None:
        self.count = count
        self.inside = noise.poisson_sample(count, 0.5)  # by secret coins; the directions are not secret
        self.key = key
        self.drawn: list[int] = []  # by this step, numbered among those inside
        self.released: dict[Layout, Tensor] = {}  # each (P,) float64; more than one where rounds train other tensors

    @property
    def coins(self) -> NDArray[np.bool_]:
        """True for each canary that is in, (m,)."""
        return np.isin(np.arange(self.count), self.inside)

    def add(self, total: Tensor, clip: float, rounding: Rounding | None = None) -> Tensor:
        """Returns a client's sum (P,) with the clipped gradients of the canaries that this step has drawn."""
        with_K = total.clone().unsqueeze(0)
        for _, u_bP in self._directions([self.inside[i] for i in self.drawn], len(total)):
            g_bP = (LENGTH * clip * u_bP).to(total.device)
            owner_b = torch.zeros(len(g_bP), dtype=torch.long, device=g_bP.device)
            add_clipped(with_K, g_bP, owner_b, clip, rounding)
        return with_K[0]

    def clipped_lengths(self, layout: Layout, clip: float, rounding: Rounding | None = None) -> dict[str, float]:
        """Returns the lengths after clipping of long gradients, in clips or, rounded, in steps of the grid: of one over
        all tensors, and of one in each tensor alone."""
        found: dict[str, float] = {}
        for only in (None, *layout.slices):
            g = torch.ones(layout.size) if only is None else layout.mask(frozenset({only}))
            g = (g * (LENGTH * clip / math.sqrt(float(g.sum())))).unsqueeze(0)
            sums = torch.zeros_like(g, dtype=None if rounding is None else torch.int64)
            add_clipped(sums, g, torch.zeros(1, dtype=torch.long), clip, rounding)
            found[only or "all tensors together"] = float(sums.double().norm()) / (clip if rounding is None else 1.0)
        return found

    def record(self, released: Tensor, layout: Layout) -> None:
        """Takes one step's noised sum, less what an attacker knows of it."""
        self.released[layout] = self.released.get(layout, torch.zeros_like(released)) + released

    def scores(self) -> NDArray[np.float64]:
        """Returns the scores (m,). They are higher for canaries that are more likely in."""
        scores = np.zeros(self.count)
        for released in self.released.values():
            for which, u_bP in self._directions(range(self.count), len(released)):
                scores[which] += (u_bP @ released.float()).double().numpy()
        return scores

    def _directions(self, which: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yields (canaries, their unit directions (b, d)), one chunk at a time."""
        step = max(1, CHUNK // size)
        for start in range(0, len(which), step):
            part = which[start : start + step]
            drawn = [keyed_generator(*self.key, "canary", i).standard_normal(size, np.float32) for i in part]
            u_bd = torch.from_numpy(np.stack(drawn))
            yield part, u_bd / torch.linalg.vector_norm(u_bd, dim=1, keepdim=True)


class Share(NamedTuple):
    """A client's part of one step with shared noise, (P,) in steps of the grid."""

    share: Tensor  # int64
    noise: Tensor  # float64, the part of it that is noise


@dataclass(frozen=True, kw_only=True)
class AuditedMechanism(DPMechanism):
    """A client's mechanism with canaries among the rows: sampled and clipped like rows, and covered by its noise."""

    canaries: Canaries
    checks: ReleaseChecks
    again: Noise  # a second source of this client's noise
    shares: dict[str, Share]  # by client, of this step

    @property
    def rows(self) -> int:
        """The client's own rows, followed by the canaries that are in."""
        return self.plan.rows + len(self.canaries.inside)

    def draw(self) -> list[int]:
        drawn = super().draw()
        self.checks.record_draw(drawn, self.rows)
        self.canaries.drawn = [i - self.plan.rows for i in drawn if i >= self.plan.rows]
        return [i for i in drawn if i < self.plan.rows]

    def mean(self, total: Tensor, rows: int, layout: Layout) -> Tensor:
        with_canaries = self.canaries.add(total, self.plan.clip)
        if (names := tuple(layout.slices)) not in self.checks.clipped:  # once for the tensors of a round
            self.checks.record_clipped(names, self.canaries.clipped_lengths(layout, self.plan.clip))
        mean = super().mean(with_canaries, rows + len(self.canaries.drawn), layout)
        released = mean.cpu().double() * self.plan.batch
        self.canaries.record(released - total.cpu(), layout)
        noise = released - with_canaries.cpu()
        self.checks.record_noise(layout.views(noise), self.plan.noise_std)
        repeated = DPMechanism.mean(self._again(), with_canaries, MANY, layout).cpu().double() * self.plan.batch
        self.checks.record_again(noise, repeated - with_canaries.cpu())
        return mean

    def share(self, total: Tensor, rows: int, layout: Layout, grid: NoiseGrid) -> Tensor:
        total, rounding = total.cpu(), partial(grid.round_rows, generator=self.generator())
        with_canaries = self.canaries.add(total, self.plan.clip, rounding)
        if (names := tuple(layout.slices)) not in self.checks.clipped:
            lengths = self.canaries.clipped_lengths(layout, self.plan.clip, rounding)
            steps = grid.clip / grid.gamma
            self.checks.record_clipped(names, {key: length / steps for key, length in lengths.items()})
        share = super().share(with_canaries, rows + len(self.canaries.drawn), layout, grid)
        self.canaries.record((share - total).double() * grid.gamma, layout)
        noise = (share - with_canaries).double()
        self.shares[self.ledger.client] = Share(share, noise)
        self.checks.record_noise(layout.views(noise), grid.sigma)
        self.checks.record_again(
            noise, DPMechanism.share(self._again(), with_canaries, MANY, layout, grid) - with_canaries
        )
        return share

    def _again(self) -> DPMechanism:
        """Returns this mechanism with another source of noise, and charged for one step."""
        found = DPMechanism(plan=self.plan, ledger=self.ledger, noise=self.again)
        found._charged["training"] = 1
        return found

    def basis_sum(self, total: Tensor, rows: int, layout: Layout) -> Tensor:
        noised, basis = super().basis_sum(total, rows, layout), self.plan.basis
        assert basis is not None
        noise = layout.views(noised.cpu().double() - total.cpu())
        self.checks.record_noise({f"basis, {key}": x for key, x in noise.items()}, basis.sigma * basis.clip)
        return noised


@dataclass(frozen=True, kw_only=True)
class ObservedMechanism(DPMechanism):
    """The mechanism of another client in an audit of shared noise."""

    shares: dict[str, Share]

    def share(self, total: Tensor, rows: int, layout: Layout, grid: NoiseGrid) -> Tensor:
        share = super().share(total, rows, layout, grid)
        self.shares[self.ledger.client] = Share(share, (share - total.cpu()).double())
        return share


def audited(
    mechanism: DPMechanism, canaries: Canaries, again: Noise, shares: dict[str, Share] | None = None
) -> AuditedMechanism:
    """Returns the mechanism with canaries; `again` is a second source of its noise, `shares` receives its shares."""
    return AuditedMechanism(
        plan=mechanism.plan,
        ledger=mechanism.ledger,
        noise=mechanism.noise,
        canaries=canaries,
        checks=ReleaseChecks(mechanism.plan.q),
        again=again,
        shares={} if shares is None else shares,
    )


def _binomial(n: int, epsilon: float) -> NDArray[np.float64]:
    """Returns Pr[W = 0], ..., Pr[W = n] for W ~ Binomial(n, 1 / (1 + e^-epsilon))."""
    wrong = np.arange(n, -1, -1)  # counted by wrong guesses, whose probability is precise for a large epsilon
    pmf: NDArray[np.float64] = binom.pmf(wrong, n, expit(-epsilon))
    return pmf
