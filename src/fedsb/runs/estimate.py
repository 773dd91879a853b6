"""Estimates the costs of a run before it starts: bytes of this method and of others, memory, time and epsilon.

Nothing is trained, and the estimates need no weights: layer shapes come from the model's config, on the meta device.
Without the rows, bytes and memory are still estimated, and the unknown figures are listed. A relative path that does
not exist is an error, because `fedsb run` would fail in this folder, except for a path of a packaged recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.basis import check_rank
from fedsb.config.load import ResolvedConfig, unused_settings
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.config.training import FROM_GRADIENTS
from fedsb.data.clients import Data, remote_client
from fedsb.data.sources import load_table
from fedsb.data.tasks.base import Task, ids, question_of
from fedsb.data.tasks.tokens import pad_token
from fedsb.methods.base import Method
from fedsb.models.hub import has_weights
from fedsb.models.layers import block_layers, find_targets, is_linear, left_out, linear_shape
from fedsb.models.limits import check_positions, check_tokens
from fedsb.models.load import BaseModel, choose_device, choose_dtype, load_base
from fedsb.models.names import resolve_name
from fedsb.models.quantise import missing_package, weight_bytes
from fedsb.privacy.policy import refuse_what_would_leak
from fedsb.privacy.shared import noise_kind, sends_moments
from fedsb.privacy.statement import larger_batches, privacy_statement
from fedsb.protocol.prices import PricedBasis, PricedRun, price_list, round_bytes
from fedsb.protocol.requirements import (
    client_ranks,
    open_secure_sums,
    privacy_policy_of,
    refuse_what_facts_forbid,
    refuse_what_needs_one_place,
    refuse_what_needs_weights,
    sum_bytes,
)
from fedsb.protocol.schedule import broadcasts, refreshes
from fedsb.runs.availability import Availability, find_availability
from fedsb.runs.costs import Cost, Machine, Work, phase_costs
from fedsb.training.basis import basis_values
from fedsb.training.local import LocalTraining
from fedsb.training.memory import Memory, ModelSizes, memory_by_clients, trained_values
from fedsb.training.resolved import (
    auto_clients_per_forward,
    batch_warnings,
    end_choices,
    local_training,
    public_rows,
    share_rows,
    targets_choice,
)
from fedsb.training.trainer import Trainer
from fedsb.utils.environment import memory_of
from fedsb.utils.errors import NotAvailableError, UserError
from fedsb.utils.formatting import bytes_text
from fedsb.utils.tensors import Shapes

PREFLIGHT_SHARE = 0.5  # of the device's memory: a model with larger weights is not loaded for the preflight


def estimate(loaded: ResolvedConfig, also: Sequence[Method] = (), gpu: float | None = None) -> dict[str, Any]:
    """Returns everything that `fedsb check` prints.

    Args:
        also: methods whose bytes are estimated in addition.
        gpu: gigabytes of a GPU that is not here, on which the run is priced.

    Raises UserError for errors in settings, data and model.
    """
    if loaded.config.data.train is None and "engine.name" not in loaded.origin:
        loaded = _as_served(loaded)
    refuse_what_needs_weights(loaded.config, loaded.config.method)
    if gpu is None:
        machine = Machine.here(choose_device(loaded.config.model.device)[0])
        dtype = choose_dtype(loaded.config.model.dtype, machine.device)[0]
    else:
        machine, loaded = Machine.gpu(gpu), _on_gpu(loaded, gpu)
        dtype = getattr(torch, loaded.config.model.dtype)
    config, method = loaded.config, loaded.config.method
    refuse_what_facts_forbid(config, method)
    refuse_what_would_leak(config, method)
    if config.engine.name == "flower":
        refuse_what_needs_one_place(config, method)
    _refuse_missing_files(loaded)
    here = find_availability(config)
    data, unknown = here.data, [*here.unknown]
    base = load_base(
        config.model,
        auto_class=here.task.auto_class,
        num_labels=here.classes,
        pad_token=None if here.tokenizer is None else pad_token(here.tokenizer),
        shapes_only=True,
    )
    positions = check_positions(base.model, config.model)
    if data is not None:
        rows = [*data.test, *(example for site in data.clients for example in [*site.train, *site.held_out])]
        check_tokens(base.model, here.tokenizer, (ids(example, "input_ids") for example in rows))
    if missing := missing_package(config.model.quantize):
        unknown.append(missing)
    if config.model.placement != "single":
        unknown.append("the memory of one device: the estimate is for one with the whole base, see docs/gpu.md")
    weights = weight_bytes(base.model, config.model.quantize, base.head)
    linear = sum(math.prod(linear_shape(module)) for module in base.model.modules() if is_linear(module))
    targets = find_targets(base.model, config.model.target_modules, base.head)
    blocks = {
        name: linear_shape(base.model.get_submodule(name)) for name in block_layers(base.model, base.head) or targets
    }
    without = left_out(base.model, base.head)
    adapted = AdaptedModel(base.model, kind=method.adapter, targets=targets, head=base.head, scale=method.scale)
    if method.adapter == "core":
        check_rank(adapted.shapes, method.total_rank)
        if data is not None:
            unknown += _public_rows(config, here.task)
    head = sum(t.numel() for t in adapted.head_tensors().values())
    names = ["central"] if method.spec.pools_data else here.clients
    ranks, rank_settings = _ranks(config, method, adapted.shapes, names, data)
    cohort = min(config.server.clients_per_round or len(names), len(names))
    traffic = method.traffic(adapted.shapes, head=head, clients=cohort)
    privacy, work = None, None
    up_bytes = sum_bytes(config)
    choices = [*loaded.choices(), *base.choices, *positions, targets_choice(config, targets, without)]
    if gpu is not None:
        device = ResolvedSetting(key="model.device", value="cuda", reason=f"--gpu {gpu:g}")
        choices = [device, *(choice for choice in choices if choice.key != device.key)]
    choices += end_choices(here.task)
    sites = [remote_client(name, 0) for name in names]
    local = local_training(config, clients=len(here.clients) if method.spec.pools_data else 1)
    if data is not None:
        sites = [data.pooled()] if method.spec.pools_data else data.participants
        work = _work(config, method, local, data, cohort, share_rows(config, adapted.shapes)[0])
        choices += [*data.choices, *rank_settings]
    if data is not None or config.privacy.unit != "example":  # else it depends on the number of rows of each client
        row_counts = {site.name: site.rows for site in sites}
        policy = privacy_policy_of(config, method, row_counts, local)
        open_secure_sums(config, policy, "check", row_counts)  # refuses secure aggregation that would hide nothing
        up_bytes = sum_bytes(config, policy)
        privacy = privacy_statement(policy, config, trained_values(method, adapted.shapes, head))
        if privacy is not None:
            privacy["larger_batches"] = larger_batches(policy, config)
        choices += policy.choices
    bill = basis_values(config.basis, method, adapted.shapes)
    run = PricedRun(
        shapes=adapted.shapes,
        head=head,
        clients=cohort,
        rounds=config.rounds,
        codec=config.server.codec,
        fraction=config.server.fraction,
        broadcasts=broadcasts(names, config, method, ranks),
        up_bytes=up_bytes,
        is_step=noise_kind(config, method)[0] == "shared",
        sends_moments=sends_moments(config, method),
    )
    basis = PricedBasis(**bill, clients=len(names), refreshes=len(refreshes(config, method)))
    prices = price_list(method, run, basis, also)
    warnings = batch_warnings(config, local, sites) if data is not None else []
    batch = config.train.batch_size
    if data is not None:  # a forward never has more rows than a client
        batch = min(batch, max((site.rows for site in sites), default=0) or batch)
    sizes = ModelSizes.of(config, base.model, adapted.shapes, blocks, base=weights, head=head, dtype=dtype)
    memory_of_clients = memory_by_clients(config, method, sizes, cohort, batch)
    memory, training = _memory(config, memory_of_clients, cohort, batch, machine)
    costs = phase_costs(config, method, sizes, machine, training, memory_of_clients(1), linear, work)
    if machine.memory is not None and max(cost.memory_bytes for cost in costs.values()) > machine.memory:
        warnings.append(_too_large(config, method, base, sizes, cohort, batch, costs, machine.memory))
    if why := _no_preflight(config, here, weights, choose_device(config.model.device)[0]):
        unknown.append(f"whether the model passes the preflight of a run: {why}")
    else:
        choices += Trainer(config, method, here.tokenizer, here.task).preflight.choices
    return {
        "settings": [asdict(choice) for choice in choices],
        "data": data.card.as_dict() if data else None,
        "clients": {site.name: site.rows for site in data.clients} if data else None,
        "values_per_client_round": {
            "up": traffic.up,
            "down": traffic.down,
            "head": traffic.head,
            "one_off": sum(bill.values()),
        },
        "bytes_per_client_round": round_bytes(method, traffic, run),
        "prices": [price.as_dict() for price in prices],
        "compared": [f"{method.spec.id} (rank {method.rank})" for method in also],
        "privacy": privacy,
        **memory,
        "phases": {phase: asdict(cost) for phase, cost in costs.items()},
        "seconds": sum(cost.seconds or 0 for cost in costs.values()) if work else None,
        "seconds_reason": f"{work}, {machine.says(dtype)}" if work else "unknown: it depends on the rows",
        "warnings": warnings,
        "unknown": unknown,
    }


def _refuse_missing_files(loaded: ResolvedConfig) -> None:
    """Raises UserError for a relative path of data that does not exist."""
    config, unused = loaded.config, unused_settings(loaded.config)
    paths = {"data.train": config.data.train, "data.test": config.data.test, "basis.data": config.basis.data}
    for key, path in paths.items():
        if path is None or key in unused or path.startswith("hub:") or path == "python-docs":
            continue
        place = Path(path).expanduser()
        if place.is_absolute() or place.exists() or loaded.origin.get(key, "").startswith("recipe "):
            continue
        try:
            load_table(path)
        except NotAvailableError as error:
            raise UserError(
                f"{key} = {path!r}: {error}. The path is relative to the current folder. Correct it, or change to the "
                f"right folder. To check the run without its rows, add --set {key}=none."
            ) from error


def _no_preflight(config: Config, here: Availability, weights: int, device: torch.device) -> str | None:
    """Returns why the model cannot be loaded for the preflight; None if it can."""
    name = resolve_name(config.model.name)[0]
    if missing := missing_package(config.model.quantize):
        return missing
    if config.model.placement != "single":
        return f"model.placement is {config.model.placement!r}, and this command uses one device"
    if here.tokenizer is None or not has_weights(name, config.model.revision):
        return f"the weights of {name} are not on this machine"
    if here.data is None and here.task.auto_class != "AutoModelForCausalLM":
        return "the number of classes is unknown"
    if (memory := memory_of(device)) is not None and weights > PREFLIGHT_SHARE * memory:
        return f"its weights need {bytes_text(weights)} of the {bytes_text(memory)} on {device.type}"
    return None


def _on_gpu(loaded: ResolvedConfig, gigabytes: float) -> ResolvedConfig:
    """Returns the configuration as it would run on a GPU that is not here."""
    model, why = loaded.config.model, f"--gpu {gigabytes:g}"
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    config = loaded.config.model_copy(update={"model": model.model_copy(update={"dtype": dtype, "device": "auto"})})
    origin = {**loaded.origin, "model.dtype": why} if model.dtype == "auto" else loaded.origin
    return replace(loaded, config=config, origin=origin)


def _too_large(
    config: Config,
    method: Method,
    base: BaseModel,
    sizes: ModelSizes,
    cohort: int,
    batch: int,
    costs: Mapping[str, Cost],
    memory: int,
) -> str:
    """Returns the warning that a run does not fit the memory, and what each of some settings would need instead."""
    phase, most = max(((phase, cost.memory_bytes) for phase, cost in costs.items()), key=lambda found: found[1])
    model, train = config.model, config.train
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("model.activation_checkpointing = true", {"activation_checkpointing": True}, {}),
        ("model.quantize = '4bit'", {"quantize": "4bit"}, {}),
        (f"model.max_seq_length = {model.max_seq_length // 2}", {"max_seq_length": model.max_seq_length // 2}, {}),
        (f"train.batch_size = {batch // 2}", {}, {"batch_size": batch // 2}),
    ]
    found = []
    for text, of_model, of_train in changes:
        changed = config.model_copy(
            update={"model": model.model_copy(update=of_model), "train": train.model_copy(update=of_train)}
        )
        weights = weight_bytes(base.model, changed.model.quantize, base.head)
        rows = min(batch, changed.train.batch_size)
        one = memory_by_clients(changed, method, replace(sizes, base=weights), cohort, rows)(1).total
        found.append((one, text))
    alone = memory_by_clients(config, method, sizes, cohort, batch)(1).total
    better = [f"{text}: {bytes_text(one)}" for one, text in sorted(found) if one < alone]
    return (
        f"The estimated memory, {bytes_text(most)} in the phase {phase!r}, is more than the {bytes_text(memory)} "
        f"of the device. A round of one client in a forward needs {bytes_text(alone)}"
        + (f"; with one more setting: {'; '.join(better)}" if better else "")
    )


def _as_served(loaded: ResolvedConfig) -> ResolvedConfig:
    """Returns the configuration as `fedsb federation serve` runs it, for a TOML file without data.train."""
    config = loaded.config
    served = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "flower"})})
    why = "auto: data.train is not set, so the rows are at the sites of `fedsb federation serve`"
    return replace(loaded, config=served, origin={**loaded.origin, "engine.name": why})


def _public_rows(config: Config, task: Task) -> list[str]:
    """Returns why the public rows of the basis are not available, if so."""
    try:
        public_rows(config, task)
    except NotAvailableError as error:
        return [f"the public rows of the basis: {error}"]
    return []


def _ranks(
    config: Config, method: Method, shapes: Shapes, names: Sequence[str], data: Data | None
) -> tuple[Mapping[str, int], Sequence[ResolvedSetting]]:
    """Returns the clients' ranks, as `client_ranks`. Clients with unknown names have the rank of the method."""
    if data is None and (config.data.train is None or config.clients.partition == "column"):
        return {}, ()
    return client_ranks(config, method, shapes, names)


def _work(config: Config, method: Method, local: LocalTraining, data: Data, cohort: int, share: int) -> Work:
    """Returns the tokens of the run. A row that is answered counts with as many tokens as it may write."""
    pool = [len(ids(example, "input_ids")) for site in data.participants for example in site.train]
    rows = sum(local.steps_for(site.rows) * local.rows_a_step for site in data.participants) / len(data.participants)
    padded = min(1.5 * sum(pool) / len(pool), max(pool))  # batches are as wide as their longest row
    evaluations = 1 + math.ceil(config.rounds / config.eval.every)
    written = sum(question_of(row).new_tokens for row in data.test if "question" in row)
    core = method.adapter == "core"
    reads = core and config.basis.kind in FROM_GRADIENTS
    shares = core and config.engine.name == "in_process" and not config.privacy.on
    return Work(
        trained=config.rounds * cohort * rows * padded,
        scored=(sum(len(ids(example, "input_ids")) for example in data.test) + written) * evaluations,
        basis=config.basis.samples * padded if reads else 0,
        share=max(share, len(data.participants)) * padded if shares and share else 0,
    )


def _memory(
    config: Config, memory_of_clients: Callable[[int], Memory], cohort: int, batch: int, machine: Machine
) -> tuple[dict[str, Any], Memory]:
    """Returns the bytes of training with their parts and reason, for clients trained together and for one alone."""
    setting = 1 if config.engine.name == "flower" else config.engine.clients_per_forward
    if setting == "auto":
        setting = auto_clients_per_forward(config, machine.device, machine.memory, memory_of_clients)[0]
    together = min(cohort, setting)
    found = memory_of_clients(together)
    parts = {key: value for key, value in asdict(found).items() if value}
    text = ", ".join(f"{key} {bytes_text(value)}" for key, value in parts.items())
    tokens = together * batch * config.model.max_seq_length
    said = {
        "memory_bytes": found.total,
        "memory_parts": parts,
        "memory_reason": f"an estimate: {text}; {together} client(s) with {tokens:,} tokens per forward",
        "client_memory_bytes": memory_of_clients(1).total,
    }
    return said, found
