"""The server's arithmetic: the weighted mean of updates, and an optional optimiser that steps towards it.

    mean = sum_k p_k x_k,  p_k = weight_k / sum weight        FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629)
    momentum:  v <- beta1 v + d;  x <- x + lr v               FedAvgM (Hsu et al. 2019, arXiv 1909.06335), d = mean - x
    adam:      m, v of d, then    x <- x + lr m / (sqrt v + tau)    FedAdam (Reddi et al., ICLR 2021, arXiv 2003.00295)

Means are formed in float64 and given back in the tensors' own dtype.
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
    """How the server moves towards the mean. "none" takes the mean itself."""

    kind: Literal["none", "momentum", "adam"] = "none"
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3  # Adam's floor, in units of the pseudo-gradient


def average(updates: Sequence[Update], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """sum_k p_k x_k of the updates' tensors. The order of the updates does not matter: they are summed by name.

    Clients of a lower rank send the leading corner of a tensor: each entry is averaged over those that hold it, and
    stays as it is in `old` where none does.
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


def server_step(
    server: ServerOptimizer, old: Mapping[str, Tensor], mean: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the new tensors, the new moments), of what is in `mean`. A key's moments are kept as "m.<key>" and "v.<key>"."""
    if server.kind == "none":
        return dict(mean), {}
    new: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for key, target in mean.items():
        x = old[key]
        d = target - x
        m = moments.get(f"m.{key}", torch.zeros_like(d))
        if server.kind == "momentum":
            m = kept[f"m.{key}"] = server.beta1 * m + d
            new[key] = x + server.lr * m
        else:
            v = moments.get(f"v.{key}", torch.zeros_like(d))
            m = kept[f"m.{key}"] = server.beta1 * m + (1 - server.beta1) * d
            v = kept[f"v.{key}"] = server.beta2 * v + (1 - server.beta2) * d**2
            new[key] = x + server.lr * m / (v.sqrt() + server.tau)
    return new, kept
