"""A configuration's policy: what it forbids, a plan for every client, and the mechanisms that keep it.

Known before any work is done. Whatever would make the printed epsilon untrue is refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData
from fedsb.methods.base import Method, Update
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.mechanism import Cap, DPMechanism, clipped_change
from fedsb.privacy.noise import Noise, SecretNoise
from fedsb.privacy.plan import BasisNoise, PrivacyPlan, default_delta
from fedsb.protocol.schedule import sample
from fedsb.training.local import LocalTraining
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import safe_name
from fedsb.utils.tensors import Tensors

SERVER = "the server"  # who adds the noise where clients are the unit


@dataclass(kw_only=True)
class PrivacyPolicy:
    """What a run promises of its rows, and what keeps it. Without plans it promises nothing and lets all pass."""

    unit: Literal["none", "example", "client"]
    plans: Mapping[str, PrivacyPlan] = field(default_factory=dict)  # by who adds the noise: the clients, or the server
    choices: tuple[ResolvedSetting, ...] = ()
    release: Collection[str] = ()  # computed on private rows, and shown all the same
    noise_in_shares: bool = False  # clients add the server's noise, each a share of it, in a secure sum
    mechanisms: dict[str, DPMechanism] = field(default_factory=dict)  # as `plans`, once the ledgers are open

    def __bool__(self) -> bool:
        return self.unit != "none"

    def open_ledgers(self, folder: Path, run: str, *, new: bool, cap: Cap | None = None) -> None:
        """Below a run directory, made for a new run, else taken up and never reset. Before this nothing is released.

        `cap` is what the one client that is here allows by itself.
        """
        for name, plan in self.plans.items():
            path = folder / "privacy" / f"{safe_name(name)}.jsonl"
            if new and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                ledger = Ledger.create(path, run=run, client=name, unit=plan.unit)
            else:
                ledger = Ledger(path, run=run, client=name)
            self.mechanisms[name] = DPMechanism(plan=plan, ledger=ledger, noise=noise_for(name), cap=cap)

    def close(self) -> None:
        """Lets go of the ledgers."""
        for mechanism in self.mechanisms.values():
            mechanism.ledger.close()

    def may_release(self, what: Literal["loss", "scores"]) -> bool:
        """Whether this may be told, that was computed on private rows."""
        return not self or what in self.release

    def row_mechanisms(self) -> Mapping[str, DPMechanism] | None:
        """The clients' mechanisms, where a row is the unit. Raises RunError where their ledgers are not open."""
        return self._opened() if self.unit == "example" else None

    def sum_mechanism(self) -> DPMechanism | None:
        """The mechanism of the clients' sum, where a client is the unit. Raises RunError where its ledger is not
        open."""
        return self._opened()[SERVER] if self.unit == "client" else None

    def clip_update(self, sent: Tensors, unmoved: Tensors) -> Tensors:
        """A client's update, its change clipped where a client is the unit."""
        return clipped_change(sent, unmoved, self.plans[SERVER].clip) if self.unit == "client" else sent

    def add_noise(self, updates: Sequence[Update], round: int) -> Sequence[Update]:
        """The updates with the server's noise on their sum, where a client is the unit.

        The noise stands in the first update: only their sum is used.
        """
        mechanism = self.sum_mechanism()
        if mechanism is None or self.noise_in_shares:
            return updates
        mechanism.charge(round + 1)
        first, *others = updates
        return [replace(first, tensors=mechanism.noised_update(first.tensors)), *others]

    def _opened(self) -> Mapping[str, DPMechanism]:
        if not self.mechanisms:
            raise RunError("a private run releases nothing before its ledgers are open")
        return self.mechanisms


def refuse_what_would_leak(config: Config, method: Method) -> None:
    """Raises UserError with every setting under which the printed epsilon would not be true."""
    privacy, facts, faults = config.privacy, method.spec, []
    if not privacy.on:
        return
    if config.basis.kind == "update-pooled" and method.adapter == "core":
        faults.append(
            "basis.kind = 'update-pooled' looks at raw private rows without noise: take weights, random or core"
        )
    if (
        config.basis.kind == "core"
        and method.adapter == "core"
        and (privacy.unit == "client" or privacy.epsilon is None)
    ):
        faults.append(
            "basis.kind = 'core' looks at private rows: its noise is planned for unit = 'example' with a target "
            "epsilon; take weights or random"
        )
    if config.train.dropout:
        faults.append("train.dropout: not in a private run, where every row is a client of its own; set it to 0")
    if type(method).penalty is not Method.penalty:
        faults.append(f"{facts.id} adds a local regulariser to the loss, which is not clipped with a row's gradient")
    if config.eval.gap and "scores" not in privacy.release:
        faults.append("eval.gap scores private rows, which epsilon does not cover: say privacy.release = ['scores']")
    if config.data.validation_fraction and "scores" not in privacy.release:
        faults.append(
            "data.validation_fraction scores private rows, which epsilon does not cover: say privacy.release = "
            "['scores']"
        )
    if privacy.unit == "client":
        faults += _client_faults(config, method)
    if faults:
        raise UserError("\n".join(faults))


def _client_faults(config: Config, method: Method) -> list[str]:
    facts, faults = method.spec, []
    if (
        not (facts.secagg_compatible and facts.supports_server_optimizer)
        or facts.client_state != "nothing"
        or facts.pools_data
    ):
        faults.append(
            f"privacy.unit = 'client' puts noise on a plain mean of clients' changes, and {facts.id} is no such"
        )
    if config.server.weighting != "uniform":
        faults.append("privacy.unit = 'client' needs server.weighting = 'uniform': a weight would be a client's own")
    if config.server.codec != "float32":
        faults.append(
            "privacy.unit = 'client' clips a client's change, and a codec owes it more: server.codec = 'float32'"
        )
    if config.train.persist_optimizer_state:
        faults.append("privacy.unit = 'client' covers what goes up: train.persist_optimizer_state must be false")
    return faults


def build_privacy_policy(
    config: Config, method: Method, sites: Sequence[ClientData], local: LocalTraining
) -> PrivacyPolicy:
    """The plans of all who add noise.

    Raises UserError or ConfigError where a plan cannot be, or the target cannot be reached.
    """
    privacy = config.privacy
    if privacy.unit == "none":
        return PrivacyPolicy(unit="none")
    rows = {site.name: site.rows for site in sites}
    cohorts = [sample(list(rows), round, config) for round in range(config.rounds)]
    rounds = {name: sum(name in cohort for cohort in cohorts) for name in rows}
    delta, reason = (
        default_delta(privacy.unit, rows.values()) if privacy.delta == "auto" else (privacy.delta, "as asked")
    )
    if privacy.unit == "client":
        plan = PrivacyPlan(
            unit="client",
            clip=privacy.clip,
            delta=delta,
            batch=len(cohorts[0]),
            rows=len(rows),
            steps=1,
            rounds=config.rounds,  # whoever is drawn for them: the one ledger is charged for each
        )
        plans = {SERVER: _with_noise(plan, config)[0]}
        why: dict[str, str] = {}
    else:
        plans, why = {}, {}
        for name, count in rows.items():
            first = PrivacyPlan(
                unit="example",
                clip=privacy.clip,
                delta=delta,
                batch=local.rows_a_step,
                rows=count,
                steps=local.steps_for(count),
                rounds=rounds[name],
                basis=_basis_noise(config, method, count, sum(rows.values())),
            )
            plans[name], why[name] = _with_noise(first, config)
    choices = [ResolvedSetting(key="privacy.delta", value=delta, reason=reason)]
    choices += [
        ResolvedSetting(key=f"privacy.basis of {name}", value="noised", reason=text)
        for name, text in why.items()
        if text
    ]
    choices.append(
        ResolvedSetting(
            key="privacy.sigma",
            value=", ".join(f"{name}: {plan.sigma:.4g}" for name, plan in plans.items()),
            reason="the noise multiplier, " + ("calibrated to privacy.epsilon" if privacy.epsilon else "as asked"),
        )
    )
    return PrivacyPolicy(
        unit=privacy.unit,
        plans=plans,
        choices=tuple(choices),
        release=privacy.release,
        noise_in_shares=config.server.secure_aggregation,
    )


def noise_for(client: str) -> Noise:
    """Of a real run. A test may put SeededNoise in its place; the manifest then says that the run is not private."""
    return SecretNoise()


def _with_noise(plan: PrivacyPlan, config: Config) -> tuple[PrivacyPlan, str]:
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return replace(plan, sigma=privacy.noise_multiplier), ""
    assert privacy.epsilon is not None
    if plan.basis is not None:
        return plan.share(privacy.epsilon, privacy.basis_share)
    return plan.calibrate(privacy.epsilon), ""


def _basis_noise(config: Config, method: Method, rows: int, all_rows: int) -> BasisNoise | None:
    """A core basis looks at `basis.samples` rows of all clients together, each site's own share by Poisson sampling."""
    if method.adapter != "core" or config.basis.kind != "core":
        return None
    if config.basis.refresh and config.server.clients_per_round:
        raise UserError("basis.refresh in a private run: every client must take part in every round")
    q = min(1.0, config.basis.samples / all_rows)
    return BasisNoise(clip=config.privacy.clip, q=q, every=config.basis.refresh)
