"""Local optimisers on a matrix of clients: every row has its own step count, norm and learning rate.

    AdamW (Loshchilov & Hutter, ICLR 2019, arXiv 1711.05101)        SGD with momentum, as torch.optim defines it

torch.optim keeps one learning rate and one step count per tensor. Here the rows are K clients, which differ in both.
For K = 1 the results equal torch's, except that weight decay is decoupled for SGD too: x <- x - lr decay x, whatever
the momentum.

Shapes: K clients, P trained values of a client, S steps of a round.
"""

from __future__ import annotations

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
        steps_SK = torch.arange(1, len(factors) + 1, dtype=torch.float64).unsqueeze(1) + torch.tensor(before)
        return cls(
            rates_P=(local.lr + (local.head_lr - local.lr) * mask_P).to(device),
            factors_SK=torch.tensor(factors).to(device),
            m_corrections_SK=(1 - local.beta1**steps_SK).float().to(device),
            v_corrections_SK=(1 - local.beta2**steps_SK).float().to(device),
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
    lr_KP.div_(sizes.m_corrections_SK[step, :clients].unsqueeze(1)).mul_(m)
    x.addcdiv_(lr_KP, root, value=-1)
