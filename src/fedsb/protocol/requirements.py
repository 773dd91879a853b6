"""Checks of a configuration against the method's spec. A conflict is an error. Settings are never changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.privacy.policy import PrivacyPolicy, build_privacy_policy
from fedsb.privacy.shared import noise_kind
from fedsb.protocol.schedule import participation
from fedsb.training.local import BYTES_PER_TRAINED_VALUE, LocalTraining
from fedsb.utils.errors import UserError, did_you_mean
from fedsb.utils.extras import needs_extra
from fedsb.utils.tensors import Shapes

if TYPE_CHECKING:
    from fedsb.protocol.secure_sum import SecureSums


def refuse_what_facts_forbid(config: Config, method: Method) -> None:
    """Raises UserError with every combination that the method's spec excludes."""
    facts, faults = method.spec, []
    if config.server.optimizer != "none" and not facts.supports_server_optimizer:
        faults.append(
            f"server.optimizer = {config.server.optimizer!r}: {facts.id} does not take a plain mean (its fact "
            "supports_server_optimizer is false), so there is nothing for it to step to; set it to 'none'"
        )
    if getattr(method, "tied", False) and config.basis.steps_ahead:
        faults.append(
            "method.tied: a core that layers share has no first step of its own. Set basis.R0 to 'zero', or leave out "
            "tied."
        )
    if config.server.codec != "float32" and facts.changes_base:
        faults.append(
            f"server.codec = {config.server.codec!r}: what {facts.id} adds to the base (its fact changes_base is true) "
            "is never sent again, so no later message would correct the codec's error. Set it to 'float32'."
        )
    if config.train.persist_optimizer_state and facts.rotates_basis:
        faults.append(
            f"train.persist_optimizer_state: the coordinates of {facts.id} turn between rounds (its fact "
            "rotates_basis is true), old moments would point elsewhere; set it to false"
        )
    if config.basis.refresh and method.adapter == "core" and facts.own_models:
        faults.append(
            f"basis.refresh: a new basis starts from the global model, but the clients of {facts.id} keep models of "
            "their own (its fact own_models is true). Leave it out."
        )
    if config.server.fraction < 1:
        faults += _no_parts(config, method)
    averages = facts.keeps_coordinates and facts.global_model
    if config.server.average_last and (not averages or config.basis.refresh):
        faults.append(
            f"server.average_last = {config.server.average_last}: the tensors of {facts.id} mean something else "
            "in each round, or are not the global model, so their mean is not a model; leave it out (and basis.refresh)"
        )
    if config.server.secure_aggregation:
        faults += _no_secure_sum(config, method)
    if config.model.placement == "sharded":
        faults += _not_sharded(config)
    asked = [key for key in ("total_ranks", "memory_mib") if getattr(config.clients, key) is not None]
    if asked and not facts.mixed_ranks:
        faults.append(f"clients.{asked[0]}: all clients of {facts.id} have one rank (its fact mixed_ranks is false)")
    if len(asked) == 2:
        faults.append("clients.total_ranks and clients.memory_mib both set the ranks; give one of them")
    if faults:
        raise UserError("\n".join(faults))


def refuse_what_needs_one_place(config: Config, method: Method) -> None:
    """Raises UserError with every setting that requires a simulation, which has all data in one process."""
    facts, faults = method.spec, []
    if facts.pools_data:
        faults.append(f"{facts.id} pools all data in one place")
    if not facts.global_model:
        faults.append(f"{facts.id} leaves every site a model of its own, which a coordinator cannot score or export")
    if config.basis.kind == "update-pooled" and method.adapter == "core":
        faults.append("basis.kind = 'update-pooled' pools raw rows: take weights, random, core or update")
    if config.basis.refresh and method.adapter == "core":
        faults.append("basis.refresh is not supported with real sites: leave it out")
    if config.data.validation_fraction:
        faults.append("data.validation_fraction scores rows of the sites: tune in a simulation")
    if config.eval.gap:
        faults.append("eval.gap scores rows of the sites in every round: leave it out")
    if config.clients.holdout_clients:
        faults.append("clients.holdout_clients: every site takes part in a real federation")
    if faults:
        why = "" if config.data.train else " (data.train is not set: the rows are at the sites)"
        raise UserError(f"engine.name = 'flower'{why}: " + "; ".join(faults))


def refuse_what_needs_weights(config: Config, method: Method) -> None:
    """Raises UserError with every setting for which a coordinator without the base model would need its weights."""
    if config.server.load_base_model or config.engine.name != "flower":
        return
    basis, faults = config.basis, []
    if config.data.test is not None:
        faults.append(
            "data.test: the coordinator cannot score test rows. Leave it out; every site scores the final model on its "
            "held-out rows"
        )
    if config.model.dtype == "auto":
        faults.append(
            "model.dtype = 'auto' follows the coordinator's device, which computes nothing. Set it to 'bfloat16' or "
            "'float32', for all sites"
        )
    if method.adapter == "core" and basis.kind == "update":
        faults.append(
            "basis.kind = 'update': the coordinator cannot compute its gradient. Take weights or random, or core with "
            "basis.outer = 'random'"
        )
    if method.adapter == "core" and basis.kind == "core" and basis.outer == "weights":
        faults.append(
            "basis.outer = 'weights': the coordinator cannot derive the outer basis. Set it to 'random', or basis.kind "
            "to 'weights' or 'random'"
        )
    if faults:
        raise UserError("server.load_base_model = false: " + "; ".join(faults))


def _not_sharded(config: Config) -> list[str]:
    said = "model.placement = 'sharded' is not supported with"
    faults = []
    if config.engine.name != "in_process":
        faults.append(f"{said} engine.name = {config.engine.name!r}: it divides the model among processes of torchrun")
    if config.privacy.on:
        faults.append(f"{said} privacy: every process would draw rows and noise of its own. Use 'single'.")
    if config.model.quantize != "none":
        faults.append(f"{said} model.quantize = {config.model.quantize!r}. Use one of them.")
    if config.model.compile:
        faults.append(f"{said} model.compile = true. Use one of them.")
    return faults


def _no_parts(config: Config, method: Method) -> list[str]:
    facts, said, faults = method.spec, f"server.fraction = {config.server.fraction}", []
    if not facts.keeps_coordinates:
        faults.append(
            f"{said}: what is not sent in a round is added to later ones, but the values of {facts.id} mean something "
            "else in each round, or are not averaged. Set it to 1."
        )
    if config.basis.refresh and method.adapter == "core":
        faults.append(f"{said}: what is not sent yet would be lost with a new basis (basis.refresh). Set it to 1.")
    if config.privacy.unit == "client" or noise_kind(config, method)[0] == "shared":
        faults.append(
            f"{said}: what a client does not send it adds to later messages, which the clip does not bound then. Set "
            "it to 1."
        )
    return faults


def _no_secure_sum(config: Config, method: Method) -> list[str]:
    facts, faults = method.spec, []
    if not facts.secagg_compatible:
        faults.append(
            f"server.secure_aggregation: {facts.id} needs each client's own tensors at the server (its fact "
            f"secagg_compatible is false)"
        )
    if facts.adapter is None:
        faults.append(f"server.secure_aggregation: there is nothing to add up with {facts.id}, a control")
    if method.adapter == "core" and config.basis.kind in ("core", "update-pooled"):
        faults.append(
            f"server.secure_aggregation: for basis.kind = {config.basis.kind!r} every client sends the server "
            f"something of its "
            "own; take weights, random or update"
        )
    if config.server.codec != "float32":
        faults.append(
            "server.secure_aggregation has its own fixed-point format (server.secagg_bits): server.codec = 'float32'"
        )
    if config.clients.total_ranks is not None or config.clients.memory_mib is not None:
        faults.append(
            "server.secure_aggregation adds up changes of one shape: leave out clients.total_ranks and "
            "clients.memory_mib"
        )
    return faults


def client_ranks(
    config: Config, method: Method, shapes: Shapes, clients: Sequence[str]
) -> tuple[dict[str, int], list[ResolvedSetting]]:
    """Returns the total rank of each client whose rank differs from the method's, and the resolved setting to show.

    Raises UserError for an unknown client or an impossible rank.
    """
    by_rank = _by_client("clients.total_ranks", config.clients.total_ranks, clients)
    by_memory = _by_client("clients.memory_mib", config.clients.memory_mib, clients)
    ranks = {client: int(rank) for client, rank in by_rank.items()}
    ranks |= {client: fitting_rank(method, shapes, mib * 2**20, client) for client, mib in by_memory.items()}
    for rank in set(ranks.values()):
        method.at(rank)
    if not ranks:
        return {}, []
    reason = "as asked" if by_rank else "the largest that fits into clients.memory_mib, 16 bytes per trained value"
    shown = ", ".join(f"{client}: {rank}" for client, rank in sorted(ranks.items()))
    different = {client: rank for client, rank in ranks.items() if rank != method.total_rank}
    return different, [ResolvedSetting(key="clients.total_ranks", value=shown, reason=reason)]


def fitting_rank(method: Method, shapes: Shapes, budget_bytes: float, client: str) -> int:
    """Returns the largest total rank whose trained values, which equal the uploaded ones, fit into the budget.

    Raises UserError if none fits.
    """
    for rank in range(method.total_rank, 0, -1):
        try:
            own = method.at(rank)
        except UserError:  # between two numbers of blocks
            continue
        if own.traffic(shapes, head=0, clients=1).up * BYTES_PER_TRAINED_VALUE <= budget_bytes:
            return rank
    raise UserError(f"clients.memory_mib: {budget_bytes / 2**20:g} MiB of {client!r} hold not even the smallest rank")


def _by_client(
    key: str, given: Sequence[float] | Mapping[str, float] | None, clients: Sequence[str]
) -> dict[str, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if not given:
            raise UserError(f"{key} is an empty list")
        return {client: given[i % len(given)] for i, client in enumerate(clients)}
    for name in given:
        if name not in clients:
            raise UserError(f"{key} names the client {name!r}; {did_you_mean(name, clients)}")
    return dict(given)


def sum_bytes(config: Config, policy: PrivacyPolicy | None = None) -> Callable[[int], int] | None:
    """Returns the size in bytes of a masked update, by its number of values; None without secure aggregation.

    Without a policy it is that of a sum without noise.
    """
    if not config.server.secure_aggregation:
        return None
    from fedsb.protocol.secure_sum import masked_bytes

    plan = next(iter(policy.plans.values()), None) if policy is not None else None
    return partial(masked_bytes, config.server, plan)


def open_secure_sums(config: Config, policy: PrivacyPolicy, run: str, rows: Mapping[str, int]) -> SecureSums | None:
    """Returns the secure aggregation of a run, or None if it is off; `rows` is each client's number of rows.

    Raises UserError without the extra `privacy`, and if a sum would hide nothing.
    """
    if not config.server.secure_aggregation:
        return None
    try:
        from fedsb.protocol.secure_sum import SecureSums
    except ImportError as error:
        raise needs_extra(error.name or "cryptography") from error
    return SecureSums(config, policy, run, rows)


def privacy_policy_of(config: Config, method: Method, rows: Mapping[str, int], local: LocalTraining) -> PrivacyPolicy:
    """Returns the policy of a run whose clients have these rows. Raises UserError as `build_privacy_policy`."""
    steps = {name: local.steps_for(count) for name, count in rows.items()}
    return build_privacy_policy(config, method, rows, steps, local.rows_a_step, participation(rows, config))
