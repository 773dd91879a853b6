"""The mechanism between a client's rows and all that leaves the client: its plan, its ledger and its noise.

    mean = (sum of clipped gradients + N(0, (sigma C)^2)) / expected batch          a step of DP-SGD
    share = sum of clipped gradients + a share of the noise, in whole numbers       the same with shared noise (grid.py)

A round is charged to the ledger, on disk, before any of its rows or its noise is drawn. A mechanism refuses to draw
what was not charged, and to release a sum that is longer than its rows and their clip allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedsb.adapters.layout import Layout
from fedsb.privacy.accounting import Release, covered, epsilon
from fedsb.privacy.discrete import discrete_gaussian
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.noise import Noise
from fedsb.privacy.plan import PrivacyPlan
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.tensors import to_device

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
    """A client's own limit, whatever a plan says: epsilon at its own delta, including its other runs.

    `alone`: only the client's own share of the noise counts, as if all others colluded.
    """

    epsilon: float
    delta: float
    before: tuple[Release, ...]
    alone: bool = True

    def total(self, releases: Iterable[Release]) -> float:
        """Returns epsilon of a run's releases together with those of all earlier runs."""
        return epsilon([*self.before, *releases], self.delta, alone=self.alone)


@dataclass(frozen=True, kw_only=True)
class DPMechanism:
    """One client's mechanism: it charges the ledger, samples rows and adds noise."""

    plan: PrivacyPlan
    ledger: Ledger
    noise: Noise
    caps: Sequence[Cap] = ()
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
        self._charge(self.plan.training(self.plan.steps), self.plan.clip, round)

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

    def basis_sum(self, total: Tensor, rows: int, layout: Layout) -> Tensor:
        """Returns the clipped sum (P,) of a basis over `rows` rows with noise; `layout` names its tensors.

        Raises UnsafeReleaseError if it was not charged, or if the sum is longer than `rows` clipped gradients can be.
        """
        assert self.plan.basis is not None
        self._take("basis")
        noised = self.add_noise(total, self.plan.basis.sigma * self.plan.basis.clip)
        refuse_long(total, rows, self.plan.basis.clip)
        return noised

    def mean(self, total: Tensor, rows: int, layout: Layout) -> Tensor:
        """Returns the clipped sum (P,) of one step over `rows` rows as a noised mean, float32.

        The divisor is public: it is the expected batch. Raises as `basis_sum` does.
        """
        self._take("training")
        noised = self.add_noise(total, self.plan.noise_std)  # drawn on the host while the device computes the total
        refuse_long(total, rows, self.plan.clip)
        return noised / self.plan.batch

    def share(self, total: Tensor, rows: int, layout: Layout, grid: NoiseGrid) -> Tensor:  # (P,) int64, in steps
        """Returns the sum of one step over `rows` rounded rows with this client's share of the noise, on the CPU.

        Raises as `basis_sum` does.
        """
        self._take("training")
        noise = discrete_gaussian(self.noise, grid.sigma, total.numel()) if grid.sigma else 0
        refuse_long(total, rows, grid.clip / grid.gamma)
        return total.cpu() + torch.as_tensor(noise)

    def generator(self) -> torch.Generator:
        """Returns a generator for the rounding of a step's rows."""
        return torch.Generator().manual_seed(int(self.noise.uniform(1)[0] * 2**53))

    def noised_update(self, update: Tensor) -> Tensor:
        """Returns one client's update (P,) with the noise of the sum of all clients' changes.

        Raises UnsafeReleaseError if the round was not charged.
        """
        self._take("training")
        return self.add_noise(update, self.plan.noise_std)

    def require_charged(self, what: What) -> None:
        """Raises UnsafeReleaseError if no noised sum of this kind is charged and still to be made."""
        if not self._charged.get(what):
            raise UnsafeReleaseError(
                f"{self.ledger.client}: the ledger has no line for a {what} sum that is about to be made. Nothing was "
                "released. This is a bug in fedsb. Please report it."
            )

    def add_noise(self, total: Tensor, std: float) -> Tensor:
        """Returns total + N(0, std^2), added in float64 and rounded to float32, on the tensor's device."""
        noise = torch.from_numpy(self.noise.normal(tuple(total.shape))) * std
        if total.device.type == "mps":  # which has no float64
            return (total.detach().cpu().double() + noise).float().to(total.device)
        return (total.detach().double() + to_device(noise, total.device)).float()

    def _charge(self, release: Release, clip: float, round: int) -> None:
        self._refuse_overspending([*self.ledger.releases(), release], round)
        self.ledger.charge(release, round=round, clip=clip)
        self._charged["basis" if release.what == "basis" else "training"] = release.count

    def _refuse_overspending(self, after: Sequence[Release], round: int) -> None:
        """Raises PrivacyBudgetExceededError if the ledger would be `after` a charge, and exceed the plan or a cap.

        Releases are composed only if the plan does not cover them, as after a repeated round.
        """
        planned = covered(after, self.plan.releases())
        if not planned and (spent := epsilon(after, self.plan.delta)) > (most := self.plan.epsilon()) * (1 + ROUNDING):
            raise PrivacyBudgetExceededError(
                f"{self.ledger.client}: round {round} would raise epsilon to {spent:.4g}, but the plan allows "
                f"{most:.4g} (delta {self.plan.delta:g}). Rounds repeated after a crash are charged again."
            )
        for cap in self.caps if not (planned and self._plan_is_below_caps) else ():
            if (total := cap.total(after)) > cap.epsilon * (1 + ROUNDING):
                raise PrivacyBudgetExceededError(
                    f"{self.ledger.client}: round {round} would raise epsilon of all runs together to {total:.4g} at a "
                    f"delta of {cap.delta:g}. This site allows {cap.epsilon:g}."
                )

    @cached_property
    def _plan_is_below_caps(self) -> bool:
        """Returns whether the caps allow the whole plan after all earlier runs. The releases are composed once."""
        return all(cap.total(self.plan.releases()) <= cap.epsilon for cap in self.caps)

    def _take(self, what: What) -> None:
        self.require_charged(what)
        self._charged[what] -= 1


def refuse_long(total: Tensor, rows: int, clip: float) -> None:
    """Raises UnsafeReleaseError if the sum is longer than `rows` gradients of length `clip` can be together."""
    if not total.is_floating_point():
        total = total.cpu().double()
    length = float(torch.linalg.vector_norm(total.detach(), dtype=torch.float64))
    if not length <= rows * clip * (1 + SLACK):  # NaN is refused too
        raise UnsafeReleaseError(
            f"the sum of {rows} clipped gradients is longer than {rows} x {clip:g}, so its noise would not cover it. "
            "Nothing was released. This is a bug in fedsb or in the model's implementation. Please report it."
        )


def clip_change(sent: Tensor, baseline: Tensor, clip: float) -> Tensor:  # (P,) each
    """Returns a client's bounded update: baseline + d min(1, clip / ||d||), with d = sent - baseline.

    d = 0 where its norm is NaN or infinite: a client that drops out for that would reveal something of its rows. Raises
    UserError if float32, in which the update travels, is too coarse for a change of this length. That depends on
    `baseline` alone.
    """
    length = float(torch.linalg.vector_norm(baseline, dtype=torch.float64))
    if (rounding := FLOAT32_ROUNDING * (length + clip)) > SLACK * clip:
        raise UserError(
            f"privacy.clip_norm = {clip:g} is too small: the tensors that a client sends have length {length:.3g}, and "
            f"float32 rounds them by up to {rounding:.2g}. Set it to at least "
            f"{FLOAT32_ROUNDING / SLACK * length * 1.01:.2g}."
        )
    change = sent.double() - baseline.double()
    norm = torch.linalg.vector_norm(change)
    if not norm.isfinite():
        return baseline.float()
    factor = min(1.0, clip / float(norm)) if norm > 0 else 1.0
    return (baseline.double() + factor * change).float()
