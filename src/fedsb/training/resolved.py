"""Settings that are resolved from the data and the device, each with its reason, for a run and for its price."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData
from fedsb.data.sources import load_table
from fedsb.data.tables import draw_rows, format_of
from fedsb.data.tasks.base import Example, Task
from fedsb.data.tasks.chat import Chat
from fedsb.data.tasks.instruction import Instruction
from fedsb.models.layers import kinds
from fedsb.training.local import LocalTraining
from fedsb.training.memory import Memory
from fedsb.utils.environment import free_memory_of
from fedsb.utils.errors import UserError
from fedsb.utils.formatting import bytes_text
from fedsb.utils.tensors import Shapes

MEMORY_SHARE = 0.8  # of a device's memory, that the estimate for clients in one forward may take
SHARE_ROWS, SHARE_WEIGHTS = 16, 500_000_000  # of the captured share: rows, and the adapted weights above which none
SHARDED_BUDGET = 1 << 30  # bytes for gradients of whole weights on each rank
CPU_TOKENS, GPU_TOKENS = 4096, 16384  # that a joint forward may hold; see docs/decisions.md


def public_rows(config: Config, task: Task) -> list[Example]:
    """Returns what `update` looks at: basis.samples rows of the file that the user declared public, by the seed."""
    basis = config.basis
    if basis.kind != "update":
        return []
    if basis.data is None:
        raise UserError(
            "basis.kind = 'update' looks at data: name a file of public rows with basis.data = PATH. "
            "To look at the clients' own rows in a simulation, say basis.kind = 'update-pooled'"
        )
    table = load_table(basis.data, form=format_of(config))
    task.columns_of(table)
    return task.encode(draw_rows(table, basis.samples, config.seed, "basis rows").rows)[0]


def share_rows(config: Config, shapes: Shapes) -> tuple[int, str]:
    """Returns the number of rows on which a run reports the captured share, and the reason: 0 for a large model."""
    if config.basis.share_samples != "auto":
        return config.basis.share_samples, "as configured"
    weights = sum(math.prod(shape) for shape in shapes.values())
    if weights <= SHARE_WEIGHTS:
        return SHARE_ROWS, "auto: the adapted layers are small"
    return 0, f"auto: the gradients of {weights:,} adapted weights take long, for a figure of the report"


def gradient_budget(config: Config, device: torch.device, *, free: int | None = None) -> int:
    """Returns the bytes for gradients of whole weights: as set, or half of what is `free`, by default now.

    With a sharded model, where free memory may differ between the ranks, it is SHARDED_BUDGET.
    """
    if config.basis.budget_mib != "auto":
        return config.basis.budget_mib << 20
    if config.model.placement == "sharded":  # all ranks must form the same groups of layers
        return SHARDED_BUDGET
    free = free_memory_of(device) if free is None else free
    return 1 << 30 if free is None else max(free // 2, 1 << 26)


def auto_clients_per_forward(
    config: Config, device: torch.device, there: int | None, memory_by_clients: Callable[[int], Memory]
) -> tuple[int, str]:
    """Returns (clients per forward, reason): as many as fit a budget of tokens and the device's memory, at least one.

    `there` are the bytes of the device's memory, and not of its free memory, so that a resumed run rounds as before.
    """
    if config.model.quantize == "8bit":
        return 1, "auto: 8-bit products look at the whole batch, which must be one client's"
    tokens = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    size = max(1, tokens // (config.train.batch_size * config.model.max_seq_length))
    limit = None if there is None else MEMORY_SHARE * there
    if limit is not None and size > 1 and memory_by_clients(size).total > limit:
        while size > 1 and memory_by_clients(size).total > limit:
            size -= 1
        why = f"{bytes_text(memory_by_clients(size).total)} of the {bytes_text(there)} on {device.type}"
        return size, f"auto: as many as fit the memory, an estimate of {why}"
    return size, f"auto: up to {tokens:,} tokens in one forward on {device.type}"


def targets_choice(config: Config, targets: Sequence[str], without: Mapping[str, str]) -> ResolvedSetting:
    """Says which layers are adapted and which kinds of layers "blocks" leaves out."""
    reason = f"model.target_modules = {config.model.target_modules!r}"
    if config.model.target_modules == "blocks" and without:
        by_reason: dict[str, list[str]] = {}
        for name, why in without.items():
            by_reason.setdefault(why, []).append(name)
        reason += "; not adapted: " + "; ".join(
            f"{', '.join(kinds(names))} ({why})" for why, names in by_reason.items()
        )
    return ResolvedSetting(key="model.target_modules", value=f"{len(targets)} layers", reason=reason)


def batch_warnings(config: Config, local: LocalTraining, sites: Sequence[ClientData]) -> list[str]:
    """Returns a warning where clients have fewer rows than one step takes, of which each step then takes all."""
    short = [site for site in sites if site.rows < local.rows_a_step]
    if not short:
        return []
    train = config.train
    asked = f"train.batch_size = {train.batch_size:,}"
    if train.gradient_accumulation_steps > 1:
        steps = train.gradient_accumulation_steps
        asked += f" with train.gradient_accumulation_steps = {steps} ({local.rows_a_step:,} rows per step)"
    largest = max(sites, key=lambda site: site.rows)
    which = "every client" if len(short) == len(sites) else f"{len(short)} of {len(sites)} clients"
    return [
        f"{asked}, but {which} has fewer rows than that (the largest client, {largest.name}, has {largest.rows:,}). "
        "Each step of such a client uses all of its rows"
    ]


def end_choices(task: Task | None) -> list[ResolvedSetting]:
    """Returns the token that a trained answer ends with, and a warning where the chat template writes none."""
    if not isinstance(task, Instruction | Chat) or task.tokenizer is None:
        return []
    end = task.trained_end
    if end is None:
        reason = (
            "warning: the chat template writes no end token after an answer, so the model does not learn to stop, and "
            "writes until its limit of new tokens. Put one in the tokenizer's chat_template, such as {{ eos_token }}"
        )
        return [ResolvedSetting(key="task.end", value="none", reason=reason)]
    source = "the chat template's" if task.tokenizer.chat_template else "the tokenizer's"
    return [
        ResolvedSetting(key="task.end", value=str(task.tokenizer.convert_ids_to_tokens(end)), reason=f"auto: {source}")
    ]


def local_training(config: Config, *, clients: int = 1) -> LocalTraining:
    """Returns the resolved settings of [train]. A pooled client makes the steps of all `clients` of a round."""
    train = config.train
    together = min(config.server.clients_per_round or clients, clients)
    steps = None if train.local_steps is None else train.local_steps * together
    return LocalTraining(
        steps=steps,
        epochs=train.local_epochs,
        batch_size=train.batch_size,
        accumulate=train.gradient_accumulation_steps,
        optimizer=train.optimizer,
        lr=train.lr,
        head_lr=train.head_lr,
        weight_decay=train.weight_decay,
        momentum=train.momentum,
        clip_norm=train.max_grad_norm or None,
        schedule=train.schedule,
        warmup=train.warmup_ratio,
        dropout=train.dropout,
        keep_optimizer=train.persist_optimizer_state,
        rounds=config.rounds,
    )
