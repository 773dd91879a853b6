"""Making a basis: a round like any other, with a client part and a server part, through the engine and the envelope.

The linear algebra is in adapters/basis.py; here is who computes what, from which rows, and what travels.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch

from fedsb.adapters.adapted import AdaptedModel, Tensors
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
from fedsb.data.sites import Site
from fedsb.data.tasks.base import Example, Task
from fedsb.draws import generator
from fedsb.federation.gradients import (
    backward_sum,
    captured_share,
    core_gradients,
    load_nothing,
    private_core_gradients,
)
from fedsb.methods.contract import Method
from fedsb.privacy.guard import Guard
from fedsb.settings import BasisConfig


class Send(Protocol):
    """Carries tensors to or from a client through the envelope, in the run's codec, and counts them.

    A message to a client is the same for all.
    """

    def __call__(self, direction: Literal["up", "down"], client: str, tensors: Tensors) -> Tensors: ...


def build_basis(
    config: BasisConfig,
    method: Method,
    adapted: AdaptedModel,
    task: Task,
    sites: Sequence[Site],
    start: Tensors,  # where gradients are taken: the head, and what is carried
    *,
    public: Sequence[Example],  # of `update`
    eta: float,  # of the first step, for R at the start
    sign: bool,  # whether that step is Adam-like
    seed: int,
    round: int = 0,  # that it is made for; `random` is another in each
    batch_size: int,
    send: Send,
    guards: Mapping[str, Guard] | None = None,
) -> Basis:
    """The basis that the configuration asks for, with its bill. Raises UserError where a layer is too small for it.

    With `guards`, by client, `core` is noised and no captured share is measured: it would tell of the rows.
    """
    started = time.monotonic()
    rank = method.total_rank
    check_rank(adapted.shapes, rank)
    step_ahead = config.R0 == "step" or (config.R0 == "auto" and config.kind.startswith("update"))
    if config.kind in ("random", "weights"):
        basis = make_basis(config.kind, _data_free(config, adapted, config.kind, rank, seed, round).items())
    elif config.kind == "core":
        outer = _data_free(config, adapted, config.outer, rank, seed, round, outer=True)
        sums: Tensors = {}
        counted = 0.0  # rows behind the sums; in a private run, those expected
        for site in sites:
            if guards is None:
                drawn = draw_samples(site, sites, config.samples, seed)
                own = core_gradients(adapted, task, start, outer, drawn, batch_size)
                counted += len(drawn)
            else:
                guard = guards[site.name]
                own = private_core_gradients(
                    adapted, task, start, outer, site, batch_size, guard, round + 1 if round else 0
                )
                counted += guard.basis_rows
            for key, S in send("up", site.name, own).items():
                sums[key] = sums[key] + S if key in sums else S
        basis = _core_basis(sums, outer, rank, eta / counted / method.scale if step_ahead else None)
        inner = {f"{layer}.P": outer[layer][1].T @ basis.B[layer] for layer in outer}
        inner |= {f"{layer}.Q": basis.A[layer] @ outer[layer][0].T for layer in outer}
        told = _tell(inner, sites, send)
        A = {layer: orthonormal(told[f"{layer}.Q"].T).T @ A for layer, (A, _) in outer.items()}
        B = {layer: B @ orthonormal(told[f"{layer}.P"]) for layer, (_, B) in outer.items()}
        basis = replace(basis, A=A, B=B)
    else:
        pooled = [draw_samples(site, sites, config.samples, seed) for site in sites if config.kind == "update-pooled"]
        rows = [*public, *(example for drawn in pooled for example in drawn)]
        basis = _update_basis(config, adapted, task, start, rows, rank, eta, sign, step_ahead, method.scale, batch_size)
        told = _tell(basis.tensors, sites, send)
        A = {layer: orthonormal(told[f"{layer}.A"].T).T.contiguous() for layer in basis.A}
        B = {layer: orthonormal(told[f"{layer}.B"]) for layer in basis.B}
        basis = replace(basis, A=A, B=B)
    seconds = time.monotonic() - started
    captured: Mapping[str, float] = {}
    if config.share_samples and guards is None:
        probe = {site.name: draw_samples(site, sites, config.share_samples, seed, from_the_end=True) for site in sites}
        captured = captured_share(
            adapted, task, start, basis, probe, batch_size, config.budget_mib << 20, rank // method.rank
        )
    values = basis_values(config, method, adapted.shapes)
    return replace(
        basis,
        up=values["up"],
        down=values["down"],
        captured=captured,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(adapted.device),
    )


def _tell(tensors: Tensors, sites: Sequence[Site], send: Send) -> Tensors:
    """What every site makes of the same message, and the server with them."""
    told = tensors
    for site in sites:
        told = send("down", site.name, tensors)
    return told


def basis_values(config: BasisConfig, method: Method, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Values a client sends ("up") and receives ("down") for the basis, known before it is made."""
    if method.adapter != "core" or method.facts.pools_data or config.kind in ("random", "weights"):
        return {"up": 0, "down": 0}
    rank = method.total_rank
    if config.kind == "core":
        ks = [outer_rank(config, shape, rank) for shape in shapes.values()]
        return {"up": sum(k * k for k in ks), "down": sum(2 * k * rank for k in ks)}
    return {"up": 0, "down": sum(rank * (m + n) for m, n in shapes.values())}


def draw_samples(
    site: Site, sites: Sequence[Site], samples: int, seed: int, *, from_the_end: bool = False
) -> list[Example]:
    """A site's part of `samples` rows, in proportion to its size and at least one, drawn by (seed, its name).

    Rows for the basis come from the front of the draw, rows that judge it from the end: others, if there are enough.
    """
    total = sum(len(other.train) for other in sites)
    count = min(len(site.train), max(1, math.ceil(samples * len(site.train) / total)))
    order = generator(seed, "basis samples", site.name).permutation(len(site.train))
    order = order[-count:] if from_the_end else order[:count]
    return [site.train[i] for i in order]


def outer_rank(config: BasisConfig, shape: tuple[int, int], rank: int) -> int:
    """k of `core` in a layer: as asked, or 4 h r but at most half of min(m, n); never under h r, or 2."""
    wanted = config.outer_rank or min(4 * rank, min(shape) // 2)
    return max(rank, min(max(wanted, 2), min(shape)))


def peak_memory_bytes(device: torch.device) -> int:
    """The high-water mark of the CUDA device, if the model is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _data_free(
    config: BasisConfig, adapted: AdaptedModel, kind: str, rank: int, seed: int, round: int, *, outer: bool = False
) -> dict[str, Pair]:
    ranks = {layer: outer_rank(config, shape, rank) if outer else rank for layer, shape in adapted.shapes.items()}
    if kind == "random":
        return {layer: random_pair(m, n, ranks[layer], seed, layer, round) for layer, (m, n) in adapted.shapes.items()}
    return {layer: weight_pair(W0.cpu(), ranks[layer], config.side) for layer, W0 in adapted.base_weights()}


def _core_basis(sums: Tensors, outer: Mapping[str, Pair], rank: int, step: float | None) -> Basis:
    """`core`, the server's part; R starts at -step * D, or at 0 without a step."""
    built = {layer: core_pair(sums[f"{layer}.S"], pair, rank) for layer, pair in outer.items()}
    return Basis(
        kind="core",
        A={layer: A for layer, (A, _, _) in built.items()},
        B={layer: B for layer, (_, B, _) in built.items()},
        R0={} if step is None else {layer: -step * D for layer, (_, _, D) in built.items()},
    )


def _update_basis(
    config: BasisConfig,
    adapted: AdaptedModel,
    task: Task,
    start: Tensors,
    rows: Sequence[Example],
    rank: int,
    eta: float,
    sign: bool,
    step_ahead: bool,
    scale: float,
    batch_size: int,
) -> Basis:
    load_nothing(adapted, start)
    layers = {name: layer.base for name, layer in adapted.layers.items()}
    mean = 1 if sign else 1 / len(rows)  # an SGD-like step is along the mean loss's gradient
    built = {
        name: update_pair(G.cpu() * mean, rank, eta, sign)
        for name, G in weight_gradients(
            layers, lambda: backward_sum(adapted, task, rows, batch_size), budget_bytes=config.budget_mib << 20
        )
    }
    return Basis(
        kind=config.kind,
        A={name: A for name, (A, _, _) in built.items()},
        B={name: B for name, (_, B, _) in built.items()},
        R0={name: S / scale for name, (_, _, S) in built.items()} if step_ahead else {},
    )
