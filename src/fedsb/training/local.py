"""A client's local training, as settings and as pure functions: how many steps, which rows, which learning rate.

All draws are keyed by (seed, client, round), so a client trains on the same rows in the same order on every channel
and with any other clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedsb.utils.rng import keyed_generator

BYTES_PER_TRAINED_VALUE = 16  # float32: the value, its gradient and Adam's two moments


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """The local training of one client in one round. Exactly one of `steps` and `epochs` is set."""

    steps: int | None = 10
    epochs: int | None = None
    batch_size: int = 8  # rows in one forward
    accumulate: int = 1  # forwards in one step
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = 1e-2
    head_lr: float = 1e-2
    weight_decay: float = 0.0  # decoupled; on the head too
    momentum: float = 0.0  # of sgd
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float | None = 1.0  # L2, over all of a client's tensors
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0  # share of all steps of all rounds
    dropout: float = 0.0  # on the adapter's input
    keep_optimizer: bool = False  # carry the optimiser's moments from round to round, at the client
    rounds: int = 1  # the schedule spans them all

    @property
    def rows_a_step(self) -> int:
        return self.batch_size * self.accumulate

    def steps_for(self, rows: int) -> int:
        """Returns the number of optimizer steps in one round for a client with `rows` rows."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * math.ceil(rows / self.rows_a_step)

    def lr_factor(self, round: int, step: int, steps: int) -> float:
        """Returns the factor of the schedule, in 0..1, at `step` of `steps` in `round`. It spans the whole run."""
        done, total = round * steps + step, self.rounds * steps
        if done < self.warmup * total:
            return min((done + 1) / (self.warmup * total), 1.0)
        progress = (done - self.warmup * total) / max(total * (1 - self.warmup), 1)
        if self.schedule == "linear":
            return 1 - progress
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0


def draw_batches(local: LocalTraining, *, rows: int, seed: int, client: str, round: int) -> Iterator[list[int]]:
    """Yields the rows of each step, from consecutive shuffled passes over the client's rows.

    With `epochs`, the last batch of a pass may be short. With `steps`, a batch may span two passes, and all batches are
    full, unless the client has fewer rows than a step needs: then each step uses all of them.
    """
    draw = keyed_generator(seed, "batches", client, round)
    size = min(local.rows_a_step, rows)
    if local.epochs is not None:
        for _ in range(local.epochs):
            order = draw.permutation(rows).tolist()
            yield from (order[start : start + size] for start in range(0, rows, size))
        return
    assert local.steps is not None
    passes = math.ceil(local.steps * size / rows)
    stream = np.concatenate([draw.permutation(rows) for _ in range(passes)]).tolist()
    yield from (stream[start : start + size] for start in range(0, local.steps * size, size))
