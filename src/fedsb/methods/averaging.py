"""The server's arithmetic: the weighted mean of updates, and an optional optimizer that steps along the mean change.

    mean = sum_k p_k x_k,  p_k = weight_k / sum weight        FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629)
    momentum:  v <- beta1 v + d;  x <- x + lr v               FedAvgM (Hsu et al. 2019, arXiv 1909.06335), d = mean - x
    adam:      m, v of d, then    x <- x + lr m / (sqrt v + tau)    FedAdam (Reddi et al., ICLR 2021, arXiv 2003.00295)

Means are computed in float64 and returned in the tensors' own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedsb.methods.base import Update


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """The settings of the server's optimizer. With "none", the mean becomes the new state."""

    kind: Literal["none", "momentum", "adam"] = "none"
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3  # Adam's floor, in units of the pseudo-gradient


def average(updates: Sequence[Update], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns sum_k p_k x_k for each tensor. Updates are summed in the order of their names.

    Clients of a lower rank send the leading corner of a tensor. Each entry is averaged over the clients that sent it;
    entries that no client sent keep their value in `old`.
    """
    if not updates:
        raise ValueError("no updates to average")
    ordered = sorted(updates, key=lambda update: update.client)
    return {key: _mean([(u.weight, u.tensors[key]) for u in ordered], old[key]) for key in ordered[0].tensors}


def _mean(weighted: Sequence[tuple[float, Tensor]], old: Tensor) -> Tensor:
    total, weight = torch.zeros(old.shape, dtype=torch.float64), torch.zeros(old.shape, dtype=torch.float64)
    for w, x in weighted:
        corner = tuple(slice(size) for size in x.shape)
        total[corner] += w * x.double()
        weight[corner] += w
    return torch.where(weight > 0, total / weight, old.double()).to(old.dtype)


def weighted_stack(updates: Sequence[Update], layer: str, scale: float) -> tuple[Tensor, Tensor]:
    """Returns [p_1 s B_1, p_2 s B_2, ...] (m, sum r_k) and [A_1; A_2; ...] (sum r_k, n), whose product is the mean dW.

    Clients are in the order of their names. Only B is multiplied by the weights.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    total = sum(update.weight for update in ordered)
    B = torch.cat([u.tensors[f"{layer}.B"].double() * (scale * u.weight / total) for u in ordered], dim=1)
    return B, torch.cat([update.tensors[f"{layer}.A"].double() for update in ordered])


def server_step(
    server: ServerOptimizer, old: Mapping[str, Tensor], mean: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the new tensors for the keys of `mean`, and the new moments "m.<key>" and "v.<key>"."""
    if server.kind == "none":
        return dict(mean), {}
    new: dict[str, Tensor] = {}
    new_moments: dict[str, Tensor] = {}
    for key, target in mean.items():
        x = old[key]
        d = target - x
        m = moments.get(f"m.{key}", torch.zeros_like(d))
        if server.kind == "momentum":
            m = new_moments[f"m.{key}"] = server.beta1 * m + d
            new[key] = x + server.lr * m
        else:
            v = moments.get(f"v.{key}", torch.zeros_like(d))
            m = new_moments[f"m.{key}"] = server.beta1 * m + (1 - server.beta1) * d
            v = new_moments[f"v.{key}"] = server.beta2 * v + (1 - server.beta2) * d**2
            new[key] = x + server.lr * m / (v.sqrt() + server.tau)
    return new, new_moments
