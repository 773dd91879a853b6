"""The core adapter: a small trained matrix in a frozen basis.

    W = W0 + s * sum_i B_i R_i A_i          i = 1..h blocks; only R is trained, sent and averaged

h = 1 is Fed-SB (Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", arXiv 2502.15436) on LoRA-SB (Ponkshe et al., arXiv 2411.19557); h > 1 is the
adapter of RAVAN (arXiv 2506.05568). Federated rounds, joint training and the PEFT tuner all use `core_forward`.

Shapes: m out, n in, r rank, h blocks, K clients, b rows (examples), t tokens.
  A (h r, n) and B (m, h r) stack the blocks; R (K, h, r, r) is the list of the diagonal blocks.
R is float32, independent of the base's dtype: in bfloat16, a step of 1e-4 does not change an entry of 0.02.

Layers whose names differ only in their number may share one core, of the name "encoder.layer.*.query.R", while A and B
are each layer's own.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from fedsb.adapters.layer import AdaptedLinear, Routing, length


def core_forward(
    x: Tensor,  # (b, ..., n); the rows of client k are the k-th of K equal slices of the first axis
    A: Tensor,  # (h r, n)
    B: Tensor,  # (m, h r)
    R_Khrr: Tensor,  # (K, h, r, r)
    scale: float,
) -> Tensor:  # (b, ..., m)
    """Returns the adapter's output s * sum_i x A_i' R_i' B_i', where each client's slice of rows uses that client's R.

    Autograd keeps only x A' (tokens x h r) and s R for the backward, since B and A need no gradient. The gradient of R
    is s * sum_t (B' g_t)(A x_t)' over the tokens t of the client's rows.
    """
    K, h, r, _ = R_Khrr.shape
    z = nn.functional.linear(x, A)  # (b, ..., h r)
    R_Khrr = (R_Khrr if scale == 1 else R_Khrr * scale).to(z.dtype)  # scaled where it is smallest
    if K == h == 1:  # one client and one block need no reshaping
        return nn.functional.linear(nn.functional.linear(z, R_Khrr.reshape(r, r)), B)
    z_Kphr = z.reshape(K, -1, h, r).transpose(1, 2)  # (K, h, p, r); p = the client's tokens
    u_Kphr = z_Kphr @ R_Khrr.mT  # (K, h, p, r)
    u = u_Kphr.transpose(1, 2).reshape(z.shape)
    return nn.functional.linear(u, B)


def core_delta(A: Tensor, B: Tensor, R_hrr: Tensor, scale: float) -> Tensor:
    """Returns the change of the weight, s * sum_i B_i R_i A_i (m, n), in the dtype of R. For merging and tests."""
    return scale * core_left(B.to(R_hrr.dtype), R_hrr) @ A.to(R_hrr.dtype)


def core_left(B: Tensor, R_hrr: Tensor) -> Tensor:
    """Returns B R (m, h r), with R block-diagonal. B R and A are the factors of an equal plain LoRA."""
    h, r, _ = R_hrr.shape
    return torch.einsum("mhr,hrq->mhq", B.reshape(-1, h, r), R_hrr).reshape(-1, h * r)


def whole_core(R: Tensor, s: Tensor | None, P: Tensor | None) -> Tensor:
    """Returns s R + P (..., h, r, r), with RAVAN's scalars s (..., h) and a client's own core P, if there are any."""
    R = R if s is None else R * s[..., None, None]
    return R if P is None else R + P


@cache
def tied_name(layer: str) -> str:
    """Returns the name under which a layer shares its core with others: "layer.*.query" of "layer.0.query"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)


def key_of(layer: str, name: str, known: Container[str]) -> str:
    """Returns the key of a layer's tensor among those that are known: its own, or the one that it shares."""
    own, tied = f"{layer}.{name}", f"{tied_name(layer)}.{name}"
    return tied if own not in known and tied in known else own


class CoreLinear(AdaptedLinear):
    """A frozen linear layer with a core adapter: y = x W0' + s * sum_i x A_i' R_i' B_i'."""

    names = ("A", "B", "R")
    optional = (*AdaptedLinear.optional, "s", "P")  # RAVAN's trained scalars (K, h); a client's own frozen core, as R
    shared = (*AdaptedLinear.shared, "A", "B")

    def __init__(self, base: nn.Module, *, scale: float, routing: Routing, key: str) -> None:
        super().__init__(base, scale=scale, routing=routing, key=key)
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.R: nn.Parameter | None = None
        self.s: nn.Parameter | None = None
        self.P: nn.Parameter | None = None

    @staticmethod
    def sizes(own: Mapping[str, Tensor], m: int, n: int) -> dict[str, tuple[int, ...]]:
        h = length(own, "R")
        r = max(1, length(own, "A") // h)
        sizes = {"A": (h * r, n), "B": (m, h * r), "R": (h, r, r), "s": (h,), "P": (h, r, r)}
        return AdaptedLinear.sizes(own, m, n) | sizes

    def adapter(self, x: Tensor) -> Tensor:
        assert self.A is not None and self.B is not None and self.R is not None
        R = whole_core(self.R, self.s, self.P).to(x.device)
        return core_forward(x, self.A.to(x.dtype), self.B.to(x.dtype), R, self.scale)
