"""What a run will cost, before it starts: bytes for this method and the others, memory, time.

Nothing is trained and no weights are loaded: layer shapes come from the model's config, on the meta device. Rows
that are not at hand are no fault: bytes and memory are priced without them, and what cannot be known is said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fedsb.adapters.adapted import AdaptedModel, Shapes, find_targets
from fedsb.adapters.basis import check_rank
from fedsb.adapters.layer import is_linear, linear_shape
from fedsb.at_hand import at_hand
from fedsb.charts import bytes_text
from fedsb.comparison.contenders import Contender, contenders_of
from fedsb.config import Loaded
from fedsb.data.sites import Data, elsewhere
from fedsb.data.tasks import TASKS
from fedsb.data.tasks.base import Task, ids, pad_token
from fedsb.engines.resolved import auto_cohort_size, end_choices, local_training, open_sums, public_rows, targets_choice
from fedsb.errors import NotAtHandError, UserError
from fedsb.federation.basis_round import basis_values
from fedsb.federation.client import LocalTraining
from fedsb.federation.codec import payload_bytes
from fedsb.federation.facts import client_ranks, refuse_what_facts_forbid, refuse_what_needs_one_place
from fedsb.federation.prices import price_list
from fedsb.federation.schedule import refreshes, whole_broadcasts
from fedsb.memory import Memory, trained_values, training_memory
from fedsb.methods import build_method
from fedsb.methods.contract import Method
from fedsb.models.load import BaseModel, choose_device, choose_dtype, load_base
from fedsb.models.quantise import missing_package, weight_bytes
from fedsb.privacy.setup import promise_of, refuse_what_would_leak
from fedsb.privacy.statement import promised
from fedsb.settings import Choice, Config

OVERHEAD = 1.5  # of a real step over its matrix products, as seen with MiniLM on two cores


def estimate(loaded: Loaded) -> dict[str, Any]:
    """Everything `fedsb check` prints. Raises UserError for faults of settings, data and model."""
    if loaded.config.data.train is None and "engine.name" not in loaded.origin:
        loaded = _as_served(loaded)
    config = loaded.config
    method = build_method(config.method.name, config.method.options)
    refuse_what_facts_forbid(config, method)
    refuse_what_would_leak(config, method)
    if config.engine.name == "flower":
        refuse_what_needs_one_place(config, method)
    here = at_hand(config)
    data, unknown = here.data, [*here.unknown]
    base = load_base(
        config.model,
        auto_class=here.task.auto_class,
        num_labels=here.classes,
        pad_token=None if here.tokenizer is None else pad_token(here.tokenizer),
        shapes_only=True,
    )
    if said := missing_package(config.model.quantize):
        unknown.append(said)
    weights = weight_bytes(base.model, config.model.quantize, base.head)
    linear = sum(math.prod(linear_shape(module)) for module in base.model.modules() if is_linear(module))
    blocks = {
        name: linear_shape(base.model.get_submodule(name)) for name in find_targets(base.model, "blocks", base.head)
    }
    targets = find_targets(base.model, config.model.targets, base.head)
    adapted = AdaptedModel(base.model, kind=method.adapter, targets=targets, head=base.head, scale=method.scale)
    if method.adapter == "core":
        check_rank(adapted.shapes, method.total_rank)
        if data is not None:
            unknown += _public_rows(config, here.task)
    head = sum(t.numel() for t in adapted.head_tensors().values())
    names = ["central"] if method.facts.pools_data else here.clients
    ranks, rank_choices = _ranks(config, method, adapted.shapes, names, data)
    cohort = min(config.server.clients_per_round or len(names), len(names))
    bill = basis_values(config.basis, method, adapted.shapes)
    contenders = _rivals(loaded)
    prices = price_list(
        method,
        adapted.shapes,
        head=head,
        clients=cohort,
        rounds=config.rounds,
        basis=bill,
        sites=len(names),
        refreshes=len(refreshes(config, method)),
        codec=config.server.codec,
        whole=whole_broadcasts(names, config, method, ranks),
        also=[contender.method for contender in contenders if not contender.is_control],
    )
    traffic = method.traffic(adapted.shapes, head=head, clients=cohort)
    privacy, seconds, seconds_reason = None, None, "not known: it depends on the rows"
    choices = [*loaded.choices(), *base.choices, targets_choice(config, targets), *end_choices(here.task)]
    sites = [elsewhere(name, 0) for name in names]
    local = local_training(config, clients=len(here.clients) if method.facts.pools_data else 1)
    if data is not None:
        sites = [data.pooled()] if method.facts.pools_data else data.taking_part
        seconds, seconds_reason = _seconds(config, local, data, linear, cohort)
        choices += [*data.choices, *rank_choices]
    if data is not None or config.privacy.unit != "example":  # else it depends on how many rows each has
        promise = promise_of(config, method, sites, local)
        open_sums(config, promise, "check", sites)  # refuses a sum that hides nothing
        privacy = promised(promise, config, trained_values(method, adapted.shapes, head))
        choices += promise.choices
    memory = _memory(config, method, base, adapted, blocks, weights, head, cohort)
    return {
        "settings": [asdict(choice) for choice in choices],
        "clients": {site.name: site.rows for site in data.sites} if data else None,
        "values_a_client_a_round": {
            "up": traffic.up,
            "down": traffic.down,
            "head": traffic.head,
            "one_off": sum(bill.values()),
        },
        "bytes_a_client_a_round": {
            way: payload_bytes(config.server.codec, values + head)
            for way, values in (("up", traffic.up), ("down", traffic.down))
        },
        "prices": [price.as_dict() for price in prices],
        "compared": [f"{contender.method.facts.id} (rank {contender.method.rank})" for contender in contenders],
        "privacy": privacy,
        **memory,
        "seconds": seconds,
        "seconds_reason": seconds_reason,
        "unknown": unknown,
    }


def _as_served(loaded: Loaded) -> Loaded:
    """As `fedsb serve` runs it, where the TOML leaves data.train out."""
    config = loaded.config
    served = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "flower"})})
    why = "auto: data.train is not set, so the rows are at the sites of `fedsb serve`"
    return replace(loaded, config=served, origin={**loaded.origin, "engine.name": why})


def _rivals(loaded: Loaded) -> list[Contender]:
    """What [compare] names, to be priced too; what is wrong with it, `fedsb compare` says."""
    try:
        return contenders_of(loaded) if loaded.config.compare.methods or loaded.config.compare.contenders else []
    except UserError:
        return []


def _public_rows(config: Config, task: Task) -> list[str]:
    try:
        public_rows(config, task)
    except NotAtHandError as error:
        return [f"the public rows of the basis: {error}"]
    return []


def _ranks(
    config: Config, method: Method, shapes: Shapes, names: Sequence[str], data: Data | None
) -> tuple[Mapping[str, int], Sequence[Choice]]:
    """As `client_ranks`; clients whose names are not known here all have the method's own rank."""
    if data is None and (config.data.train is None or config.clients.split == "column"):
        return {}, ()
    return client_ranks(config, method, shapes, names)


def _seconds(config: Config, local: LocalTraining, data: Data, linear: int, cohort: int) -> tuple[float, str]:
    """(seconds, reason): 2 operations a weight and token forward, the same again backward to the activations."""
    pool = [len(ids(example, "input_ids")) for site in data.taking_part for example in site.train]
    rows = sum(local.steps_for(site.rows) * local.rows_a_step for site in data.taking_part) / len(data.taking_part)
    padded = 1.5 * sum(pool) / len(pool)  # batches are as wide as their longest row
    trained = config.rounds * cohort * rows * padded
    scored = sum(len(ids(example, "input_ids")) for example in data.test) * (
        1 + math.ceil(config.rounds / config.eval.every)
    )
    speed = _operations_a_second(choose_device(config.model.device)[0])
    seconds = OVERHEAD * 2 * linear * (2 * trained + scored) / speed
    return seconds, f"{trained:,.0f} tokens trained, {scored:,} scored, at {speed / 1e9:,.0f} GFLOP/s measured just now"


def _memory(
    config: Config,
    method: Method,
    base: BaseModel,
    adapted: AdaptedModel,
    blocks: Shapes,
    weights: int,
    head: int,
    cohort: int,
) -> dict[str, Any]:
    """Bytes of training, their parts and their reason, where as many clients train together as would; and of one."""
    device = choose_device(config.model.device)[0]
    wanted = 1 if config.engine.name == "flower" else config.engine.cohort_size
    together = min(cohort, auto_cohort_size(config, device)[0] if wanted == "auto" else wanted)
    model: Any = base.model
    vocabulary = (
        0
        if TASKS[config.task.kind].auto_class != "AutoModelForCausalLM"
        else int(model.config.get_text_config().vocab_size)
    )

    def of(clients: int) -> Memory:
        return training_memory(
            method,
            adapted.shapes,
            blocks,
            base=weights,
            head=head,
            together=clients,
            cohort=cohort,
            tokens=clients * config.train.batch_size * config.model.max_tokens,
            vocabulary=vocabulary,
            private_rows=clients * config.train.batch_size if config.privacy.unit == "example" else 0,
            dtype=choose_dtype(config.model.dtype, device)[0],
            activation_checkpointing=config.model.activation_checkpointing,
        )

    found = of(together)
    parts = {key: value for key, value in asdict(found).items() if value}
    said = ", ".join(f"{key} {bytes_text(value)}" for key, value in parts.items())
    tokens = together * config.train.batch_size * config.model.max_tokens
    return {
        "memory_bytes": found.total,
        "memory_parts": parts,
        "memory_reason": f"an estimate: {said}; {together} client(s), {tokens:,} tokens in one forward",
        "client_memory_bytes": of(1).total,
    }


def _operations_a_second(device: torch.device) -> float:
    """The device's speed at a matrix product, float32."""
    a = torch.randn(768, 768, device=device)
    a @ a
    started = time.perf_counter()
    for _ in range(20):
        b = a @ a
    b.sum().item()
    return 20 * 2 * 768**3 / (time.perf_counter() - started)
