"""The two-factor adapter of LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685).

    W = W0 + s B A          s = alpha / r

Shapes: m out, n in, r rank, K clients, b rows. A is (K, r, n) and B is (K, m, r). A factor that all clients share may
have K = 1. Both are float32, independent of the base's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsb.adapters.layer import AdaptedLinear, Routing, length
from fedsb.utils.rng import keyed_generator


def factor_forward(
    x: Tensor,  # (b, ..., n); the rows of client k are the k-th of K equal slices of the first axis
    A_Krn: Tensor,  # (K or 1, r, n)
    B_Kmr: Tensor,  # (K or 1, m, r)
    scale: float,
) -> Tensor:  # (b, ..., m)
    """Returns the adapter's output s x A' B', where each client's slice of rows uses that client's factors."""
    K = max(len(A_Krn), len(B_Kmr))
    x_Kpn = x.reshape(K, -1, x.shape[-1])  # p = the client's tokens
    z_Kpr = x_Kpn @ A_Krn.to(x.dtype).mT
    y_Kpm = (z_Kpr if scale == 1 else z_Kpr * scale) @ B_Kmr.to(x.dtype).mT  # scaled where it is smallest
    return y_Kpm.reshape(*x.shape[:-1], B_Kmr.shape[1])


@dataclass(frozen=True, kw_only=True)
class Factors:
    """An adapter as plain LoRA: dW = scale * B A, with B (m, h r) and A (h r, n), where h r is the total rank."""

    A: Tensor
    B: Tensor
    scale: float

    def plus(self, other: tuple[Tensor, Tensor] | None) -> Factors:
        """Returns the factors of the sum of this adapter and of B' A' in `other`. The ranks add up."""
        if other is None:
            return self
        B, A = other
        return Factors(
            A=torch.cat([self.A, A.to(self.A)]),
            B=torch.cat([self.B, B.to(self.B) / self.scale], dim=1),
            scale=self.scale,
        )


class FactorLinear(AdaptedLinear):
    """A frozen linear layer with a two-factor adapter: y = x W0' + s x A' B'."""

    names = ("A", "B")

    def __init__(self, base: nn.Module, *, scale: float, routing: Routing, key: str) -> None:
        super().__init__(base, scale=scale, routing=routing, key=key)
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None

    @staticmethod
    def sizes(own: Mapping[str, Tensor], m: int, n: int) -> dict[str, tuple[int, ...]]:
        r = length(own, "A")
        return AdaptedLinear.sizes(own, m, n) | {"A": (r, n), "B": (m, r)}

    def adapter(self, x: Tensor) -> Tensor:
        assert self.A is not None and self.B is not None
        return factor_forward(x, self.A.to(x.device), self.B.to(x.device), self.scale)


def factor_start(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, round: int = 0) -> dict[str, Tensor]:
    """Returns LoRA's initial factors: "<layer>.A" (r, n), uniform with variance 1 / (3 n); "<layer>.B" (m, r), zero.

    A is drawn by the key (seed, layer, round): layers differ, and all clients have the same A. Both are float32.
    """
    tensors: dict[str, Tensor] = {}
    for layer, (m, n) in shapes.items():
        bound = n**-0.5
        draw = keyed_generator(seed, "lora A", layer, *([round] if round else [])).uniform(
            -bound, bound, size=(rank, n)
        )
        tensors[f"{layer}.A"] = torch.from_numpy(draw).float()
        tensors[f"{layer}.B"] = torch.zeros(m, rank)
    return tensors
