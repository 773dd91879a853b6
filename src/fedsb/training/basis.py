"""Making a basis: a round with a client part and a server part, over the same channel as any round.

The linear algebra is in adapters/basis.py. This module defines which party computes what, from which rows, and what
is sent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.basis import (
    Basis,
    Pair,
    check_rank,
    core_pair,
    make_basis,
    orthonormal,
    random_pair,
    update_pair,
    weight_pair,
)
from fedsb.adapters.gradients import weight_gradients
from fedsb.config.schema import Config
from fedsb.config.training import BasisConfig
from fedsb.data.clients import ClientData
from fedsb.data.tasks.base import Example, Task
from fedsb.methods.base import Method
from fedsb.privacy.mechanism import DPMechanism
from fedsb.training.basis_cache import cached_pairs, is_worth_caching
from fedsb.training.gradients import (
    backward_sum,
    core_gradients,
    load_nothing,
    private_core_gradients,
)
from fedsb.training.local import LocalTraining
from fedsb.training.resolved import gradient_budget
from fedsb.utils.phases import peak_memory_bytes
from fedsb.utils.rng import keyed_generator
from fedsb.utils.tensors import Tensors

Gradients = Callable[[Mapping[str, Pair]], Iterable[tuple[Tensors, float]]]
Broadcast = Callable[[Tensors], Tensors]


def no_gradients(_: Mapping[str, Pair]) -> Iterable[tuple[Tensors, float]]:
    """Returns nothing, for a basis that needs no client."""
    return ()


@dataclass(frozen=True, kw_only=True)
class BasisSource:
    """The inputs of a basis. Each kind of basis uses some of them.

    Args:
        start: where gradients are taken: the head, and the residual adapter.
        round: the round that it is made for; `random` differs in each.
        rows: of one client, for the rate of its first step.
        seen: the rows of `update` and `update-pooled`.
        gradients: of `core`: an outer basis -> each client's S, as received, and the rows it was computed from.
        broadcast: a message to all clients -> what each makes of it.
    """

    start: Tensors
    round: int = 0
    rows: int = 1
    seen: Sequence[Example] = ()
    gradients: Gradients = no_gradients
    broadcast: Broadcast = dict


def build_basis(
    config: Config, method: Method, adapted: AdaptedModel, task: Task, local: LocalTraining, source: BasisSource
) -> Basis:
    """Returns the configured basis, with its cost. Raises UserError if a layer is too small for it."""
    started = time.monotonic()
    rank, kind, seed, round = method.total_rank, config.basis.kind, config.seed, source.round
    check_rank(adapted.shapes, rank)
    steps_ahead = config.basis.steps_ahead
    eta = config.basis.eta
    if eta == "auto":
        eta = local.lr * local.lr_factor(round, 0, local.steps_for(source.rows))
    if kind in ("random", "weights"):
        basis = make_basis(kind, _data_free(config.basis, adapted, kind, rank, seed, round).items())
    elif kind == "core":
        outer = outer_basis(config.basis, adapted, rank, seed, round)
        total, counted = _sum_of(source.gradients(outer))
        basis = _core_basis(total, outer, rank, eta / counted / method.scale if steps_ahead else None)
        inner = {f"{layer}.P": outer[layer][1].T @ basis.B[layer] for layer in outer}
        inner |= {f"{layer}.Q": basis.A[layer] @ outer[layer][0].T for layer in outer}
        A, B = inner_basis(source.broadcast(inner), outer)
        basis = replace(basis, A=A, B=B)
    else:
        basis = _update_basis(config, method, adapted, task, source, eta, local.optimizer != "sgd")
        basis = basis if steps_ahead else replace(basis, R0={})
        A, B = whole_basis(source.broadcast(basis.tensors), basis.A)
        basis = replace(basis, A=A, B=B)
    values = basis_values(config.basis, method, adapted.shapes)
    return replace(
        basis,
        up=values["up"],
        down=values["down"],
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(adapted.device),
    )


def _sum_of(each: Iterable[tuple[Tensors, float]]) -> tuple[Tensors, float]:
    """Returns the sums of the clients' S, and of their rows."""
    total: Tensors = {}
    counted = 0.0
    for own, rows in each:
        counted += rows
        total = {key: total[key] + S if key in total else S for key, S in own.items()}
    return total, counted


# --- a client's part ---


def core_sums(
    config: Config,
    adapted: AdaptedModel,
    task: Task,
    site: ClientData,
    start: Tensors,
    outer: Mapping[str, Pair],
    *,
    draw: DPMechanism | int,  # the mechanism that draws the rows and adds noise, else the number of all clients' rows
    round: int,
) -> tuple[Tensors, float]:
    """Returns (S of a site by layer, its number of rows). A mechanism adds noise and gives the expected number."""
    batch_size = config.train.batch_size
    if not isinstance(draw, int):
        due = round + 1 if round else 0
        return private_core_gradients(adapted, task, start, outer, site, batch_size, draw, due), draw.basis_rows
    drawn = draw_samples(site, draw, config.basis.samples, config.seed)
    return core_gradients(adapted, task, start, outer, drawn, batch_size), float(len(drawn))


def outer_basis(config: BasisConfig, adapted: AdaptedModel, rank: int, seed: int, round: int) -> dict[str, Pair]:
    """Returns the data-free (A, B) by layer around a `core` of that rank."""
    return _data_free(config, adapted, config.outer, rank, seed, round, outer=True)


def inner_basis(received: Tensors, outer: Mapping[str, Pair]) -> tuple[Tensors, Tensors]:
    """Returns (A, B) by layer of `core` as received: from "<layer>.P" and "<layer>.Q", within the outer basis."""
    A = {layer: orthonormal(received[f"{layer}.Q"].T).T @ A for layer, (A, _) in outer.items()}
    return A, {layer: B @ orthonormal(received[f"{layer}.P"]) for layer, (_, B) in outer.items()}


def whole_basis(received: Tensors, layers: Collection[str]) -> tuple[Tensors, Tensors]:
    """Returns (A, B) by layer, which were sent themselves."""
    A = {layer: orthonormal(received[f"{layer}.A"].T).T.contiguous() for layer in layers}
    return A, {layer: orthonormal(received[f"{layer}.B"]) for layer in layers}


def basis_values(config: BasisConfig, method: Method, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Returns the number of values that a client sends ("up") and receives ("down") for the basis."""
    if method.adapter != "core" or method.spec.pools_data or config.kind in ("random", "weights"):
        return {"up": 0, "down": 0}
    rank = method.total_rank
    if config.kind == "core":
        ks = [outer_rank(config, shape, rank) for shape in shapes.values()]
        return {"up": sum(k * k for k in ks), "down": sum(2 * k * rank for k in ks)}
    return {"up": 0, "down": sum(rank * (m + n) for m, n in shapes.values())}


def draw_samples(
    site: ClientData, all_rows: int, samples: int, seed: int, *, from_the_end: bool = False
) -> list[Example]:
    """Returns a site's part of `samples` rows, in proportion to its size and at least one, drawn by (seed, its name).

    Rows for the basis come from the front of the draw, and rows that evaluate it from the end. They are different if
    there are enough rows.
    """
    count = min(len(site.train), max(1, math.ceil(samples * len(site.train) / all_rows)))
    order = keyed_generator(seed, "basis samples", site.name).permutation(len(site.train))
    order = order[-count:] if from_the_end else order[:count]
    return [site.train[i] for i in order]


def outer_rank(config: BasisConfig, shape: tuple[int, int], rank: int) -> int:
    """Returns k of `core` in a layer: as set, or 4 h r but at most half of min(m, n); at least h r, and 2."""
    wanted = config.outer_rank or min(4 * rank, min(shape) // 2)
    return max(rank, min(max(wanted, 2), min(shape)))


def _data_free(
    config: BasisConfig, adapted: AdaptedModel, kind: str, rank: int, seed: int, round: int, *, outer: bool = False
) -> dict[str, Pair]:
    ranks = {layer: outer_rank(config, shape, rank) if outer else rank for layer, shape in adapted.shapes.items()}
    if kind == "random":
        return {layer: random_pair(m, n, ranks[layer], seed, layer, round) for layer, (m, n) in adapted.shapes.items()}

    def build() -> dict[str, Pair]:
        return {layer: weight_pair(W0, ranks[layer], config.side) for layer, W0 in adapted.base_weights()}

    if not config.cache or not is_worth_caching(adapted):
        return build()
    return cached_pairs(f"{adapted.fingerprint} weights {config.side} {sorted(ranks.items())}", build)


def _core_basis(sums: Tensors, outer: Mapping[str, Pair], rank: int, step: float | None) -> Basis:
    """Returns a `core` basis from the sums of all sites. R starts at -step * D, or at 0 without a step."""
    built = {layer: core_pair(sums[f"{layer}.S"], pair, rank) for layer, pair in outer.items()}
    return Basis(
        kind="core",
        A={layer: A for layer, (A, _, _) in built.items()},
        B={layer: B for layer, (_, B, _) in built.items()},
        R0={} if step is None else {layer: -step * D for layer, (_, _, D) in built.items()},
    )


def _update_basis(
    config: Config,
    method: Method,
    adapted: AdaptedModel,
    task: Task,
    source: BasisSource,
    eta: float,
    sign: bool,  # whether the first step is Adam-like
) -> Basis:
    load_nothing(adapted, source.start)
    rows, rank = source.seen, method.total_rank
    layers = {name: layer.base for name, layer in adapted.layers.items()}
    mean = 1 if sign else 1 / len(rows)  # an SGD-like step follows the mean loss's gradient
    run = partial(backward_sum, adapted, task, rows, config.train.batch_size)
    built = {
        name: update_pair(G.cpu() * mean, rank, eta, sign)
        for name, G in weight_gradients(layers, run, budget_bytes=gradient_budget(config, adapted.device))
    }
    return Basis(
        kind=config.basis.kind,
        A={name: A for name, (A, _, _) in built.items()},
        B={name: B for name, (_, B, _) in built.items()},
        R0={name: S / method.scale for name, (_, _, S) in built.items()},
    )
