"""The mechanism between a client's rows and all that leaves the client: its plan, its ledger and its noise.

    mean = (sum of clipped gradients + N(0, (sigma C)^2)) / expected batch          a step of DP-SGD

A round is charged to the ledger, on disk, before any of its rows or its noise is drawn. A mechanism refuses to draw
what was not charged, and to release a sum that is longer than its rows and their clip allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.noise import Noise
from fedsb.privacy.plan import PrivacyPlan
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.tensors import Tensors

ROUNDING = 1e-6  # relative difference between compositions of the same releases in different orders
FLOAT32_ROUNDING = 2.0**-24  # relative, per value
SLACK = 1e-3  # relative: a sum of clipped gradients may exceed rows x clip by its rounding in float32

What = Literal["training", "basis"]


class UnsafeReleaseError(RunError):
    """Raised in place of a release that the ledger or its noise would not cover."""


class PrivacyBudgetExceededError(RunError):
    """Raised if the next round would exceed the privacy budget. The completed rounds are the result of the run."""

    may_leave = True


@dataclass(frozen=True, kw_only=True)
class Cap:
    """A client's own limit, whatever a plan says: epsilon at its own delta, including its other runs."""

    epsilon: float
    delta: float
    before: tuple[Release, ...]

    def total(self, releases: Iterable[Release]) -> float:
        """Returns epsilon of a run's releases together with those of all earlier runs."""
        return epsilon([*self.before, *releases], self.delta)


@dataclass(frozen=True, kw_only=True)
class DPMechanism:
    """One client's mechanism: it charges the ledger, samples rows and adds noise."""

    plan: PrivacyPlan
    ledger: Ledger
    noise: Noise
    cap: Cap | None = None
    _charged: dict[What, int] = field(default_factory=dict, init=False, repr=False)  # charged and not yet made

    @property
    def rows(self) -> int:
        """The number of rows that a step samples from."""
        return self.plan.rows

    @property
    def basis_rows(self) -> float:
        """The expected number of rows that a basis reads. It is public, unlike the rows themselves."""
        assert self.plan.basis is not None
        return self.plan.basis.q * self.plan.rows

    def charge(self, round: int) -> None:
        """Charges all steps of a round before any of them. Raises PrivacyBudgetExceededError if they would exceed the
        budget."""
        self._charge(Release(q=self.plan.q, sigma=self.plan.sigma, count=self.plan.steps), self.plan.clip, round)

    def draw(self) -> list[int]:
        """Returns the rows sampled in this step, each independently with probability q; possibly none."""
        self.require_charged("training")
        return self.noise.poisson_sample(self.rows, self.plan.q)

    def charge_basis(self, round: int) -> list[int]:
        """Charges a basis, and returns the rows that it reads."""
        basis = self.plan.basis
        assert basis is not None
        self._charge(Release(q=basis.q, sigma=basis.sigma, what="basis"), basis.clip, round)
        return self.noise.poisson_sample(self.plan.rows, basis.q)

    def basis_sum(self, sums: Tensors, rows: int) -> Tensors:
        """Returns the clipped sums of a basis over `rows` rows with noise.

        Raises UnsafeReleaseError if it was not charged, or if the sums are longer than `rows` clipped gradients allow.
        """
        assert self.plan.basis is not None
        self._take("basis")
        _refuse_long(sums, rows, self.plan.basis.clip)
        std = self.plan.basis.sigma * self.plan.basis.clip
        return {key: self.add_noise(sums[key], std) for key in sorted(sums)}

    def mean(self, sums: Tensors, rows: int) -> Tensors:
        """Returns the clipped sums of one step over `rows` rows as a noised mean, float32.

        The divisor is public: it is the expected batch. Raises as `basis_sum` does.
        """
        self._take("training")
        _refuse_long(sums, rows, self.plan.clip)
        return {key: self.add_noise(sums[key], self.plan.noise_std) / self.plan.batch for key in sorted(sums)}

    def noised_update(self, tensors: Tensors) -> Tensors:
        """Returns one client's update with the noise for the sum of all clients' changes.

        Raises UnsafeReleaseError if the round was not charged.
        """
        self._take("training")
        return {key: self.add_noise(tensors[key], self.plan.noise_std) for key in sorted(tensors)}

    def require_charged(self, what: What) -> None:
        """Raises UnsafeReleaseError if no noised sum of this kind is charged and still to be made."""
        if not self._charged.get(what):
            raise UnsafeReleaseError(
                f"{self.ledger.client}: the ledger has no line for a {what} sum that is about to be made. Nothing was "
                "released. This is a bug in fedsb. Please report it."
            )

    def add_noise(self, total: torch.Tensor, std: float) -> torch.Tensor:
        """Returns total + N(0, std^2), added in float64 and rounded to float32, on the tensor's device."""
        noise = torch.from_numpy(self.noise.normal(tuple(total.shape))) * std
        return (total.detach().cpu().double() + noise).float().to(total.device)

    def _charge(self, release: Release, clip: float, round: int) -> None:
        planned = self.plan.epsilon()
        after = epsilon([*self.ledger.releases(), release], self.plan.delta)
        if after > planned * (1 + ROUNDING):
            raise PrivacyBudgetExceededError(
                f"{self.ledger.client}: round {round} would raise epsilon to {after:.4g}, but the plan allows "
                f"{planned:.4g} (delta {self.plan.delta:g}). Rounds repeated after a crash are charged again."
            )
        if (cap := self.cap) is not None:
            total = cap.total([*self.ledger.releases(), release])
            if total > cap.epsilon * (1 + ROUNDING):
                raise PrivacyBudgetExceededError(
                    f"{self.ledger.client}: round {round} would raise epsilon of all runs together to {total:.4g} at a "
                    f"delta of {cap.delta:g}. This site allows {cap.epsilon:g}."
                )
        self.ledger.charge(release, round=round, clip=clip)
        self._charged["basis" if release.what == "basis" else "training"] = release.count

    def _take(self, what: What) -> None:
        self.require_charged(what)
        self._charged[what] -= 1


def _refuse_long(sums: Tensors, rows: int, clip: float) -> None:
    """Raises UnsafeReleaseError if the sums are longer than `rows` gradients of length `clip` together."""
    squares = sum(float(torch.linalg.vector_norm(x.detach().cpu(), dtype=torch.float64)) ** 2 for x in sums.values())
    if not math.sqrt(squares) <= rows * clip * (1 + SLACK):  # NaN is refused too
        raise UnsafeReleaseError(
            f"the sum of {rows} clipped gradients is longer than {rows} x {clip:g}, so its noise would not cover it. "
            "Nothing was released. This is a bug in fedsb or in the model's implementation. Please report it."
        )


def clipped_change(sent: Tensors, baseline: Tensors, clip: float) -> Tensors:
    """Returns baseline + d min(1, clip / ||d||), where d = sent - baseline over all tensors together.

    d counts as 0 if its norm is NaN or infinite: a client that dropped out for that reason would leak information about
    its rows. Raises UserError if float32, in which the update is sent, is too coarse for a change of this length. That
    depends on `baseline` alone.
    """
    length = math.sqrt(sum(float(x.double().square().sum()) for x in baseline.values()))
    if (rounding := FLOAT32_ROUNDING * (length + clip)) > SLACK * clip:
        raise UserError(
            f"privacy.clip = {clip:g} is too small: the tensors that a client sends have length {length:.3g}, and "
            f"float32 rounds them by up to {rounding:.2g}. Set it to at least "
            f"{FLOAT32_ROUNDING / SLACK * length * 1.01:.2g}."
        )
    change = {key: x.double() - baseline[key].double() for key, x in sent.items()}
    norm = torch.stack([d.square().sum() for d in change.values()]).sum().sqrt()
    if not norm.isfinite():
        return {key: x.float() for key, x in baseline.items()}
    factor = min(1.0, clip / float(norm)) if norm > 0 else 1.0
    return {key: (baseline[key].double() + factor * d).float() for key, d in change.items()}
