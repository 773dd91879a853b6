"""A configuration's privacy policy: what it forbids, one plan per client, and the mechanisms that enforce the plans.

It is known before any work is done. Settings that would make the printed epsilon untrue are refused here, with the
reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fedsb.adapters.layout import Layout
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.methods.base import Method, Update
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.mechanism import Cap, DPMechanism, clip_change
from fedsb.privacy.noise import Noise, SecretNoise
from fedsb.privacy.plan import BasisNoise, PrivacyPlan, default_delta
from fedsb.privacy.shared import noise_kind, shared_faults, shared_noise
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import safe_name
from fedsb.utils.tensors import Tensors

SERVER = "the server"  # adds the noise if clients are the unit


@dataclass(kw_only=True)
class PrivacyPolicy:
    """The guarantee of a run, and its enforcement. Without plans it guarantees nothing and changes nothing."""

    unit: Literal["none", "example", "client"]
    plans: Mapping[str, PrivacyPlan] = field(default_factory=dict)  # by who adds the noise: the clients, or the server
    choices: tuple[ResolvedSetting, ...] = ()
    release: Collection[str] = ()  # computed on private rows and shown nevertheless
    noise_in_shares: bool = False  # in secure aggregation each client adds a share of the server's noise
    mechanisms: dict[str, DPMechanism] = field(default_factory=dict)  # as `plans`, once the ledgers are open

    def __bool__(self) -> bool:
        return self.unit != "none"

    @property
    def shared_noise(self) -> bool:
        """True if each round is one step, for which the clients add up shares of one noise."""
        return any(plan.shared is not None for plan in self.plans.values())

    def open_ledgers(self, folder: Path, run: str, *, new: bool, caps: Sequence[Cap] = ()) -> None:
        """Opens the ledgers in a run directory. Nothing can be released before.

        A new run creates them. A resumed run continues them and never resets them. `caps` are the limits of the one
        client that runs here.
        """
        for name, plan in self.plans.items():
            path = folder / "privacy" / f"{safe_name(name)}.jsonl"
            if new and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                ledger = Ledger.create(path, run=run, client=name, unit=plan.unit)
            else:
                ledger = Ledger(path, run=run, client=name)
            self.mechanisms[name] = DPMechanism(plan=plan, ledger=ledger, noise=noise_for(name), caps=caps)

    def close(self) -> None:
        """Closes the ledgers and releases their locks."""
        for mechanism in self.mechanisms.values():
            mechanism.ledger.close()

    def may_release(self, what: Literal["loss", "scores"]) -> bool:
        """Returns whether this may be released although it was computed on private rows."""
        return not self or what in self.release

    def row_mechanisms(self) -> Mapping[str, DPMechanism] | None:
        """Returns the clients' mechanisms if a row is the unit. Raises RunError if their ledgers are not open."""
        return self._opened() if self.unit == "example" else None

    def sum_mechanism(self) -> DPMechanism | None:
        """Returns the mechanism of the clients' sum if a client is the unit. Raises RunError if its ledger is not
        open."""
        return self._opened()[SERVER] if self.unit == "client" else None

    def clip_update(self, sent: Tensors, baseline: Tensors) -> Tensors:
        """Returns a client's update, with its change from `baseline` clipped if a client is the unit."""
        if self.unit != "client":
            return sent
        layout = Layout.of(sent)
        return layout.views(clip_change(layout.flatten(sent), layout.flatten(baseline), self.plans[SERVER].clip))

    def add_noise(self, updates: Sequence[Update], round: int) -> Sequence[Update]:
        """Returns the updates with the server's noise on their sum if a client is the unit.

        The noise is added to the first update, because only the sum of all is used.
        """
        mechanism = self.sum_mechanism()
        if mechanism is None or self.noise_in_shares:
            return updates
        mechanism.charge(round + 1)
        first, *others = updates
        layout = Layout.of(first.tensors)
        noised = mechanism.noised_update(layout.flatten(first.tensors))
        return [replace(first, tensors=layout.views(noised)), *others]

    def _opened(self) -> Mapping[str, DPMechanism]:
        if not self.mechanisms:
            raise RunError("A private run cannot release anything before its ledgers are open.")
        return self.mechanisms


def refuse_what_would_leak(config: Config, method: Method) -> None:
    """Raises UserError with every setting under which the printed epsilon would not be true."""
    if not config.privacy.on:
        return
    faults = list(_example_faults(config, method))
    if config.privacy.unit == "client":
        faults += _client_faults(config, method)
    if faults:
        raise UserError("\n".join(faults))


def _example_faults(config: Config, method: Method) -> Iterator[str]:
    privacy, core = config.privacy, method.adapter == "core"
    if privacy.noise == "shared" and privacy.unit == "example":
        yield from (f"privacy.noise = 'shared': {fault}." for fault in shared_faults(config, method))
    if privacy.scale_then_privatize and privacy.unit == "example":
        yield from _scaling_faults(config, method)
    if config.basis.kind == "update-pooled" and core:
        yield (
            "basis.kind = 'update-pooled' reads private rows without noise. Set it to 'weights', 'random' or 'core'."
        )
    if config.basis.kind == "core" and core and (privacy.unit == "client" or privacy.epsilon is None):
        yield (
            "basis.kind = 'core' reads private rows. Its noise is planned only for privacy.unit = 'example' with a "
            "target privacy.epsilon. Set basis.kind to 'weights' or 'random'."
        )
    if config.train.dropout:
        yield (
            f"train.dropout = {config.train.dropout} is not supported in a private run, where every row is trained "
            "like a separate client. Set it to 0."
        )
    if type(method).penalty is not Method.penalty:
        yield (
            f"{method.spec.id} adds a local regulariser to the loss, which is not clipped with a row's gradient. "
            "Choose a different method."
        )
    for key, on in (("eval.gap", config.eval.gap), ("data.validation_fraction", config.data.validation_fraction)):
        if on and "scores" not in privacy.release:
            yield (
                f"{key} scores private rows, which epsilon does not cover. Leave it out, or accept this with "
                "privacy.release = ['scores']."
            )


def _scaling_faults(config: Config, method: Method) -> Iterator[str]:
    shared, train = noise_kind(config, method)[0] == "shared", config.train
    if train.optimizer != "adamw":
        yield (
            f"privacy.scale_then_privatize needs Adam's second moments, but train.optimizer = {train.optimizer!r}. Set "
            "it to 'adamw', or leave out privacy.scale_then_privatize."
        )
    if shared and method.spec.rotates_basis:
        yield (
            f"privacy.scale_then_privatize needs the second moments of earlier rounds, but the coordinates of "
            f"{method.spec.id} are others in each round. Leave it out, or set privacy.noise = 'local'."
        )


def _client_faults(config: Config, method: Method) -> Iterator[str]:
    spec = method.spec
    is_mean = spec.secagg_compatible and spec.supports_server_optimizer
    if not is_mean or spec.client_state != "nothing" or spec.pools_data:
        yield (
            f"privacy.unit = 'client' adds noise to a plain mean of the clients' changes, but {spec.id} does not "
            "compute one. Choose a different method, or privacy.unit = 'example'."
        )
    if config.server.weighting != "uniform":
        yield (
            f"privacy.unit = 'client' needs server.weighting = 'uniform', not {config.server.weighting!r}: a weight "
            "would reveal a client's number of rows."
        )
    if config.server.codec != "float32":
        yield (
            f"server.codec = {config.server.codec!r} adds error feedback to a change after privacy.unit = 'client' has "
            "clipped it. Set server.codec = 'float32'."
        )
    if config.train.persist_optimizer_state:
        yield (
            "train.persist_optimizer_state carries private state between rounds, which privacy.unit = 'client' does "
            "not cover. Set it to false."
        )


def build_privacy_policy(
    config: Config,
    method: Method,
    rows: Mapping[str, int],
    steps: Mapping[str, int],
    batch: int,
    rounds: Mapping[str, int],
) -> PrivacyPolicy:
    """Returns the policy with the plans of all who add noise.

    Raises UserError or ConfigError if a plan is invalid or its target cannot be reached.

    Args:
        rows: each client's training rows.
        steps: each client's optimiser steps per round.
        batch: rows per step.
        rounds: the number of rounds in which each client takes part.
    """
    privacy = config.privacy
    if privacy.unit == "none":
        return PrivacyPolicy(unit="none")
    kind, why_noise = noise_kind(config, method)
    if privacy.scale_then_privatize and privacy.unit == "example":
        lasting = kind == "shared" or config.train.persist_optimizer_state
        if max(steps.values()) * (config.rounds if lasting else 1) < 2:
            raise UserError(
                "privacy.scale_then_privatize needs second moments of earlier steps, and a client has none in its only "
                "step. Raise train.local_steps or rounds, or set train.persist_optimizer_state = true."
            )
    pooled = [sum(rows.values())] if kind == "shared" else rows.values()
    delta, reason = default_delta(privacy.unit, pooled) if privacy.delta == "auto" else (privacy.delta, "as configured")
    plans: dict[str, PrivacyPlan] = {}
    basis_reasons: dict[str, str] = {}
    if privacy.unit == "client":
        cohort = min(config.server.clients_per_round or len(rows), len(rows))
        plan = PrivacyPlan(
            unit="client",
            clip=privacy.clip_norm,
            delta=delta,
            batch=cohort,
            rows=len(rows),
            steps=1,
            rounds=config.rounds,  # the server's ledger is charged for every round, whichever clients are drawn
        )
        plans[SERVER], _ = _with_noise(plan, config)
    elif kind == "shared":
        shared, why_noise = shared_noise(config, rows, why_noise)
        longest = max(rounds.values())
        for name, count in rows.items():
            plan = PrivacyPlan(
                unit="example",
                clip=privacy.clip_norm,
                delta=delta,
                batch=batch * len(rows),  # what all clients together would draw from equal numbers of rows
                rows=count,
                steps=steps[name],
                rounds=longest,  # one noise for all, so that of the client with the most rounds
                shared=shared,
                scaled=privacy.scale_then_privatize,
            )
            plans[name] = replace(_with_noise(plan, config)[0], rounds=rounds[name])
    else:
        for name, count in rows.items():
            plan = PrivacyPlan(
                unit="example",
                clip=privacy.clip_norm,
                delta=delta,
                batch=batch,
                rows=count,
                steps=steps[name],
                rounds=rounds[name],
                basis=_basis_noise(config, method, sum(rows.values())),
                scaled=privacy.scale_then_privatize,
            )
            plans[name], basis_reasons[name] = _with_noise(plan, config)
    sigmas = ", ".join(f"{name}: {plan.sigma:.4g}" for name, plan in plans.items())
    how = "the noise multiplier, " + ("calibrated to privacy.epsilon" if privacy.epsilon else "as configured")
    return PrivacyPolicy(
        unit=privacy.unit,
        plans=plans,
        choices=(
            ResolvedSetting(key="privacy.delta", value=delta, reason=reason),
            *(
                [ResolvedSetting(key="privacy.noise", value=kind, reason=why_noise)]
                if privacy.unit == "example"
                else []
            ),
            *(
                ResolvedSetting(key=f"privacy.basis of {name}", value="noised", reason=why)
                for name, why in basis_reasons.items()
                if why
            ),
            ResolvedSetting(key="privacy.sigma", value=sigmas, reason=how),
        ),
        release=privacy.release,
        noise_in_shares=config.server.secure_aggregation,
    )


def noise_for(client: str) -> Noise:
    """Returns the noise of a real run. A test may replace it by SeededNoise; the manifest then says "not private"."""
    return SecretNoise()


def _with_noise(plan: PrivacyPlan, config: Config) -> tuple[PrivacyPlan, str]:
    """Returns (the plan with its sigmas, the reason for the basis's sigma)."""
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return replace(plan, sigma=privacy.noise_multiplier), ""
    assert privacy.epsilon is not None
    if plan.basis is not None:
        return plan.share(privacy.epsilon, privacy.basis_share)
    return plan.calibrate(privacy.epsilon), ""


def _basis_noise(config: Config, method: Method, all_rows: int) -> BasisNoise | None:
    """Returns the noise of a `core` basis: `basis.samples` rows of all clients together, by Poisson sampling."""
    if method.adapter != "core" or config.basis.kind != "core":
        return None
    if config.basis.refresh and config.server.clients_per_round:
        raise UserError(
            f"basis.refresh = {config.basis.refresh} in a private run needs every client in every round. Leave out "
            "basis.refresh or server.clients_per_round."
        )
    q = min(1.0, config.basis.samples / all_rows)
    return BasisNoise(clip=config.privacy.clip_norm, q=q, every=config.basis.refresh)
