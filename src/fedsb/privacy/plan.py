"""A privacy plan, made before any training: which sums get how much noise, and the resulting epsilon.

    sum over the sampled rows (or clients) of clip_C(g)  +  N(0, (sigma C)^2),   then divided by the batch

`example`: DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133), where a step
samples each row with probability q = batch / rows. `client`: DP-FedAvg with uniform weights (McMahan, Ramage, Talwar,
Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv 1710.06963), where a round sums
whole updates. Neighbours differ in one row (or client) whose place is left empty (accounting.py).

With `example` each client has a plan of its own, with its own rows and therefore its own sigma, and adds all of its
noise itself. A row is at one client only, so the federation's epsilon is that of the worst client. A person with rows
at several clients is not covered. With `client` one plan covers all clients: they clip their updates, and the server
adds the noise to the sum.

With shared noise (`example`, secure aggregation) a step is a sum over all clients, which draw from all rows at one rate
q = batch / rows of all clients. Each adds a share of the noise, N(0, (sigma C)^2 / h): any h of them add up to sigma.
There are two statements. Against the server and the colluding clients that h allows for, who learn no sum with fewer
than h shares of honest clients, the noise multiplier is sigma. Against everyone else together it is that of a client's
own share, sigma / sqrt(h), at the same q.

With `client` the noised sum is divided by the number of updates that arrived, which is public: dividing adds nothing
to epsilon, and which updates arrive is not covered. If m of the n
clients asked reply, the noise on the mean is n / m times as large.

Limits: with `client` there is no amplification by sampling, q = 1: clients are drawn by a public seed.
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
CLIPS = (1e-9, 1e9)  # the smallest and the largest clip that float32 gradients resolve
RISE = 1.1  # with "auto", training noise over what it would be with a basis that reads no private rows


@dataclass(frozen=True, kw_only=True)
class BasisNoise:
    """The noise of a basis made from private rows: a sum before the first round, and again every `every` rounds."""

    clip: float  # bound on the L2 norm of one row's gradient, over the cores of all layers together
    sigma: float = 0.0
    q: float = 1.0  # sampling rate of the rows of one basis
    every: int | None = None  # rounds between two bases

    def release(self, rounds: int) -> Release:
        """Returns what has been released after `rounds` rounds. The first basis comes before all of them."""
        renewed = (rounds - 1) // self.every if self.every and rounds else 0
        return Release(q=self.q, sigma=self.sigma, count=1 + renewed, what="basis")


@dataclass(frozen=True, kw_only=True)
class SharedNoise:
    """The sum to which the clients of a run add shares of one noise."""

    clients: int  # that are asked in a round
    honest: int  # h: clients, at least, whose shares are in every sum that the server can learn
    rows: int  # of all clients of the run together


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """The releases of one client in a run or, with `client`, of the server. Raises ConfigError with all faults."""

    unit: Unit
    clip: float  # C, L2 over all trained tensors together
    delta: float
    batch: int  # expected rows per step, which divides their sum; `client`: clients asked per round
    rows: int  # the client's rows; `client`: the number of clients
    steps: int  # noised sums per round; `client`: 1
    rounds: int
    sigma: float = 0.0  # noise multiplier; 0: no noise, epsilon is inf
    basis: BasisNoise | None = None  # None: the basis reads no private rows
    shared: SharedNoise | None = None  # None: all of the noise is added in one place
    scaled: bool = False  # scale-then-privatize (scaling.py), which changes no epsilon

    relation: ClassVar[str] = RELATION

    def __post_init__(self) -> None:
        if faults := list(_faults(self)):
            raise ConfigError(faults)

    @property
    def q(self) -> float:
        """The sampling rate of a step; 1 for clients, whose sampling is public."""
        return self.batch / self.pool if self.unit == "example" else 1.0

    @property
    def pool(self) -> int:
        """The rows that a step draws from: the client's own or, with shared noise, those of all clients."""
        return self.shared.rows if self.shared else self.rows

    @property
    def own_sigma(self) -> float | None:
        """The noise multiplier of the client's own share; None without shared noise."""
        return self.sigma / math.sqrt(self.shared.honest) if self.shared else None

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on each value of the sum, before it is divided by `batch`."""
        return self.sigma * self.clip if self.sigma else 0.0

    def releases(self, rounds: int | None = None) -> tuple[Release, ...]:
        """Returns what has been released after `rounds` rounds, by default all."""
        rounds = self.rounds if rounds is None else rounds
        basis = (self.basis.release(rounds),) if self.basis else ()
        steps = self.steps * rounds
        return (*basis, self.training(steps)) if steps else basis

    def training(self, steps: int) -> Release:
        """Returns what `steps` steps of training release."""
        return Release(q=self.q, sigma=self.sigma, count=steps, own_sigma=self.own_sigma)

    def epsilon(self, rounds: int | None = None, accountant: Accountant = "pld") -> float:
        """Returns epsilon after `rounds` rounds, by default all."""
        return epsilon(self.releases(rounds), self.delta, accountant)

    def own_epsilon(self, rounds: int | None = None) -> float:
        """Returns epsilon if everyone else colludes, so that only the client's own share of the noise counts."""
        return epsilon(self.releases(rounds), self.delta, alone=True)

    def calibrate(self, target: float) -> PrivacyPlan:
        """Returns this plan with the smallest sigma that keeps all rounds within the target. The basis is unchanged."""
        if self.basis and self.basis.sigma == 0:
            raise UserError(
                "The basis is made from private rows without noise, so no sigma reaches the target. Call share() "
                "instead."
            )
        sigma = calibrate(target, self.delta, lambda sigma: replace(self, sigma=sigma).releases())
        return replace(self, sigma=sigma)

    def share(self, target: float, basis: float | Literal["auto"]) -> tuple[PrivacyPlan, str]:
        """Returns (this plan with sigmas for the basis and for training that together keep the target, the reason).

        With a number in (0, 1), the releases of the basis, counted alone, have that part of the target as epsilon, and
        training gets the least noise with which both together keep the target. With "auto", training gets a tenth more
        noise than with a basis that reads no private rows, and the basis gets the least noise that keeps the target.
        """
        if self.basis is None:
            raise UserError(
                "This plan's basis reads no private rows, so there is nothing to share. Call calibrate() instead."
            )
        if basis == "auto":
            free = replace(self, basis=None).calibrate(target).sigma
            raised = replace(self, sigma=RISE * free)
            plan = raised._with_basis(calibrate(target, self.delta, lambda sigma: raised._with_basis(sigma).releases()))
            why = f"the smallest if training noise may rise by {RISE - 1:.0%}, from {free:.3g} to {plan.sigma:.3g}"
        else:
            if not 0 < basis < 1:
                raise UserError(f"privacy.basis_share = {basis} is invalid. It must be between 0 and 1, or 'auto'.")
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
    """Returns (the delta for clients with these numbers of rows, the reason)."""
    largest = max(rows, default=1)
    if unit == "example" and 1 / (10 * largest) < DELTA:
        return 1 / (10 * largest), f"1 / (10 x {largest}), for the {largest} rows of the largest client"
    return DELTA, f"the usual {DELTA:g}" + (
        f", at most 1 / (10 x {largest}) for {largest} rows" if unit == "example" else ""
    )


def worst_client(plans: Mapping[str, PrivacyPlan], rounds: Mapping[str, int] | None = None) -> tuple[str, float]:
    """Returns (the client with the largest epsilon, that epsilon) after `rounds` rounds of each client, by default all.

    It is the federation's epsilon, because a row is at one client only. Raises UserError if the plans differ in unit or
    delta, because their epsilons cannot be compared then.
    """
    kinds = {(plan.unit, plan.delta) for plan in plans.values()}
    if len(kinds) != 1:
        raise UserError(f"Only plans with one unit and one delta have a common epsilon. Found: {sorted(kinds)}.")
    spent = {name: plan.epsilon(rounds[name] if rounds is not None else None) for name, plan in plans.items()}
    worst = max(spent, key=lambda name: spent[name])
    return worst, spent[worst]


def signal_to_noise(plan: PrivacyPlan, values: int) -> float:
    """Returns the largest norm of a batch's sum, batch * clip, over the norm of its noise, sigma clip sqrt(values).

    Above 1, a single step can be dominated by the gradients. Far below 1, only many steps together can. inf without
    noise.
    """
    if values < 1:
        raise UserError(f"{values} trained values are too few. There must be at least 1.")
    return plan.batch / (plan.sigma * math.sqrt(values)) if plan.sigma else math.inf


def _faults(plan: PrivacyPlan) -> Iterable[str]:
    client, basis = plan.unit == "client", plan.basis
    who = "clients" if client else "rows"
    if plan.unit not in ("example", "client"):
        yield f"unit = {plan.unit!r} is invalid. Set it to 'example' or 'client'."
    if not (CLIPS[0] <= plan.clip <= CLIPS[1] or (plan.clip == math.inf and not plan.sigma)):
        yield f"clip = {plan.clip} is out of range. Set it to a value from {CLIPS[0]:g} to {CLIPS[1]:g}."
    if not 0 <= plan.sigma < math.inf:
        yield f"sigma = {plan.sigma} is invalid. A noise multiplier is finite and at least 0."
    if plan.rows < 1 or not 1 <= plan.batch <= plan.pool:
        yield f"an expected batch of {plan.batch} from {plan.pool} {who} is impossible. Set it from 1 to {plan.pool}."
    if not 0 < plan.delta < 1:
        yield f"delta = {plan.delta} is invalid. It must be a probability in (0, 1)."
    elif plan.delta * plan.pool >= 1:
        yield (
            f"delta = {plan.delta:g} is too large for {plan.pool} {who}: publishing one of them at random would count "
            f"as private. Set it to at most a tenth of 1/{plan.pool}, {1 / (10 * plan.pool):.1g}."
        )
    if plan.steps < 0 or (client and plan.steps != 1):
        yield f"steps = {plan.steps} is invalid. " + (
            "With unit = 'client' a round has one noised sum: set it to 1." if client else "It is at least 0."
        )
    if plan.shared and (client or plan.steps != 1):
        yield (
            f"steps = {plan.steps} is invalid. With shared noise a round is one step: the influence of a row "
            "is bounded in one clipped sum, but not in a model that several steps have changed."
        )
    if plan.rounds < 0:
        yield f"rounds = {plan.rounds} is invalid. It is at least 0."
    if basis and not (CLIPS[0] <= basis.clip <= CLIPS[1] and 0 <= basis.sigma < math.inf and 0 < basis.q <= 1):
        yield (
            f"{basis} is not a valid plan for a basis. clip must be from {CLIPS[0]:g} to {CLIPS[1]:g}, sigma finite "
            "and at least 0, and q in (0, 1]."
        )
    if basis and basis.every is not None and basis.every < 1:
        yield f"a new basis every {basis.every} rounds is impossible. Set it to at least 1."
