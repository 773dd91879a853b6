"""Joint training: local training of several clients in one forward pass, each row with its own client's adapter.

The base model is in memory once, whatever the number of clients. Loss mean, clipping, step count, schedule and weight
decay are separate for each client. A client that has finished its steps leaves the batch. The result equals that of K
clients trained one after another, up to float rounding. With K = 1 it is plain training.

Shapes: K clients, b rows of one client in a forward, P trained values of a client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.layout import Layout
from fedsb.data.tasks.base import Example, Task
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.scaling import gradient_scales
from fedsb.training.buffers import ClientBuffers
from fedsb.training.dropout import Dropout, Keys
from fedsb.training.local import LocalTraining, draw_batches
from fedsb.training.optimizer import StepSizes, clip_rows, step_rows
from fedsb.training.per_example import RowGradients
from fedsb.training.scoring import forward
from fedsb.utils.errors import DivergedError
from fedsb.utils.tensors import Tensors, to_device

COMPILER, COMPILED_WIDTH = "inductor", 64
Penalty = Callable[[Mapping[str, Tensor]], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class ClientTraining:
    """One client in a round of local training: its rows, its adapter's tensors, and its optimiser's moments."""

    name: str
    examples: Sequence[Example]
    tensors: Tensors
    moments: Tensors = field(default_factory=dict)  # "m.<key>", "v.<key>", and "steps" that they have seen
    losses: tuple[float, ...] = ()  # per step, the mean over the step's rows
    share: Tensor | None = None  # (P,) of a step with shared noise, in whole numbers, in place of new tensors

    @property
    def loss(self) -> float:
        """The mean over the round's steps."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan


@dataclass(frozen=True, kw_only=True)
class RoundTraining:
    """The training of the clients of one round.

    Args:
        trainable: the trained tensors.
        penalty: the method's local regulariser: of the trained tensors (K, ...), one value per client (K,), or None.
        mechanisms: by client. Every step is then one of DP-SGD: the mechanism draws the rows, each row's gradient is
            clipped, and noise is added to their sum.
        watch: whether a loss that is not finite ends the run. False where losses must stay private, because the end of
            the run would reveal one.
    """

    round: int
    trainable: frozenset[str]
    penalty: Penalty | None = None
    mechanisms: Mapping[str, DPMechanism] | None = None
    watch: bool = True


class Team(Protocol):
    """Several processes that train the same clients and distribute the micro-batches of a step among themselves."""

    def computes(self, turn: int) -> bool:
        """Returns whether this process computes the micro-batch at this position of a step."""
        ...

    def add(self, own: Mapping[int, Tensor], turns: int, shape: tuple[int, ...]) -> Tensor:
        """Returns the sum over all micro-batches of a step, in their order; `own` are those of this process."""
        ...


class JointTrainer:
    """Trains the clients of one adapted model, with buffers that are allocated once for each layout."""

    team: Team | None = None

    def __init__(
        self, adapted: AdaptedModel, task: Task, local: LocalTraining, seed: int, *, compiled: bool = False
    ) -> None:
        self.adapted, self.task, self.local, self.seed = adapted, task, local, seed
        self._forward = partial(forward, adapted.model, task)
        if compiled:  # few widths, and all logits: every other shape would be compiled again
            model: nn.Module = torch.compile(adapted.model, dynamic=False, backend=COMPILER)  # type: ignore[assignment]
            self._forward = partial(forward, model, task, whole=True, multiple_of=COMPILED_WIDTH)
        self._buffers: dict[Layout, ClientBuffers] = {}
        self._rows: dict[Layout, RowGradients] = {}

    def train(self, clients: Sequence[ClientTraining], how: RoundTraining) -> list[ClientTraining]:
        """Trains the clients jointly for one round. Returns them in their order, with new tensors, moments and losses.

        Raises DivergedError, after the round's steps, naming the client and the first step whose loss was not finite.
        """
        local, mechanisms = self.local, how.mechanisms
        own_steps = {c.name: self._steps(c, mechanisms) for c in clients}
        running = sorted(clients, key=lambda c: -own_steps[c.name])  # at each step, those who still train come first
        steps = max(own_steps.values())
        if mechanisms is not None:
            for client in clients:
                mechanisms[client.name].charge(how.round + 1)
            if mechanisms[clients[0].name].plan.shared is not None:
                return self._shares(clients, how, mechanisms)
        layout = Layout.of({key: clients[0].tensors[key] for key in how.trainable})
        buffers = self._buffers_for(layout, len(clients))
        buffers.read([c.tensors for c in running], [c.moments for c in running])
        factors = [[local.lr_factor(how.round, step, own_steps[c.name]) for c in running] for step in range(steps)]
        before = [int(c.moments.get("steps", torch.zeros(()))) for c in running]
        sizes = StepSizes.of(local, buffers, self.adapted.head_keys, factors, before)
        frozen = _stacked(self.adapted, running, how.trainable)
        batches = [] if mechanisms else [self._batches(c, how.round) for c in running]
        losses_SK = torch.zeros(steps, len(running), device=self.adapted.device)
        bound = 0
        for step in range(steps):
            K = sum(own_steps[c.name] > step for c in running)
            others = {key: x if self.adapted.is_shared(key) else x[:K] for key, x in frozen.items()}
            if mechanisms is None:
                if bound != K:
                    buffers.bind(self.adapted, K, others)
                    bound = K
                rows = [[c.examples[i] for i in own[step]] for c, own in zip(running[:K], batches, strict=False)]
                keys = [(self.seed, "dropout", c.name, how.round, step) for c in running[:K]]
                losses_SK[step, :K] = self._gradients(buffers, rows, keys, how.penalty)
            else:
                own = [mechanisms[c.name] for c in running[:K]]
                losses_SK[step, :K] = self._private_gradients(buffers, running[:K], own, others)
            step_rows(local, buffers, K, sizes, step)
            buffers.renew(K)
        losses = losses_SK.T.tolist()  # the one read from the device
        if how.watch:
            _check_finite(running, losses, own_steps, how.round)
        trained = {}
        for client, (tensors, moments), own_losses in zip(running, buffers.write(len(running)), losses, strict=True):
            done = own_steps[client.name]
            seen = torch.tensor(float(done)) + client.moments.get("steps", torch.zeros(()))
            trained[client.name] = replace(
                client,
                tensors={**client.tensors, **tensors},
                moments={**client.moments, **moments, "steps": seen},
                losses=client.losses + tuple(own_losses[:done]),
            )
        return [trained[c.name] for c in clients]

    def _steps(self, client: ClientTraining, mechanisms: Mapping[str, DPMechanism] | None) -> int:
        return mechanisms[client.name].plan.steps if mechanisms else self.local.steps_for(len(client.examples))

    def _batches(self, client: ClientTraining, round: int) -> list[list[int]]:
        rows = len(client.examples)
        return list(draw_batches(self.local, rows=rows, seed=self.seed, client=client.name, round=round))

    def _buffers_for(self, layout: Layout, clients: int) -> ClientBuffers:
        known = self._buffers.get(layout)
        if known is None or known.capacity < clients:
            known = self._buffers[layout] = ClientBuffers(
                layout, clients, self.adapted.device, self.adapted.compute_dtypes(layout.slices)
            )
        return known

    def _gradients(
        self, buffers: ClientBuffers, rows: list[list[Example]], keys: Keys, penalty: Penalty | None
    ) -> Tensor:
        """Fills the gradients of one step, clipped per client. Returns each client's mean loss, (K,).

        Gradients add up over the micro-batches. A client's loss is the sum over its rows divided by their total weight
        (rows, or target tokens), which is counted before any forward.
        """
        adapted, local, K = self.adapted, self.local, len(rows)
        gradients = buffers.gradients[:K].zero_()
        total_K = [sum(self.task.weight(example) for example in examples) for examples in rows]
        loss_K = torch.zeros(K, device=adapted.device)
        parts: dict[int, Tensor] = {}  # this process's, if there are others: gradients and losses, (K, P + 1)
        starts = range(0, max(len(examples) for examples in rows), local.batch_size)
        for turn, first in enumerate(starts):
            if self.team is not None and not self.team.computes(turn):
                continue
            micro = [examples[first : first + local.batch_size] for examples in rows]
            width = max(len(examples) for examples in micro)
            # A client with fewer rows than the widest is filled up with a row that counts for nothing.
            filled = [own + [(own or rows[k])[0]] * (width - len(own)) for k, own in enumerate(micro)]
            weight_Kb = [
                [float(i < len(own)) / total for i in range(width)] for own, total in zip(micro, total_K, strict=True)
            ]
            adapted.routing.rows = K * width if K > 1 else None
            adapted.routing.dropout = (
                Dropout(local.dropout, keys, first, K * width, adapted.device) if local.dropout else None
            )
            logits, batch = self._forward([example for own in filled for example in own])
            loss_b, _ = self.task.losses(logits, batch)
            loss_Kb = loss_b.reshape(K, width) * to_device(torch.tensor(weight_Kb), loss_b.device)
            loss_Kb.sum().backward()  # type: ignore[no-untyped-call]
            buffers.collect(K)
            loss_K += loss_Kb.detach().sum(1)
            if self.team is not None:
                parts[turn] = torch.cat([gradients, loss_K.unsqueeze(1)], dim=1)
                gradients.zero_()
                loss_K.zero_()
        if self.team is not None:
            shape = (K, buffers.layout.size + 1)
            total = to_device(self.team.add(parts, len(starts), shape), adapted.device)
            gradients.copy_(total[:, :-1])
            loss_K = total[:, -1]
        adapted.routing.rows = adapted.routing.dropout = None
        if penalty is not None and (extra_K := penalty(buffers.leaves(K))) is not None:
            extra_K.sum().backward()  # type: ignore[no-untyped-call]
        if local.clip_norm is not None:
            clip_rows(gradients, local.clip_norm)
        return loss_K

    def _private_gradients(
        self,
        buffers: ClientBuffers,
        clients: Sequence[ClientTraining],
        mechanisms: Sequence[DPMechanism],
        frozen: Tensors,
    ) -> Tensor:
        """Fills the noised means of one step of DP-SGD. Returns each client's mean loss, (K,); 0 without rows."""
        rows, scales = _draw(clients, mechanisms), _scales(buffers, mechanisms)
        sums, loss_K = self._row_gradients(buffers).clipped_sums(
            buffers.values[: len(rows)], frozen, rows, mechanisms[0].plan.clip, scales=scales
        )
        for k, own in enumerate(mechanisms):
            buffers.gradients[k].copy_(own.mean(sums[k], len(rows[k]), buffers.layout))
        if scales is not None:
            buffers.gradients[: len(rows)].div_(scales)
        return loss_K

    def _shares(
        self, clients: Sequence[ClientTraining], how: RoundTraining, mechanisms: Mapping[str, DPMechanism]
    ) -> list[ClientTraining]:
        """Returns the clients with their share of one step, whose tensors the server will change.

        A share is the sum of the clipped and rounded gradients of the rows that the client has drawn, with its part of
        the noise.
        """
        layout = Layout.of({key: clients[0].tensors[key] for key in how.trainable})
        buffers, own = self._buffers_for(layout, len(clients)), [mechanisms[client.name] for client in clients]
        buffers.read([client.tensors for client in clients], [client.moments for client in clients])
        grid, rows = NoiseGrid.of(own[0].plan, layout.size), _draw(clients, own)
        sums, loss_K = self._row_gradients(buffers).clipped_sums(
            buffers.values[: len(rows)],
            _stacked(self.adapted, clients, how.trainable),
            rows,
            own[0].plan.clip,
            partial(grid.round_rows, generator=own[0].generator()),
            _scales(buffers, own),
        )
        losses = loss_K.tolist()
        if how.watch:
            _check_finite(clients, [[loss] for loss in losses], dict.fromkeys(mechanisms, 1), how.round)
        return [
            replace(
                client, share=mechanism.share(sums[k], len(rows[k]), layout, grid), losses=(*client.losses, losses[k])
            )
            for k, (client, mechanism) in enumerate(zip(clients, own, strict=True))
        ]

    def _row_gradients(self, buffers: ClientBuffers) -> RowGradients:
        layout, together = buffers.layout, self.local.batch_size * buffers.capacity
        if layout not in self._rows or len(self._rows[layout].gradients) < together:
            self._rows[layout] = RowGradients.allocate(self.adapted, self.task, layout, together)
        return self._rows[layout]


def _draw(clients: Sequence[ClientTraining], mechanisms: Sequence[DPMechanism]) -> list[list[Example]]:
    """Returns the rows that each client's mechanism draws for one step."""
    return [[c.examples[i] for i in own.draw()] for c, own in zip(clients, mechanisms, strict=True)]


def _scales(buffers: ClientBuffers, mechanisms: Sequence[DPMechanism]) -> Tensor | None:  # (K, P) or (1, P)
    """Returns the factors of the gradients' values before they are clipped; None without scale-then-privatize."""
    plan = mechanisms[0].plan
    if not plan.scaled:
        return None
    moments = buffers.v[: 1 if plan.shared else len(mechanisms)]  # with shared noise all clients have the server's
    return torch.stack([gradient_scales(v) for v in moments])


def join_tensors(adapted: AdaptedModel, clients: Sequence[Tensors]) -> Tensors:
    """Stacks the clients' tensors along a first axis; the basis, which all share, is taken once."""
    return {key: _joined(adapted, key, [tensors[key] for tensors in clients]) for key in clients[0]}


def _joined(adapted: AdaptedModel, key: str, each: Sequence[Tensor]) -> Tensor:
    if adapted.is_shared(key):
        return each[0]
    if all(x is each[0] for x in each):  # the same tensor for all, in memory once
        return each[0].unsqueeze(0).expand(len(each), *each[0].shape)
    return torch.stack(list(each))


def _stacked(adapted: AdaptedModel, clients: Sequence[ClientTraining], trainable: frozenset[str]) -> Tensors:
    """Returns the clients' tensors that do not train, on the device, with the axis of clients where they have one."""
    frozen = [{key: x for key, x in c.tensors.items() if key not in trainable} for c in clients]
    joined = join_tensors(adapted, frozen)
    return {key: x if adapted.is_shared(key) else x.to(adapted.device) for key, x in joined.items()}


def _check_finite(
    clients: Sequence[ClientTraining], losses: Sequence[Sequence[float]], steps: Mapping[str, int], round: int
) -> None:
    for client, own in zip(clients, losses, strict=True):
        for step, loss in enumerate(own[: steps[client.name]]):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss of client {client.name!r} became {loss} in round {round + 1}, local step {step + 1}. "
                    "Lower train.lr, or look at this client's rows. The checkpoint of the last finished round is kept"
                )
