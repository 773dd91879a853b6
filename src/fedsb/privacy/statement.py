"""The privacy statement of a run: its guarantee, the epsilon spent by its ledgers, and what it does not cover."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from fedsb.config.schema import Config
from fedsb.privacy.accounting import covered
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.plan import PrivacyPlan, signal_to_noise
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.utils.formatting import delta_text, epsilon_text

NOT_COVERED = (
    "the number of each client's rows, how many of them are cut or left out, and the names of the classes",
    "the duration of any step",
    "other runs on the same rows: their epsilons add up",
    "the choice of settings, if it was based on scores of private rows (tuning, `fedsb compare`)",
    "a person with rows at several clients, or several rows at one client",
    "manifest.json, which names data files and row counts: do not publish it, nor the key in privacy/",
)
SPLIT_BY_LABEL = "the number of rows of each class: clients.partition = 'dirichlet' splits the rows by class"
ARRIVALS = "which clients' updates arrive in a round: their sum is divided by the number of updates"
RELEASED = {"loss": "the training loss of every round", "scores": "scores on private rows"}


def privacy_statement(policy: PrivacyPolicy, config: Config, values: int) -> dict[str, Any] | None:
    """Returns the statement for the manifest, as JSON; None without a guarantee. A client trains `values` values."""
    if not policy:
        return None
    plans = policy.plans
    one = next(iter(plans.values()))
    epsilon, own = max(plan.epsilon() for plan in plans.values()), None
    against = ""
    if one.shared is not None:
        own = max(plan.own_epsilon() for plan in plans.values())
        against = f", against the server and {_colluding(config)}; epsilon is {epsilon_text(own)} if all other clients "
        against += "collude with it"
    unit = "one row of one client" if one.unit == "example" else "all rows of one client"
    return {
        "unit": one.unit,
        "relation": one.relation,
        "delta": one.delta,
        "clip": one.clip,
        "target": config.privacy.epsilon,
        "epsilon": epsilon,
        "own_epsilon": own,
        "noise": "local" if one.shared is None else asdict(one.shared),
        "accountant": "PLD (dp-accounting)",
        "epsilon_rdp": max(plan.epsilon(accountant="rdp") for plan in plans.values()),
        "epsilon_after": {round: _after(plans.values(), round) for round in _shown(config.rounds)},
        "own_epsilon_after": None
        if one.shared is None
        else {round: _after(plans.values(), round, alone=True) for round in _shown(config.rounds)},
        "plans": {
            name: {
                "rows": plan.rows,
                "q": plan.q,
                "sigma": plan.sigma,
                "own_sigma": plan.own_sigma,
                "steps": plan.steps,
                "rounds": plan.rounds,
                "epsilon": plan.epsilon(),
                "own_epsilon": None if plan.shared is None else plan.own_epsilon(),
                "signal_to_noise": signal_to_noise(plan, values),
                "basis_sigma": plan.basis.sigma if plan.basis else None,
            }
            for name, plan in plans.items()
        },
        "says": f"({epsilon_text(epsilon)}, {delta_text(one.delta)})-differentially private for {unit} "
        f"({one.relation}): the adapter and every message that contributed to it{against}",
        "not_covered": [*(RELEASED[what] for what in config.privacy.release), *_not_covered(config)],
    }


def epsilon_spent(policy: PrivacyPolicy, *, alone: bool = False) -> float:
    """Returns the worst client's epsilon so far, from the ledgers alone.

    `alone`: if all others collude, so that only a client's own share of the noise counts.
    """
    return max(own.ledger.epsilon(own.plan.delta, alone=alone) for own in policy.mechanisms.values())


def larger_batches(policy: PrivacyPolicy, config: Config) -> dict[int, float]:
    """Returns, for larger expected batches, the noise of a step's mean at the same epsilon over what it is now."""
    target = config.privacy.epsilon
    if policy.unit != "example" or target is None:
        return {}
    plan = replace(max(policy.plans.values(), key=lambda plan: plan.sigma), basis=None)
    now = plan.calibrate(target).sigma / plan.batch
    sizes = [plan.batch * factor for factor in (2, 4) if plan.batch * factor <= plan.pool]
    return {batch: replace(plan, batch=batch).calibrate(target).sigma / batch / now for batch in sizes}


def epsilon_at_most(policy: PrivacyPolicy, *, alone: bool = False) -> float:
    """Returns an upper bound of the worst client's epsilon so far, without a composition of its own.

    It is exact after the rounds that the statement shows, and between two of them that of the later one. `alone` is as
    in `epsilon_spent`.
    """
    return max(_at_most(mechanism, alone) for mechanism in policy.mechanisms.values())


def why_not_private(policy: PrivacyPolicy) -> str | None:
    """Returns why a run gives no privacy guarantee, or None if it gives one."""
    if not policy:
        return "no privacy plan: nothing bounds what an update reveals about the training data (set privacy.unit)"
    if not all(mechanism.noise.secret for mechanism in policy.mechanisms.values()):
        return "its noise came from a seed, for a test"
    return None


def _colluding(config: Config) -> str:
    count = config.privacy.colluding_clients
    return f"at most {count} colluding client{'s' * (count != 1)}" if count else "no colluding client"


def _not_covered(config: Config) -> Iterator[str]:
    yield from NOT_COVERED
    if config.clients.partition == "dirichlet":
        yield SPLIT_BY_LABEL
    if config.privacy.unit == "client":
        yield ARRIVALS


def _after(plans: Iterable[PrivacyPlan], rounds: int, *, alone: bool = False) -> float:
    """Returns an upper bound of epsilon after `rounds` rounds, as if every client took part in the first ones."""
    return max(_planned(plan, min(rounds, plan.rounds), alone) for plan in set(plans))


def _planned(plan: PrivacyPlan, rounds: int, alone: bool) -> float:
    return plan.own_epsilon(rounds) if alone else plan.epsilon(rounds)


def _at_most(mechanism: DPMechanism, alone: bool) -> float:
    plan, spent = mechanism.plan, mechanism.ledger.releases()
    for rounds in (0, *_shown(plan.rounds)):
        if covered(spent, plan.releases(rounds)):
            return _planned(plan, rounds, alone)
    return mechanism.ledger.epsilon(plan.delta, alone=alone)  # more than the plan, as after a repeated round


def _shown(rounds: int) -> list[int]:
    """Returns 1, 2, 5, 10, 20, ... and the last round. Each costs a tenth of a second per client."""
    steps = [scale * step for scale in (1, 10, 100, 1000) for step in (1, 2, 5)]
    return sorted({*(step for step in steps if step < rounds), rounds})
