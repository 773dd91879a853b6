"""Many clients trained in one forward: their batches are joined row by row, each row meets its own client's adapter.

The base model is in memory once, whatever the number of clients. Loss mean, clipping, step count, schedule and decay
are each client's own; a client that has finished its steps leaves the batch. K clients together end where K clients
one after another end, to float tolerance; with K = 1 it is plain training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsb.adapters.adapted import AdaptedModel, Tensors
from fedsb.data.tasks.base import Example, Task
from fedsb.privacy.mechanism import DPMechanism
from fedsb.training.local import LocalTraining, draw_batches
from fedsb.training.optimizer import clip_by_client, step_by_client
from fedsb.training.per_example import clipped_sums
from fedsb.training.scoring import forward
from fedsb.utils.errors import DivergedError
from fedsb.utils.rng import keyed_generator

Penalty = Callable[[Mapping[str, Tensor]], Tensor | None]
Keys = Sequence[tuple[int | str, ...]]  # for each client, what its draws of this step are keyed by


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client in a round: its rows, its adapter's tensors, and, where they are kept, its optimiser's moments."""

    name: str
    examples: Sequence[Example]
    tensors: Tensors
    moments: Tensors = field(default_factory=dict)
    losses: tuple[float, ...] = ()  # one a step, the mean over the step's rows

    @property
    def loss(self) -> float:
        """Mean over the round's steps."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan


def train_together(
    adapted: AdaptedModel,
    task: Task,
    members: Sequence[Member],
    trainable: frozenset[str],
    local: LocalTraining,
    *,
    seed: int,
    round: int,
    penalty: Penalty | None = None,
    mechanisms: Mapping[str, DPMechanism] | None = None,
    watch: bool = True,
) -> list[Member]:
    """Trains the members for one round, jointly; gives them back in their order, with new tensors, moments and losses.

    `penalty` is the method's local regulariser: of the trained tensors (K, ...), one value a client (K,), or none.
    With `mechanisms`, by client, every step is one of DP-SGD: rows from the mechanism's own draw, each row's
    gradient clipped,
    noise on their sum.
    Raises DivergedError naming client and round at a loss that is NaN or infinite. Without `watch` it goes on: where
    losses may not be told, an end would tell of one.
    """
    steps = {m.name: mechanisms[m.name].plan.steps if mechanisms else local.steps_for(len(m.examples)) for m in members}
    batches = {
        m.name: list(draw_batches(local, rows=len(m.examples), seed=seed, client=m.name, round=round))
        for m in members
        if mechanisms is None
    }
    if mechanisms is not None:
        for m in members:
            mechanisms[m.name].charge(round + 1)
    now = {m.name: m for m in members}
    start = 0
    for end in sorted(set(steps.values())):  # a stage: the steps that the same clients take together
        running = [m for m in now.values() if steps[m.name] > start]
        moments = {key: value.to(adapted.device) for key, value in _join_moments([m.moments for m in running]).items()}
        tensors = {key: x.to(adapted.device) for key, x in join_tensors(adapted, [m.tensors for m in running]).items()}
        adapted.load(tensors, trainable=trainable)
        parameters = {key: tensors[key] for key in sorted(trainable)}  # the model's own, changed in place
        losses: list[list[float]] = []
        for step in range(start, end):
            if mechanisms is None:
                rows = [[m.examples[i] for i in batches[m.name][step]] for m in running]
                keys = [(seed, "dropout", m.name, round, step) for m in running]
                losses.append(_backward(adapted, task, rows, local, keys))
                if penalty is not None and (extra_K := penalty(adapted.parameters())) is not None:
                    extra_K.sum().backward()  # type: ignore[no-untyped-call]
                gradients = _gradients(adapted, local)
            else:
                own = [mechanisms[m.name] for m in running]
                rows = [[m.examples[i] for i in mechanism.draw()] for m, mechanism in zip(running, own, strict=True)]
                sums, each = clipped_sums(
                    adapted, task, tensors, trainable, rows, own[0].plan.clip, local.batch_size * len(running)
                )
                losses.append([sum(one) / len(one) if one else 0.0 for one in each])
                gradients = _noised(own, sums, [len(one) for one in rows])
            if watch:
                _check_finite(running, losses[-1], round, step)
            factors = [local.lr_factor(round, step, steps[m.name]) for m in running]
            factor_K = torch.tensor(factors, device=adapted.device)
            step_by_client(local, parameters, gradients, moments, factor_K, heads=adapted.head_keys)
        for k, m in enumerate(running):
            trained = {key: x[k].to("cpu", copy=True) for key, x in parameters.items()}
            now[m.name] = replace(
                m,
                tensors={**m.tensors, **trained},
                moments={key: value[k].to("cpu", copy=True) for key, value in moments.items()},
                losses=m.losses + tuple(loss_K[k] for loss_K in losses),
            )
        start = end
    return list(now.values())


def join_tensors(adapted: AdaptedModel, clients: Sequence[Tensors]) -> Tensors:
    """Stacks the clients' tensors along a first axis; the basis, common to all, is taken once."""
    return {
        key: first if adapted.is_shared(key) else torch.stack([tensors[key] for tensors in clients])
        for key, first in clients[0].items()
    }


def _join_moments(clients: Sequence[Tensors]) -> Tensors:
    """Stacks the clients' moments; zeros stand for those of a client that has none yet."""
    like = {key: value for moments in clients for key, value in moments.items()}
    return {
        key: torch.stack([moments.get(key, torch.zeros_like(value)) for moments in clients])
        for key, value in like.items()
    }


def _backward(
    adapted: AdaptedModel, task: Task, rows: list[list[Example]], local: LocalTraining, keys: Keys
) -> list[float]:
    """Forward and backward over one step's rows of every client; returns each client's mean loss.

    Gradients add up over the micro-batches. A client's loss is the sum over its rows divided by their total weight
    (rows, or target tokens), counted before any forward.
    """
    for p in adapted.parameters().values():
        p.grad = None
    total_K = [sum(task.weight(example) for example in examples) for examples in rows]
    loss_K = [0.0] * len(rows)
    for first in range(0, max(len(examples) for examples in rows), local.batch_size):
        micro = [examples[first : first + local.batch_size] for examples in rows]
        width = max(len(examples) for examples in micro)
        # A client with fewer rows than the widest is filled up with a row that counts for nothing.
        filled = [examples + [(examples or rows[k])[0]] * (width - len(examples)) for k, examples in enumerate(micro)]
        weight = [
            [float(i < len(examples)) / total for i in range(width)]
            for examples, total in zip(micro, total_K, strict=True)
        ]
        adapted.routing.rows = len(rows) * width if len(rows) > 1 else None
        adapted.routing.dropout = Dropout(local.dropout, keys, first, len(rows) * width) if local.dropout else None
        logits, batch = forward(adapted.model, task, [example for examples in filled for example in examples])
        loss_b, _ = task.losses(logits, batch)
        loss_Kb = loss_b.reshape(len(rows), width) * torch.tensor(weight, device=loss_b.device)
        loss_Kb.sum().backward()  # type: ignore[no-untyped-call]
        loss_K = [old + new for old, new in zip(loss_K, loss_Kb.detach().sum(1).tolist(), strict=True)]
    adapted.routing.rows = adapted.routing.dropout = None
    return loss_K


def _gradients(adapted: AdaptedModel, local: LocalTraining) -> Tensors:
    """Of the step's backward, clipped client by client."""
    parameters = adapted.parameters()
    gradients = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in parameters.items()}
    if local.clip_norm is not None:
        clip_by_client(gradients, local.clip_norm)
    return gradients


def _noised(mechanisms: Sequence[DPMechanism], sums: Tensors, rows: Sequence[int]) -> Tensors:
    """Returns every client's noised mean, stacked; `rows` are those that each client drew."""
    means = [
        mechanism.mean({key: total_K[k] for key, total_K in sums.items()}, rows[k])
        for k, mechanism in enumerate(mechanisms)
    ]
    return {key: torch.stack([mean[key] for mean in means]) for key in sums}


def _check_finite(running: Sequence[Member], loss_K: Sequence[float], round: int, step: int) -> None:
    for member, loss in zip(running, loss_K, strict=True):
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of client {member.name!r} became {loss} in round {round + 1}, local step {step + 1}: "
                "lower train.lr, or look at this client's rows. The checkpoint of the last finished round is kept"
            )


class Dropout:
    """Adapter dropout, drawn for each client, step, layer and row by key, and the same when a forward is run again.

    A row's mask is drawn token by token, so it depends neither on how far others make the row pad, nor on the rows
    beside it, nor on how a step's rows are cut into micro-batches. A layer that sees no rows (its client is alone then)
    gets one mask for all it sees.

    Args:
        p: the share that is dropped.
        keys: of the clients, in the order of their rows.
        first: the micro-batch's first row, counted in the step.
        rows: of all clients in the micro-batch.
    """

    def __init__(self, p: float, keys: Keys, first: int, rows: int) -> None:
        self.p, self.keys, self.first, self.rows = p, keys, first, rows

    def __call__(self, layer: str, x: Tensor) -> Tensor:  # (K b, ..., n)
        if len(x) == self.rows:
            numbers = range(self.first, self.first + self.rows // len(self.keys))
            keys = [word(*k, layer, i) for k in self.keys for i in numbers]
            bits = random_words(x[0].numel(), keys, x.device).reshape(x.shape)
        else:
            bits = random_words(x.numel(), [word(*self.keys[0], layer, self.first)], x.device).reshape(x.shape)
        return x * (bits >= round(self.p * 2**32) - 2**31).to(x.dtype) / (1 - self.p)


def word(*key: int | str) -> int:
    """Returns the key as a signed 32-bit number."""
    return int(keyed_generator(*key).integers(-(2**31), 2**31))


def random_words(count: int, keys: Sequence[int], device: torch.device) -> Tensor:
    """Returns (len(keys), count) signed 32-bit words, made on the device: word i of a key is mix(mix(i) ^ key).

    A function of key and position alone: longer rows and other company change no word.
    """
    counter = mix(torch.arange(count, dtype=torch.int32, device=device))
    return mix(counter ^ torch.tensor(keys, dtype=torch.int32, device=device).unsqueeze(1))


def mix(x: Tensor) -> Tensor:
    """Returns a bijective hash of 32-bit words ("lowbias32" of Wellons' hash prospector), element by element."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
