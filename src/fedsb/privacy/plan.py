"""One client's policy, made before any work: how much noise on which sums, and what epsilon that comes to.

    sum over the drawn rows (or clients) of clip_C(g)  +  N(0, (sigma C)^2),   then divided by the expected batch

`example`: DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133), where a step
draws each row with probability q = batch / rows. `client`: DP-FedAvg with uniform weights (McMahan, Ramage, Talwar,
Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv 1710.06963), where a round sums
whole updates. Neighbours differ in one row (or client) whose place is left empty (accounting.py).

A site plans for itself, with its own rows and so its own sigma, and adds all of its own noise. A row is at one site
only, hence the federation's epsilon is that of the worst client. Not covered: a person with rows at several sites.

With `client` the noised sum is divided by the number of updates that arrived, which is public: dividing adds nothing
to epsilon, and who arrives is not covered. With m of n updates the noise on the mean is n / m times as large.

Limits: with `client` there is no amplification, q = 1: clients are drawn by a public seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedsb.privacy.accounting import RELATION, Accountant, Release, calibrate, epsilon
from fedsb.utils.errors import ConfigError, UserError

Unit = Literal["example", "client"]
DELTA = 1e-5
CLIPS = (1e-9, 1e9)  # the least and the largest clip; float32 gradients resolve no clip far beyond them
RISE = 1.1  # how much more noise training may get for a private basis's sake


@dataclass(frozen=True, kw_only=True)
class BasisNoise:
    """A basis made from private rows: a noised sum before the first round, and again every so many rounds."""

    clip: float  # L2, over a row's cores of all layers
    sigma: float = 0.0
    q: float = 1.0
    every: int | None = None  # rounds between a basis and the next

    def release(self, rounds: int) -> Release:
        """What has been released when so many rounds are done; the first basis comes before them all."""
        renewed = (rounds - 1) // self.every if self.every and rounds else 0
        return Release(q=self.q, sigma=self.sigma, count=1 + renewed, what="basis")


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What one client releases in a run. Raises ConfigError with every fault at once."""

    unit: Unit
    clip: float  # C, L2 over all trained tensors together
    delta: float
    batch: int  # expected rows in a step, by which their sum is divided; `client`: clients in a round
    rows: int  # the client's own; `client`: all clients
    steps: int  # noised sums in a round; `client`: 1
    rounds: int
    sigma: float = 0.0  # noise multiplier; 0: no noise, epsilon is inf
    basis: BasisNoise | None = None  # None: one that looks at no private row

    relation: ClassVar[str] = RELATION

    def __post_init__(self) -> None:
        if faults := list(_faults(self)):
            raise ConfigError(faults)

    @property
    def q(self) -> float:
        """The share of rows that a step draws; 1 for clients, whose draw is public."""
        return self.batch / self.rows if self.unit == "example" else 1.0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the sum, before it is divided by `batch`."""
        return self.sigma * self.clip if self.sigma else 0.0

    def releases(self, rounds: int | None = None) -> tuple[Release, ...]:
        """What has been released when so many rounds are done; default: all."""
        rounds = self.rounds if rounds is None else rounds
        basis = (self.basis.release(rounds),) if self.basis else ()
        steps = self.steps * rounds
        return (*basis, Release(q=self.q, sigma=self.sigma, count=steps)) if steps else basis

    def epsilon(self, rounds: int | None = None, accountant: Accountant = "pld") -> float:
        """When so many rounds are done; default: all."""
        return epsilon(self.releases(rounds), self.delta, accountant)

    def epsilon_by_round(self) -> tuple[float, ...]:
        """After 1, 2, ... rounds. Takes a tenth of a second or more for each."""
        return tuple(self.epsilon(rounds) for rounds in range(1, self.rounds + 1))

    def calibrate(self, target: float) -> PrivacyPlan:
        """This plan with the least sigma that keeps all rounds within epsilon = `target`; the basis stays as it is."""
        if self.basis and self.basis.sigma == 0:
            raise UserError(
                "the basis is made from private rows without noise: no sigma helps; share() plans its noise"
            )
        sigma = calibrate(target, self.delta, lambda sigma: replace(self, sigma=sigma).releases())
        return replace(self, sigma=sigma)

    def share(self, target: float, basis: float | Literal["auto"]) -> tuple[PrivacyPlan, str]:
        """This plan with sigmas for the basis and for training that together keep within epsilon = `target`, and why.

        A number in (0, 1) lets the basis alone have that share of the target. "auto" looks from the other end: training
        gets a tenth more noise than with a free basis, and the basis the least noise that then keeps within the target.
        """
        if self.basis is None:
            raise UserError("this plan's basis looks at no private row: there is nothing to share")
        if basis == "auto":
            free = replace(self, basis=None).calibrate(target).sigma
            raised = replace(self, sigma=RISE * free)
            plan = raised._with_basis(calibrate(target, self.delta, lambda sigma: raised._with_basis(sigma).releases()))
            why = f"the least that lets training's noise rise by {RISE - 1:.0%}, from {free:.3g} to {plan.sigma:.3g}"
        else:
            if not 0 < basis < 1:
                raise UserError(f"a share of {basis} of the budget for the basis: between 0 and 1, or 'auto'")
            made = self.basis
            sigma = calibrate(
                basis * target, self.delta, lambda sigma: [replace(made, sigma=sigma).release(self.rounds)]
            )
            plan = self._with_basis(sigma).calibrate(target)
            why = f"alone it is epsilon {basis * target:.3g}, {basis:.0%} of the target"
        assert plan.basis is not None
        return plan, f"sigma {plan.basis.sigma:.3g} for the basis: {why}"

    def _with_basis(self, sigma: float) -> PrivacyPlan:
        assert self.basis is not None
        return replace(self, basis=replace(self.basis, sigma=sigma))


def default_delta(unit: Unit, rows: Iterable[int]) -> tuple[float, str]:
    """The delta for clients with so many rows each, and why."""
    largest = max(rows, default=1)
    if unit == "example" and 1 / (10 * largest) < DELTA:
        return 1 / (10 * largest), f"a tenth of one over the {largest} rows of the largest client"
    return DELTA, f"the usual {DELTA:g}" + (f", below a tenth of one over {largest} rows" if unit == "example" else "")


def worst_client(plans: Mapping[str, PrivacyPlan], rounds: Mapping[str, int] | None = None) -> tuple[str, float]:
    """Who has the largest epsilon, after `rounds` that each client took part in (default: all), and that epsilon.

    It is the federation's own epsilon, since a row is at one client only. Raises UserError where the plans differ in
    unit or delta: their epsilons do not compare.
    """
    kinds = {(plan.unit, plan.delta) for plan in plans.values()}
    if len(kinds) != 1:
        raise UserError(f"only plans with one unit and one delta have a common epsilon; here are {sorted(kinds)}")
    spent = {name: plan.epsilon(rounds[name] if rounds is not None else None) for name, plan in plans.items()}
    worst = max(spent, key=lambda name: spent[name])
    return worst, spent[worst]


def signal_to_noise(plan: PrivacyPlan, values: int) -> float:
    """The longest sum that a batch can have, batch * clip, over the length of the noise on it, sigma clip sqrt(values).

    Above 1 a step can go mostly where the rows want it; far below 1 only many steps together can. inf without noise.
    """
    if values < 1:
        raise UserError(f"{values} trained values: there is at least one")
    return plan.batch / (plan.sigma * math.sqrt(values)) if plan.sigma else math.inf


def _faults(plan: PrivacyPlan) -> Iterable[str]:
    client, basis = plan.unit == "client", plan.basis
    who = "clients" if client else "rows"
    if plan.unit not in ("example", "client"):
        yield f"unit = {plan.unit!r}: there are 'example' and 'client'"
    if not (CLIPS[0] <= plan.clip <= CLIPS[1] or (plan.clip == math.inf and not plan.sigma)):
        yield f"clip = {plan.clip} is out of range. Set it to a value from {CLIPS[0]:g} to {CLIPS[1]:g}"
    if not 0 <= plan.sigma < math.inf:
        yield f"sigma = {plan.sigma}: a noise multiplier is finite and not negative"
    if plan.rows < 1 or not 1 <= plan.batch <= plan.rows:
        yield f"an expected batch of {plan.batch} from {plan.rows} {who}: it is between 1 and all of them"
    if not 0 < plan.delta < 1:
        yield f"delta = {plan.delta}: it is a probability in (0, 1)"
    elif plan.delta * plan.rows >= 1:
        yield (
            f"delta = {plan.delta:g} for {plan.rows} {who}: to publish one of them at random would pass as private. "
            f"Take at most a tenth of 1/{plan.rows}, {1 / (10 * plan.rows):.1g}"
        )
    if plan.steps < 0 or (client and plan.steps != 1):
        yield f"steps = {plan.steps}: " + ("a round releases one sum of clients" if client else "at least 0")
    if plan.rounds < 0:
        yield f"rounds = {plan.rounds}: at least 0"
    if basis and not (CLIPS[0] <= basis.clip <= CLIPS[1] and 0 <= basis.sigma < math.inf and 0 < basis.q <= 1):
        yield (
            f"{basis} is not a valid plan for a basis. clip must be from {CLIPS[0]:g} to {CLIPS[1]:g}, sigma finite "
            "and not negative, and q in (0, 1]"
        )
    if basis and basis.every is not None and basis.every < 1:
        yield f"a new basis every {basis.every} rounds: at least 1"
