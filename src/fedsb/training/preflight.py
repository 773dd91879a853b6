"""Tries a loaded model, with the adapter in place, before anything is charged or trained.

Every probe reads made-up tokens: no row of anyone's data. In order:

    forward, backward   the loss is finite, and the model calls every layer whose weight it reads
    causality           next-token tasks: a logit does not depend on later tokens
    routing             every adapted layer sees one row per example, so that clients and examples can share a forward
    independence        a row's gradient is the same alone and in company, whatever the other rows are
    PEFT                a made-up adapter, written as plain LoRA and loaded by PEFT, gives the same logits

Shapes: b rows, t tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import torch
from torch import Tensor

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.core import core_left
from fedsb.adapters.export import BaseModelInfo
from fedsb.adapters.export_check import try_adapter
from fedsb.adapters.factors import Factors
from fedsb.adapters.layer import RoutingError
from fedsb.config.resolved import ResolvedSetting
from fedsb.data.tasks.base import Batch, Example, Task, ids, inputs_of
from fedsb.data.tasks.causal import CausalTask
from fedsb.models.layers import kinds
from fedsb.models.limits import batch_dependent_positions
from fedsb.training.scoring import forward
from fedsb.utils.errors import DiskError, RunError, UserError
from fedsb.utils.files import disk_errors
from fedsb.utils.rng import keyed_generator
from fedsb.utils.tensors import Tensors

RANK = 2  # of the adapter that the probes train
SHORT = 6  # tokens of the short row, about
TOLERANCE = 1e-4  # of a gradient's or a logit's difference, relative, in float32
TOLERANCE_HALF = 0.1  # in 16 bits, whose kernels round differently for each shape
FAULTS = (
    *(RuntimeError, ValueError, TypeError, IndexError),
    *(KeyError, AttributeError, NotImplementedError, AssertionError),
)


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The findings of the preflight. A reason is None if the model has no such fault."""

    unroutable: str | None  # why rows of several clients or examples cannot share a forward
    mixing: str | None  # why a row's result depends on the other rows of its batch
    untouched: tuple[str, ...]  # kinds of adapted layers that got no gradient from the batch
    seconds: float

    @property
    def alone(self) -> str | None:
        """Why clients must be trained one at a time."""
        return self.unroutable or self.mixing

    @property
    def choices(self) -> tuple[ResolvedSetting, ...]:
        said = self.alone or "the adapter trains, and a row's gradient does not depend on the other rows of its batch"
        choices = [ResolvedSetting(key="preflight", value=f"{self.seconds:.1f} s", reason=said)]
        if self.untouched:
            reason = "warning: no gradient reached these layers in a made-up batch; they are sent, perhaps for nothing"
            choices.append(ResolvedSetting(key="preflight.untouched", value=", ".join(self.untouched), reason=reason))
        return tuple(choices)


def preflight(adapted: AdaptedModel, task: Task, head: Tensors, *, private_rows: bool, batch: int) -> Preflight:
    """Tries the model. The adapter's tensors are replaced.

    Args:
        head: the head's first tensors, without the axis of clients.
        private_rows: whether the run protects single rows, which must then be independent of each other.
        batch: the rows of one forward in the run; no probe fills the window with more.

    Raises:
        UserError: the model fails on a batch, is not causal where it must be, has targets that the adapter cannot
            reach, or mixes rows in a run that protects single rows. Each with its remedy.
    """
    started = time.monotonic()
    short, long, other = _rows(task)
    tensors = _made_up(adapted, head)
    with _explained(adapted, task):
        alone = _gradient(adapted, task, tensors, [short])  # before the model reads a longer row
        untouched = _try_training(adapted, task, tensors, [short, long] if batch > 1 else [long])
        if isinstance(task, CausalTask):
            _try_causality(adapted, task, tensors, short, other)
        unroutable = _routing_fault(adapted, task, tensors, [short, other, short])
        adapted.routing.one_by_one = unroutable is not None
        rows = [short, other, long] if batch > 1 else [short, other]
        mixing = _mixing(adapted, task, tensors, rows, alone, together=unroutable is None)
    if mixing and private_rows:
        raise UserError(
            f"privacy.unit = 'example' cannot be kept with this model: {mixing}. So one row enters the gradients of "
            "others, and clipping them does not bound what it changes. Take another model (one whose attention masks "
            "padding and which reads each row by itself), or privacy.unit = 'client'"
        )
    return Preflight(unroutable=unroutable, mixing=mixing, untouched=untouched, seconds=time.monotonic() - started)


def made_up_adapter(
    adapted: AdaptedModel, task: Task, head: Tensors
) -> tuple[dict[str, Factors], Tensors, Batch, Tensor]:
    """Returns a made-up adapter as plain LoRA, its head, an input, and the logits with both in place."""
    tensors = _made_up(adapted, head)
    with torch.no_grad(), _explained(adapted, task):
        adapted.load(tensors)
        logits, batch = forward(adapted.model, task, [_rows(task)[0]], whole=True)
    factors = {}
    for layer in adapted.shapes:
        A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]
        if adapted.kind == "core":
            B = core_left(B, tensors[f"{layer}.R"][0])
        else:
            A, B = A[0], B[0]
        factors[layer] = Factors(A=A, B=B, scale=adapted.scale)
    return factors, head, inputs_of(batch), logits


def try_with_peft(
    model: torch.nn.Module,
    inputs: Batch,
    logits: Tensor,
    factors: Mapping[str, Factors],
    head: Tensors,
    base: BaseModelInfo,
) -> None:
    """Tries at the start what a run ends with. Raises UserError where PEFT does not load such an adapter as it is."""
    modes = [(module, module.training) for module in model.modules()]  # activation checkpointing is one of them
    try:
        with disk_errors(Path(gettempdir())):
            try_adapter(model, inputs, logits, factors, head, base)
    except DiskError:
        raise
    except (UserError, RunError) as error:
        raise UserError(f"The adapter of such a run could not be used. Nothing was trained. {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode


def _rows(task: Task) -> tuple[Example, Example, Example]:
    """Returns a short row, one that fills the window and one of other tokens, all made up, the same for every site."""
    draw = keyed_generator(0, "preflight")
    window = task.max_tokens
    return (
        task.made_up(min(SHORT, window), draw),
        task.made_up(window, draw),
        task.made_up(min(2 * SHORT, window), draw),
    )


def _made_up(adapted: AdaptedModel, head: Tensors) -> Tensors:
    """Returns a small random adapter of one client, with its axis, so that every factor gets a gradient."""
    draw = keyed_generator(0, "preflight adapter")

    def drawn(*shape: int, scale: float) -> Tensor:
        return torch.from_numpy(draw.normal(0, scale, size=shape)).float()

    tensors: Tensors = {}
    for layer, (m, n) in adapted.shapes.items():
        A, B = drawn(RANK, n, scale=n**-0.5), drawn(m, RANK, scale=0.1 * m**-0.5)
        if adapted.kind == "core":
            tensors |= {f"{layer}.A": A, f"{layer}.B": B, f"{layer}.R": drawn(1, 1, RANK, RANK, scale=1.0)}
        else:
            tensors |= {f"{layer}.A": A.unsqueeze(0), f"{layer}.B": B.unsqueeze(0)}
    return {**tensors, **{key: x.unsqueeze(0) for key, x in head.items()}}


def _trained(adapted: AdaptedModel, tensors: Tensors) -> frozenset[str]:
    return frozenset(key for key in tensors if not adapted.is_shared(key))


def _loss(adapted: AdaptedModel, task: Task, rows: Sequence[Example]) -> Tensor:
    """Returns the mean loss of each row, (b,)."""
    logits, batch = forward(adapted.model, task, rows)
    loss_b, weight_b = task.losses(logits, batch)
    return loss_b / weight_b.clamp(min=1)


def _try_training(adapted: AdaptedModel, task: Task, tensors: Tensors, rows: Sequence[Example]) -> tuple[str, ...]:
    """Returns the kinds of layers that got no gradient.

    Raises UserError where the loss is not finite, or where a target's weight is read and its layer never called.
    """
    adapted.load(tensors, trainable=_trained(adapted, tensors))
    called: set[str] = set()
    weights = {name: layer.base.weight for name, layer in adapted.layers.items()}
    readable = {name: w for name, w in weights.items() if isinstance(w, torch.nn.Parameter) and w.is_floating_point()}
    taps = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in adapted.layers.items()
    ]
    try:
        loss_b = _loss(adapted, task, rows)
        if not bool(loss_b.isfinite().all()):
            raise UserError(
                "The model's loss on a made-up batch is not a number, before any training. Its weights may be damaged, "
                "or its dtype too small: try --set model.dtype=float32"
            )
        missed = [name for name in readable if name not in called]
        for name in missed:  # its weight is multiplied elsewhere, or nothing of this batch went through it
            readable[name].requires_grad_(True)
        if missed:
            _loss(adapted, task, rows).sum().backward()  # type: ignore[no-untyped-call]
        else:
            loss_b.sum().backward()  # type: ignore[no-untyped-call]
        read = [name for name in missed if readable[name].grad is not None]
        moved = {key.rpartition(".")[0] for key, p in adapted.parameters().items() if p.grad is not None}
    finally:
        for tap in taps:
            tap.remove()
        for w in readable.values():
            w.requires_grad_(False)
            w.grad = None
    if read:
        raise UserError(
            f"model.target_modules: the model reads the weights of {', '.join(kinds(read))} and never calls these "
            "layers, so that an adapter there has no effect in training and changes the outputs when it is merged. "
            "Leave them out of model.target_modules"
        )
    return tuple(sorted(set(kinds(list(adapted.layers))) - set(kinds(sorted(moved & adapted.layers.keys())))))


@torch.no_grad()
def _try_causality(adapted: AdaptedModel, task: Task, tensors: Tensors, row: Example, other: Example) -> None:
    """Raises UserError where a logit depends on a later token, or on which logits are computed."""
    tokens = ids(row, "input_ids")
    last = next((token for token in [*ids(other, "input_ids"), *tokens] if token != tokens[-1]), None)
    if len(tokens) < 2 or last is None:  # a vocabulary of one token
        return
    adapted.load(tensors)
    changed: Example = {**row, "input_ids": [*tokens[:-1], last]}
    whole = [forward(adapted.model, task, [one], whole=True)[0][0, : len(tokens) - 1] for one in (row, changed)]
    if _difference(whole[0].float(), whole[1].float()) > _tolerance(adapted):
        raise UserError(
            "The model is not causal: what it predicts for a token depends on the tokens after it, so that its "
            "next-token loss and perplexity mean nothing. Take a decoder-only model (Llama, Qwen, Gemma, GPT-2) for "
            "this task, or task.kind = 'classification' for an encoder"
        )
    targets = forward(adapted.model, task, [row])[0].reshape(-1, whole[0].shape[-1])[: len(tokens) - 1]
    if _difference(targets.float(), whole[0].float()) > _tolerance(adapted):
        raise UserError("The model's output layer cannot compute the logits of some positions only. Take another model")


def _routing_fault(adapted: AdaptedModel, task: Task, tensors: Tensors, rows: Sequence[Example]) -> str | None:
    """Returns why this model's layers do not see one row per example; None if they do.

    The number of rows that are tried differs from their number of tokens.
    """
    width = max(len(ids(row, "input_ids")) for row in rows)
    rows = rows[:2] if width != 2 else rows
    adapted.load(tensors)
    adapted.routing.rows = len(rows)
    try:
        with torch.no_grad():
            forward(adapted.model, task, rows)
    except RoutingError as error:
        return str(error)
    finally:
        adapted.routing.rows = None
    return None


def _mixing(
    adapted: AdaptedModel, task: Task, tensors: Tensors, rows: Sequence[Example], alone: Tensor, *, together: bool
) -> str | None:
    """Returns why the first row's gradient depends on what else the model reads; None where it does not.

    `alone` is its gradient before the model has read a longer row. The longest row is last. With `together` the others
    are in the same forward, else in one before it.
    """
    row, *others = rows
    if any(type(module).__name__ == "Linear8bitLt" for module in adapted.model.modules()):
        return "its 8-bit layers (LLM.int8()) look for outliers in the whole batch"
    if known := batch_dependent_positions(adapted.model, task.max_tokens):
        return known
    for other in others:
        if together:
            beside = _gradient(adapted, task, tensors, [row, other])
            if (by := _difference(beside, alone)) > _tolerance(adapted):
                why = "its padding, or the batch, is read"
                return f"a row's gradient changes by {by:.1%} in a batch with a longer row ({why})"
        else:
            _gradient(adapted, task, tensors, [other])
    if (by := _difference(_gradient(adapted, task, tensors, [row]), alone)) > _tolerance(adapted):
        return f"a row's gradient changes by {by:.1%} after a longer row was read (the model keeps a state)"
    return None


def _gradient(adapted: AdaptedModel, task: Task, tensors: Tensors, rows: Sequence[Example]) -> Tensor:
    """Returns the first row's gradient of all that trains, as one vector."""
    trained = _trained(adapted, tensors)
    adapted.load(
        {key: x.expand(len(rows), *x.shape[1:]) if key in trained else x for key, x in tensors.items()},
        trainable=trained,
    )
    adapted.routing.rows = len(rows) if len(rows) > 1 else None
    try:
        _loss(adapted, task, rows).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        adapted.routing.rows = None
    parameters = adapted.parameters()
    parts = [torch.zeros_like(p[0]) if p.grad is None else p.grad[0] for _, p in sorted(parameters.items())]
    return torch.cat([part.detach().flatten().float() for part in parts])


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def _tolerance(adapted: AdaptedModel) -> float:
    dtypes = {p.dtype for p in adapted.model.parameters() if p.is_floating_point()}
    return TOLERANCE if dtypes <= {torch.float32, torch.float64} else TOLERANCE_HALF


@contextmanager
def _explained(adapted: AdaptedModel, task: Task) -> Iterator[None]:
    """Raises UserError where the model fails on a batch."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The model does not fit into the device's memory with rows of {task.max_tokens} tokens: "
            f"{str(error).splitlines()[0]:.200}. Nothing was trained. Lower train.batch_size or "
            f"model.max_seq_length, or "
            "set model.activation_checkpointing or model.quantize; `fedsb check` estimates the memory"
        ) from error
    except FAULTS as error:
        first = (str(error).strip().splitlines() or [""])[0]
        kind = type(getattr(adapted.model, "base_model", adapted.model)).__name__
        raise UserError(
            f"The model ({kind}) fails on a made-up batch of rows of up to {task.max_tokens} tokens: "
            f"{type(error).__name__}: {first:.300}. Nothing was trained. If rows of that length are too long for it, "
            "set model.max_seq_length lower; if layers that it adapts are at fault, name others in "
            "model.target_modules; else "
            "take another model"
        ) from error
