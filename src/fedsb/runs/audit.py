"""Audits a private configuration with its real data, model, plan and noise, in a run that is discarded.

One client is trained with canaries among its rows (training/privacy_audit.py), and its releases are compared with
its epsilon. The other clients are left out, because they do not affect the privacy of this one. With shared noise they
all take part, and each one's share of the noise is tested.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsb.channels.in_process import open_in_process
from fedsb.config.load import ResolvedConfig
from fedsb.config.schema import Config
from fedsb.privacy import policy
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.mechanism import ROUNDING, SLACK, UnsafeReleaseError
from fedsb.privacy.plan import PrivacyPlan, worst_client
from fedsb.privacy.release_checks import KINDS, Score, failed, limit
from fedsb.secagg.fixed_point import Doubles
from fedsb.server.server import Server
from fedsb.training.privacy_audit import (
    ERROR,
    SHARES,
    AuditedMechanism,
    Canaries,
    ObservedMechanism,
    audited,
    best_bound,
    ceiling,
)
from fedsb.utils.environment import versions
from fedsb.utils.errors import UserError, did_you_mean
from fedsb.utils.files import write_atomic

PUBLISH_NOTHING = "Publish no result of such a run, and report the problem"


def audit(
    loaded: ResolvedConfig,
    *,
    client: str | None = None,  # default: the one with the largest epsilon
    rounds: int | None = None,  # default: all of its rounds
    canaries: int = 1000,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Returns the content of audit.json in the folder "<name>-audit". It is `broken` if the stated epsilon is not true.

    Raises UserError if the run does not protect rows, and for an unknown client, too many rounds, too few canaries, and
    an existing audit.
    """
    config = loaded.config
    folder = Path(config.out) / f"{config.name}-audit"
    _refuse(config, canaries, folder)
    started, run = time.monotonic(), uuid.uuid4().hex[:12]
    method = config.method
    opened = open_in_process(config, method, run)
    server = AuditedServer(config, method, run, opened)
    name, plan = _of(server.policy.plans, client)
    rounds = plan.rounds if rounds is None else rounds
    if not 1 <= rounds <= plan.rounds:
        raise UserError(f"--rounds {rounds} is not valid. {name!r} takes part in {plan.rounds} rounds.")

    refused: UnsafeReleaseError | None = None
    with closing(server.policy):
        server.policy.open_ledgers(folder, run, new=True)
        opened.local_clients.start(server.policy, server.secure_sums, {})
        mechanism = server.policy.mechanisms[name]
        planted = Canaries(canaries, mechanism.noise, config.seed)
        server.policy.mechanisms[name] = watched = audited(mechanism, planted, policy.noise_for(name))
        if plan.shared is not None:
            server.watch(watched)
        try:
            _train(server, list(server.rows) if plan.shared is not None else [name], rounds, note)
        except UnsafeReleaseError as error:
            refused = error

    bound = best_bound(planted.scores(), planted.coins, plan.delta)
    stated = plan.own_epsilon(rounds)  # without shared noise, plan.epsilon
    booked = mechanism.ledger.epsilon(plan.delta, alone=True)
    most = ceiling(canaries, plan.delta, plan.q, rounds * plan.steps)
    scores = watched.checks.scores(SLACK)
    broken, says = _verdict(bound.epsilon, stated, booked, most)
    if faults := [*([str(refused)] if refused else []), *map(_failed_test, failed(scores))]:
        broken, says = True, ". ".join(["; ".join(faults), PUBLISH_NOTHING])
    found = {
        "name": config.name,
        "folder": str(folder),
        "fedsb": versions()["fedsb"],
        "run": run,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "client": name,
        "rounds": rounds,
        "steps": rounds * plan.steps,
        "q": plan.q,
        "sigma": plan.sigma if plan.own_sigma is None else plan.own_sigma,
        "clip": plan.clip,
        "delta": plan.delta,
        "epsilon": stated,
        "epsilon_ledger": booked,
        "epsilon_audited": bound.epsilon,
        "epsilon_most": most,
        "confidence": 1 - ERROR,
        "tests": {
            kind: {"tests": len(of_kind), "worst": max(of_kind, key=abs, default=None), "limit": limit(len(scores))}
            for kind in KINDS
            for of_kind in [[score.score for score in scores if score.kind == kind]]
        },
        "canaries": canaries,
        "planted": len(planted.inside),
        "guesses": bound.guesses,
        "guessed_in": bound.guessed_in,
        "correct": bound.correct,
        "broken": broken,
        "says": says,
        "seconds": time.monotonic() - started,
        "config": config.model_dump(mode="json"),
    }
    write_atomic(folder / "audit.json", json.dumps(found, indent=1).encode())
    return found


def _failed_test(score: Score) -> str:
    """Returns the message of a failed test."""
    fault = {
        "size": "the noise does not have the planned size",
        "mean": "the noise does not have mean 0",
        "shape": "the noise is not normally distributed",
        "tensors": "two tensors have the same noise",
        "steps": "several steps have the same noise",
        "draws": "rows are not sampled as planned",
        "clip": "a clipped gradient has a norm above the clip norm",
        "again": "a second source makes the same noise, so others can compute it",
        "divisor": "the sum of a step was not divided by its expected batch",
    }[score.kind]
    size = f"{score.score / 1000:.4g} clips" if score.kind == "clip" else f"{score.score:.3g} standard deviations"
    return f"{fault} ({score.what}; {size})"


def _refuse(config: Config, canaries: int, folder: Path) -> None:
    faults = []
    if config.privacy.unit != "example":
        faults.append(
            f"privacy.unit = {config.privacy.unit!r} cannot be audited. Canaries are rows, so it must be 'example'."
        )
    if canaries < max(SHARES):
        faults.append(
            f"--canaries {canaries} is too small. Use at least {max(SHARES)}; 1,000 can show an epsilon of up to 5."
        )
    if folder.exists():
        faults.append(f"{folder} already exists. Delete it, or choose a different name (--set name=other).")
    if faults:
        raise UserError("\n".join(faults))


def _of(plans: Mapping[str, PrivacyPlan], client: str | None) -> tuple[str, PrivacyPlan]:
    if client is None:
        client, _ = worst_client(plans)
    if client not in plans:
        raise UserError(f"This run has no client {client!r}; {did_you_mean(client, plans)}")
    return client, plans[client]


class AuditedServer(Server):
    """A server that compares each step with shared noise with the shares that it consists of."""

    audited: AuditedMechanism | None = None

    def watch(self, audited: AuditedMechanism) -> None:
        """Records the shares of all clients together with those of the audited one."""
        self.audited = audited
        for name, own in self.policy.mechanisms.items():
            if own is not audited:
                observed = ObservedMechanism(plan=own.plan, ledger=own.ledger, noise=own.noise, shares=audited.shares)
                self.policy.mechanisms[name] = observed

    def mean_gradient(self, q: float, total: Doubles, clients: Sequence[str]) -> Tensor:
        gradient = super().mean_gradient(q, total, clients)
        if (audited := self.audited) is not None:
            shares, grid = audited.shares, NoiseGrid.of(audited.plan, len(gradient))
            noise = {f"the share of {name}": share.noise for name, share in shares.items()}
            audited.checks.record_noise(noise, grid.sigma)
            whole = torch.stack([share.share for share in shares.values()]).sum(0)
            audited.checks.record_mean(gradient, whole * grid.gamma / audited.plan.batch)
        return gradient


def _train(server: Server, cohort: Sequence[str], rounds: int, note: Callable[[str], None]) -> None:
    """Runs the rounds of a run in which these clients take part; what they train is not kept."""
    state, _, _ = server.start()
    for round in range(rounds):
        started = time.monotonic()
        state = server.run_round(state, cohort=cohort).state
        note(f"round {round + 1}/{rounds}  seconds {time.monotonic() - started:.1f}")


def _verdict(audited: float, stated: float, booked: float, most: float) -> tuple[bool, str]:
    """Returns whether the stated epsilon cannot be true, and the conclusion as text."""
    if booked < stated * (1 - ROUNDING):
        return True, f"the ledger lacks releases: its epsilon is {booked:.3g}, but that of the plan is {stated:.3g}"
    if audited > min(stated, booked):
        return True, (
            f"rows can be distinguished better than epsilon {min(stated, booked):.3g} allows, so the noise, the "
            f"clipping or the sampling is not as stated. {PUBLISH_NOTHING}"
        )
    if most <= stated:
        return False, (
            f"noise, clipping and sampling pass their tests. The canaries could not show a problem: without any noise, "
            f"they show an epsilon of at most {most:.3g}. Audit fewer rounds (--rounds) or use more canaries "
            "(--canaries; more than about 10,000 do not help)"
        )
    return False, (
        "no problem was found: noise, clipping and sampling pass their tests. This is not a proof. An audit normally "
        "shows a much smaller epsilon than the stated one, which is a bound for the worst case"
    )
