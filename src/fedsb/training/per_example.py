"""Per-example gradients from one backward pass: every example trains a copy of its client's adapter.

The adapters' leading axis, which tells clients apart in joint training, tells examples apart here: a core is loaded as
(b, h, r, r), a copy a row of the batch, and the same batched product that made the gradient of a client's R,
s sum_t (B' g_t)(A x_t)', now makes one for each example. No hooks, no second backward, and nothing but autograd: what
works for training (activation checkpointing, causal models, two-factor adapters, the head) works here.

    g_i = dL_i / d(all trained tensors)      L_i is example i's own mean loss: no example enters another's
    sum = sum_i g_i min(1, C / ||g_i||)      the norm is over all trained tensors together: L2 sensitivity C;
                                             0 for a row whose norm is NaN or above LONGEST

Norms are computed in float64. In float32 the squares of entries below 1e-23 are 0, so that a row could pass unclipped,
and a sum over 1e7 values is a tenth of a percent too small. The product of the clip is computed in full float32,
whatever `model.float32_matmul_precision` says.

(Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133.) Shapes: K clients, b rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsb.adapters.adapted import AdaptedModel, Tensors
from fedsb.data.tasks.base import Example, Task, ids
from fedsb.models.load import matmul_precision
from fedsb.training.scoring import forward

LONGEST = 1e19  # a gradient with a larger norm counts as 0; up to here, C over the norm is a normal float32


def clipped_sums(
    adapted: AdaptedModel,
    task: Task,
    tensors: Tensors,  # of K clients: a core's A and B as they are, all else (K, ...)
    trainable: frozenset[str],
    rows: Sequence[Sequence[Example]],  # of each client; may be empty
    clip: float,
    micro: int,  # rows of one forward; 1 where the model's layers cannot route rows
) -> tuple[Tensors, list[list[float]]]:
    """({key: (K, ...)} the sums of clipped gradients, the losses of each client's rows). No noise is added here.

    The sums do not depend on how the rows are cut into forwards. A client without rows gets zeros.
    """
    sums = {key: torch.zeros_like(tensors[key], device=adapted.device) for key in sorted(trainable)}
    losses: list[list[float]] = [[] for _ in rows]
    flat = [(k, example) for k, own in enumerate(rows) for example in own]
    flat.sort(key=lambda row: len(ids(row[1], "input_ids")))  # forwards pad to their longest row
    micro = 1 if adapted.routing.one_by_one else micro
    for start in range(0, len(flat), micro):
        part = flat[start : start + micro]
        owner_b = torch.tensor([k for k, _ in part], device=adapted.device)
        copies = {key: _copy(adapted, key, t, trainable, owner_b) for key, t in tensors.items()}
        loss_b = _backward(adapted, task, copies, trainable, [row for _, row in part])
        gradients = {key: _gradient(p) for key, p in adapted.parameters().items()}
        add_clipped(sums, gradients, owner_b, clip)
        for (k, _), loss in zip(part, loss_b.tolist(), strict=True):
            losses[k].append(loss)
    return sums, losses


def add_clipped(sums: Tensors, gradients: Tensors, owner_b: Tensor, clip: float) -> None:
    """Adds each example's gradient (b, ...), cut to the clip, to its client's sums (K, ...), in place."""
    norm_b = norms(gradients)
    usable_b = norm_b <= LONGEST  # False for NaN
    if not usable_b.all():  # such a row counts as 0: NaN would show through any noise
        gradients = {key: g[usable_b] for key, g in gradients.items()}
        norm_b, owner_b = norm_b[usable_b], owner_b[usable_b]
    factor_b = (clip / norm_b).clamp(max=1.0)  # a gradient of 0 stays 0
    weight_Kb = torch.zeros(len(next(iter(sums.values()))), len(owner_b), device=owner_b.device)
    weight_Kb[owner_b, torch.arange(len(owner_b))] = factor_b.float()
    with matmul_precision("highest"):
        for key, g in gradients.items():
            sums[key] += (weight_Kb @ g.reshape(len(g), math.prod(g.shape[1:]))).reshape(sums[key].shape)


def norms(gradients: Tensors) -> Tensor:
    """Returns the L2 norm of each example's gradient over all tensors (b, ...) together: (b,), float64."""
    each = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1, dtype=torch.float64) for g in gradients.values()]
    together: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return together


def _copy(adapted: AdaptedModel, key: str, tensor: Tensor, trainable: frozenset[str], owner_b: Tensor) -> Tensor:
    """The tensor of each row's client: in memory once where there is one client, or where all share it."""
    if adapted.is_shared(key) or (key not in trainable and len(tensor) == 1):
        return tensor
    if len(tensor) == 1:
        return tensor.expand(len(owner_b), *tensor.shape[1:])
    return tensor[owner_b.to(tensor.device)]


def _backward(
    adapted: AdaptedModel, task: Task, tensors: Tensors, trainable: frozenset[str], rows: list[Example]
) -> Tensor:
    """Forward and backward of the sum of the rows' own mean losses; gives back those losses (b,)."""
    adapted.load(tensors, trainable=trainable)
    adapted.routing.rows = len(rows) if len(rows) > 1 else None
    try:
        logits, batch = forward(adapted.model, task, rows)
        loss_b, weight_b = task.losses(logits, batch)
        loss_b = loss_b / weight_b.clamp(min=1)
        loss_b.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        adapted.routing.rows = None
    return loss_b.detach()


def _gradient(p: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
