"""Gradients at a starting point, for bases that use data: of a core (k x k), and the share that a basis captures.

The point is the base model with `start`: the head and, when a basis is refreshed, the residual adapter. The loss is a
sum over the samples. Each counts once, whatever its number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.basis import Basis, Pair, captured_energy
from fedsb.adapters.gradients import weight_gradients
from fedsb.adapters.layout import Layout
from fedsb.data.clients import ClientData
from fedsb.data.tasks.base import Example, Task
from fedsb.privacy.mechanism import DPMechanism
from fedsb.training.joint import join_tensors
from fedsb.training.per_example import RowGradients
from fedsb.training.scoring import forward
from fedsb.utils.tensors import Tensors


def backward_sum(adapted: AdaptedModel, task: Task, examples: Sequence[Example], batch_size: int) -> None:
    """Runs forward and backward of the summed loss over the examples, in micro-batches."""
    for start in range(0, len(examples), batch_size):
        logits, batch = forward(adapted.model, task, examples[start : start + batch_size])
        loss_b, weight_b = task.losses(logits, batch)
        (loss_b / weight_b.clamp(min=1)).sum().backward()  # type: ignore[no-untyped-call]


def core_gradients(
    adapted: AdaptedModel,
    task: Task,
    start: Tensors,
    outer: Mapping[str, Pair],
    examples: Sequence[Example],
    batch_size: int,
) -> Tensors:
    """Returns S = U' G V per layer, "<layer>.S" (k, k): the gradient of a rank-k core at R = 0, B = U and A = V'."""
    tensors, cores = _outer_core(adapted, start, outer)
    adapted.load(tensors, trainable=cores)
    backward_sum(adapted, task, examples, batch_size)
    sums: Tensors = {}
    for key, p in adapted.parameters().items():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad  # None: a layer that the loss does not need
        sums[f"{key.removesuffix('.R')}.S"] = gradient[0, 0].float().cpu() / adapted.scale
        p.grad = None
    return sums


def private_core_gradients(
    adapted: AdaptedModel,
    task: Task,
    start: Tensors,
    outer: Mapping[str, Pair],
    site: ClientData,
    batch_size: int,
    mechanism: DPMechanism,
    round: int,
) -> Tensors:
    """Returns S as in `core_gradients`, of rows that the site's mechanism draws.

    Each row's cores are clipped over all layers together, and noise is added to their sum. No other row is read.
    """
    rows = [site.train[i] for i in mechanism.charge_basis(round)]
    tensors, cores = _outer_core(adapted, start, outer)
    assert mechanism.plan.basis is not None
    layout = Layout.of({key: tensors[key][0] for key in cores})
    values = layout.flatten({key: tensors[key][0] for key in cores}).unsqueeze(0).to(adapted.device)
    frozen = {key: x for key, x in tensors.items() if key not in cores}
    by_row = RowGradients.allocate(adapted, task, layout, batch_size)
    sums, _ = by_row.clipped_sums(values, frozen, [rows], mechanism.plan.basis.clip)
    noised = layout.views(mechanism.basis_sum(sums[0], len(rows), layout))
    return {f"{key.removesuffix('.R')}.S": total[0].cpu() / adapted.scale for key, total in noised.items()}


def _outer_core(adapted: AdaptedModel, start: Tensors, outer: Mapping[str, Pair]) -> tuple[Tensors, frozenset[str]]:
    """Returns (the tensors of a rank-k core at R = 0 in the outer basis, the names of its cores)."""
    tensors: Tensors = {}
    for layer, (A, B) in outer.items():
        tensors |= {f"{layer}.A": A, f"{layer}.B": B, f"{layer}.R": torch.zeros(1, 1, len(A), len(A))}
    return {**tensors, **join_tensors(adapted, [start])}, frozenset(f"{layer}.R" for layer in outer)


def load_nothing(adapted: AdaptedModel, start: Tensors) -> None:
    """Loads zero adapters of rank 1 and `start`: the head, and the residual adapter."""
    tensors: Tensors = {}
    for layer, (m, n) in adapted.shapes.items():
        A, B = torch.zeros(1, n), torch.zeros(m, 1)
        if adapted.kind == "core":
            tensors |= {f"{layer}.A": A, f"{layer}.B": B, f"{layer}.R": torch.zeros(1, 1, 1, 1)}
        else:
            tensors |= {f"{layer}.A": A.unsqueeze(0), f"{layer}.B": B.unsqueeze(0)}
    adapted.load({**tensors, **join_tensors(adapted, [start])})


def captured_share(
    adapted: AdaptedModel,
    task: Task,
    start: Tensors,
    basis: Basis,
    samples: Mapping[str, Sequence[Example]],  # client -> its examples
    batch_size: int,
    budget_bytes: int,
    blocks: int = 1,
) -> dict[str, float]:
    """Returns the captured share by layer: sum_k ||B' G_k A'||^2 / sum_k ||G_k||^2 over the clients k.

    Each client computes its own gradient, for one group of layers at a time, within `budget_bytes`.
    """
    load_nothing(adapted, start)
    layers = {name: layer.base for name, layer in adapted.layers.items()}
    inside = dict.fromkeys(layers, 0.0)
    total = dict.fromkeys(layers, 0.0)
    for examples in samples.values():

        def run(examples: Sequence[Example] = examples) -> None:
            backward_sum(adapted, task, examples, batch_size)

        for name, G in weight_gradients(layers, run, budget_bytes=budget_bytes):
            captured, all_of_it = captured_energy(G, basis.A[name].to(G), basis.B[name].to(G), blocks)
            inside[name] += captured
            total[name] += all_of_it
    return {name: inside[name] / total[name] if total[name] else 0.0 for name in layers}
