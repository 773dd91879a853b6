"""Products of thin factors, without their m x n matrix: M = B A with B (m, q) and A (q, n), q small.

Both factors are reduced by QR and the SVD is taken of the q x q core, in float64: q^2 (m + n) operations instead of
min(m, n) m n. Where q reaches min(m, n), forming M is the cheaper way, and is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedsb.methods.base import Update


def weighted_stack(updates: Sequence[Update], layer: str, scale: float) -> tuple[Tensor, Tensor]:
    """[p_1 s B_1, p_2 s B_2, ...] (m, sum r_k) and [A_1; A_2; ...] (sum r_k, n), by client name: their product is M.

    The weights stand on one side only.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    total = sum(update.weight for update in ordered)
    B = torch.cat([u.tensors[f"{layer}.B"].double() * (scale * u.weight / total) for u in ordered], dim=1)
    return B, torch.cat([update.tensors[f"{layer}.A"].double() for update in ordered])


def product_svd(B: Tensor, A: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, p), S (p,), V (n, p) of M = B A, the leading `rank` of them; p = min(q, m, n) at most."""
    B, A = B.double(), A.double()
    if len(A) >= min(len(B), A.shape[1]):
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        return U[:, :rank], S[:rank], Vh.mT[:, :rank]
    Q_B, T_B = torch.linalg.qr(B)
    Q_A, T_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(T_B @ T_A.mT)
    return Q_B @ U[:, :rank], S[:rank], Q_A @ Vh.mT[:, :rank]


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """||B A||_F, from the Gram matrices."""
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt()
