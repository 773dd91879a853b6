"""Local optimisers on a matrix of clients: every row has its own step count, norm and learning rate.

    AdamW (Loshchilov & Hutter, ICLR 2019, arXiv 1711.05101)        SGD with momentum, as torch.optim defines it
    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)    of the adapter's matrices; AdamW of all else

Muon steps along the nearest orthogonal matrix to Nesterov's momentum. An entry then changes by the learning rate (root
mean square), as in AdamW's first step, so that rates are of the same size. On a core of r x r this costs next to
nothing.

torch.optim keeps one learning rate and one step count per tensor. Here the rows are K clients, which differ in both.
For K = 1 the results equal torch's, except that weight decay is decoupled for SGD too: x <- x - lr decay x, whatever
the momentum.

Shapes: K clients, P trained values of a client, S steps of a round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.training.buffers import ClientBuffers
from fedsb.training.local import LocalTraining


def clip_rows(gradients: Tensor, max_norm_l2: float) -> Tensor:  # (K, P)
    """Scales each row, in place, to an L2 norm of at most `max_norm_l2`. Returns the norms before it, (K,)."""
    norms_K: Tensor = torch.linalg.vector_norm(gradients, dim=1)
    gradients.mul_((max_norm_l2 / (norms_K + 1e-6)).clamp(max=1.0).unsqueeze(1))
    return norms_K


@dataclass(frozen=True)
class StepSizes:
    """The factors of the steps of a round, on the device before the first step."""

    rates_P: Tensor  # (P,) the learning rate of each value: the adapter's, or the head's
    factors_SK: Tensor  # (S, K) the schedule
    m_corrections_SK: Tensor  # (S, K) 1 - beta1^t, t counted from a client's first step
    v_corrections_SK: Tensor
    matrices: tuple[tuple[str, ...], ...]  # the adapter's matrices, those of one shape together

    @classmethod
    def of(
        cls,
        local: LocalTraining,
        buffers: ClientBuffers,
        heads: frozenset[str],
        factors: list[list[float]],  # of each step, for each client
        before: list[int],  # steps that each client's moments have seen
    ) -> StepSizes:
        device = buffers.values.device
        mask_P = buffers.layout.mask(heads)
        by_shape: dict[tuple[int, ...], tuple[str, ...]] = {}
        for key, shape in buffers.layout.shapes:
            if len(shape) > 1 and key not in heads:
                by_shape[shape] = (*by_shape.get(shape, ()), key)
        steps_SK = torch.arange(1, len(factors) + 1, dtype=torch.float64).unsqueeze(1) + torch.tensor(before)
        return cls(
            rates_P=(local.lr + (local.head_lr - local.lr) * mask_P).to(device),
            factors_SK=torch.tensor(factors).to(device),
            m_corrections_SK=(1 - local.beta1**steps_SK).float().to(device),
            v_corrections_SK=(1 - local.beta2**steps_SK).float().to(device),
            matrices=tuple(by_shape.values()),
        )


@torch.no_grad()
def step_rows(local: LocalTraining, buffers: ClientBuffers, clients: int, sizes: StepSizes, step: int) -> None:
    """Takes one optimiser step for each of the first `clients` rows, in place."""
    x, g, m, v = (a[:clients] for a in (buffers.values, buffers.gradients, buffers.m, buffers.v))
    lr_KP = sizes.factors_SK[step, :clients].unsqueeze(1) * sizes.rates_P
    if local.weight_decay:
        x.mul_(1 - lr_KP * local.weight_decay)
    if local.optimizer == "sgd":
        m.mul_(local.momentum).add_(g)
        x.addcmul_(lr_KP, m, value=-1)
        return
    m.lerp_(g, 1 - local.beta1)
    v.mul_(local.beta2).addcmul_(g, g, value=1 - local.beta2)
    root = (v / sizes.v_corrections_SK[step, :clients].unsqueeze(1)).sqrt_().add_(1e-8)
    rates_KP = lr_KP.clone() if local.optimizer == "muon" else lr_KP
    lr_KP.div_(sizes.m_corrections_SK[step, :clients].unsqueeze(1)).mul_(m)
    if local.optimizer == "muon":
        ahead = m.lerp(g, 1 - local.beta1)
        changes_by, root_by, rates_by, ahead_by = (buffers.layout.views(a) for a in (lr_KP, root, rates_KP, ahead))
        for keys in sizes.matrices:
            directions = nearest_orthogonal(torch.stack([ahead_by[key] for key in keys]))
            for key, direction in zip(keys, directions, strict=True):
                changes_by[key].copy_(rates_by[key] * direction * math.sqrt(max(direction.shape[-2:])))
                root_by[key].fill_(1.0)
    x.addcdiv_(lr_KP, root, value=-1)


def nearest_orthogonal(M: Tensor) -> Tensor:  # (..., m, n)
    """Returns U V' of the singular value decomposition U S V' of each matrix, with singular values of 0.7 to 1.2.

    Five Newton-Schulz steps, with the coefficients of Jordan et al. (2024). A matrix of zeros stays as it is.
    """
    X = M if M.shape[-2] <= M.shape[-1] else M.mT
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-12)
    for _ in range(5):
        S = X @ X.mT
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
    result: Tensor = X if M.shape[-2] <= M.shape[-1] else X.mT
    return result
