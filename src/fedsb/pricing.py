"""What a run will cost, before it starts: bytes for this method and the others, memory, time.

Nothing is trained and no weights are loaded: layer shapes come from the model's config, on the meta device.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch

from fedsb.adapters.adapted import AdaptedModel, find_targets
from fedsb.adapters.basis import check_rank
from fedsb.adapters.layer import is_linear, linear_shape
from fedsb.charts import bytes_text
from fedsb.config import Loaded
from fedsb.data.sites import Data, open_data
from fedsb.data.tasks.base import ids, pad_token
from fedsb.engines.resolved import auto_cohort_size, local_training, public_rows, targets_choice
from fedsb.federation.basis_round import basis_values
from fedsb.federation.facts import client_ranks, refuse_what_facts_forbid
from fedsb.federation.prices import price_list
from fedsb.federation.schedule import refreshes, whole_broadcasts
from fedsb.methods import build_method
from fedsb.methods.contract import Method
from fedsb.model import choose_device, load_base, load_tokenizer
from fedsb.privacy.setup import promise_of, refuse_what_would_leak
from fedsb.privacy.statement import promised
from fedsb.settings import Config

OVERHEAD = 1.5  # of a real step over its matrix products, as seen with MiniLM on two cores


def estimate(loaded: Loaded) -> dict[str, Any]:
    """Everything `fedsb check` prints. Raises UserError for faults of settings, data and model."""
    config = loaded.config
    method = build_method(config.method.name, config.method.options)
    refuse_what_facts_forbid(config, method)
    refuse_what_would_leak(config, method)
    tokenizer = load_tokenizer(config.model)
    data = open_data(config, tokenizer)
    base = load_base(
        config.model,
        auto_class=data.task.auto_class,
        num_labels=len(data.task.label_names),
        pad_token=pad_token(tokenizer),
        shapes_only=True,
    )
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    linear = sum(math.prod(linear_shape(module)) for module in base.model.modules() if is_linear(module))
    targets = find_targets(base.model, config.model.targets, base.head)
    adapted = AdaptedModel(base.model, kind=method.adapter, targets=targets, head=base.head, scale=method.scale)
    if method.adapter == "core":
        check_rank(adapted.shapes, method.total_rank)
        public_rows(config, data.task)
    head = sum(t.numel() for t in adapted.head_tensors().values())
    sites = [data.pooled()] if method.facts.pools_data else data.taking_part
    names = [site.name for site in sites]
    ranks, rank_choices = client_ranks(config, method, adapted.shapes, names)
    cohort = min(config.server.clients_per_round or len(sites), len(sites))
    bill = basis_values(config.basis, method, adapted.shapes)
    prices = price_list(
        method,
        adapted.shapes,
        head=head,
        clients=cohort,
        rounds=config.rounds,
        basis=bill,
        sites=len(sites),
        refreshes=len(refreshes(config, method)),
        codec=config.server.codec,
        whole=whole_broadcasts(names, config, method, ranks),
    )
    traffic = method.traffic(adapted.shapes, head=head, clients=cohort)
    local = local_training(config, clients=len(data.taking_part) if method.facts.pools_data else 1)
    promise = promise_of(config, method, sites, local)
    seconds, seconds_reason = _seconds(config, method, data, linear, cohort)
    memory, memory_reason = _memory(config, adapted, weights, cohort)
    choices = [
        *loaded.choices(),
        *base.choices,
        targets_choice(config, targets),
        *data.choices,
        *rank_choices,
        *promise.choices,
    ]
    return {
        "settings": [asdict(choice) for choice in choices],
        "clients": {site.name: site.rows for site in data.sites},
        "values_a_client_a_round": {
            "up": traffic.up,
            "down": traffic.down,
            "head": traffic.head,
            "one_off": sum(bill.values()),
        },
        "prices": [price.as_dict() for price in prices],
        "privacy": promised(promise, config, traffic.up + traffic.head),
        "memory_bytes": memory,
        "memory_reason": memory_reason,
        "seconds": seconds,
        "seconds_reason": seconds_reason,
    }


def _seconds(config: Config, method: Method, data: Data, linear: int, cohort: int) -> tuple[float, str]:
    """(seconds, reason): 2 operations a weight and token forward, the same again backward to the activations."""
    local = local_training(config, clients=len(data.taking_part) if method.facts.pools_data else 1)
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


def _memory(config: Config, adapted: AdaptedModel, weights: int, cohort: int) -> tuple[int, str]:
    """(bytes, reason): the base once, the adapters, and the activations of one joint forward."""
    size = 2 if any(p.dtype != torch.float32 for p in adapted.model.parameters() if p.dim() > 1) else 4
    size_asked = config.engine.cohort_size
    if size_asked == "auto":
        size_asked, _ = auto_cohort_size(config, choose_device(config.model.device)[0])
    together = min(cohort, size_asked)
    tokens = together * config.train.batch_size * config.model.max_tokens
    per_token = sum(m + n for m, n in adapted.shapes.values())
    if config.model.activation_checkpointing:
        per_token //= max(len(adapted.shapes) // 7, 1)
    activations = tokens * per_token * size
    return weights + activations, (
        f"the base once, {bytes_text(weights)}, and the activations of {tokens:,} tokens in one forward"
    )


def _operations_a_second(device: torch.device) -> float:
    """The device's speed at a matrix product, float32."""
    a = torch.randn(768, 768, device=device)
    a @ a
    started = time.perf_counter()
    for _ in range(20):
        b = a @ a
    b.sum().item()
    return 20 * 2 * 768**3 / (time.perf_counter() - started)
