"""Local optimisers over tensors with a leading axis of clients: every client its own step count, norm and rate.

    AdamW (Loshchilov & Hutter, ICLR 2019, arXiv 1711.05101)        SGD with momentum, as torch.optim defines it

torch.optim keeps one learning rate and one step count a tensor; here a tensor holds K clients, which differ in both.
For K = 1 the results are torch's, but that weight decay is decoupled for SGD too: x <- x - lr decay x, whatever the
momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedsb.training.local import LocalTraining

Tensors = dict[str, Tensor]


def clip_by_client(gradients: Mapping[str, Tensor], clip_norm_l2: float) -> Tensor:
    """Scales each client's gradients, in place, to an L2 norm of at most `clip_norm_l2`; returns their norms (K,)."""
    norms_K = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    factor_K = (clip_norm_l2 / (norms_K + 1e-6)).clamp(max=1.0)
    for g in gradients.values():
        g.mul_(_along(factor_K, g))
    return norms_K


@torch.no_grad()
def step_by_client(
    local: LocalTraining,
    parameters: Mapping[str, Tensor],  # each (K, ...)
    gradients: Mapping[str, Tensor],  # each (K, ...)
    moments: Tensors,  # "m.<key>", "v.<key>" (K, ...) and "steps" (K,); changed in place, empty at the start
    factor_K: Tensor,  # (K,) the schedule's factor for each client
    heads: Iterable[str],  # keys that take head_lr
) -> None:
    """One optimiser step for every client, in place."""
    first = next(iter(parameters.values()))
    t_K = moments["steps"] = moments.get("steps", torch.zeros(len(first), device=first.device)) + 1
    if local.optimizer == "adamw":  # read from the device once a step, not once a tensor
        t = t_K.cpu().double()
        m_correction_K, v_correction_K = 1 - local.beta1**t, 1 - local.beta2**t
    for key, x in parameters.items():
        g = gradients[key]
        lr = _along(factor_K * (local.head_lr if key in heads else local.lr), x)
        if local.weight_decay:
            x.mul_(1 - lr * local.weight_decay)
        m = moments.setdefault(f"m.{key}", torch.zeros_like(x))
        if local.optimizer == "sgd":
            m.mul_(local.momentum).add_(g)
            x.sub_(lr * m)
            continue
        v = moments.setdefault(f"v.{key}", torch.zeros_like(x))
        m.lerp_(g, 1 - local.beta1)
        v.mul_(local.beta2).addcmul_(g, g, value=1 - local.beta2)
        m_hat = m / _along(m_correction_K, x)
        v_hat = v / _along(v_correction_K, x)
        x.sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))


def _along(values_K: Tensor, like: Tensor) -> Tensor:
    """(K,) -> (K, 1, 1, ...) to multiply a tensor (K, ...)."""
    return values_K.to(like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))
