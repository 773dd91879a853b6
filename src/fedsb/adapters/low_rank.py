"""Products of thin factors, without their m x n matrix: M = B A with B (m, q) and A (q, n), q small.

Both factors are reduced by QR, and the SVD is computed on the q x q core, in float64. This takes q^2 (m + n) operations
instead of min(m, n) m n. If q is at least min(m, n), computing M itself is cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(B: Tensor, A: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading `rank` singular triplets of M = B A: U (m, p), S (p,), V (n, p), with p <= min(q, m, n)."""
    B, A = B.double(), A.double()
    if len(A) >= min(len(B), A.shape[1]):
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        return U[:, :rank], S[:rank], Vh.mT[:, :rank]
    Q_B, T_B = torch.linalg.qr(B)
    Q_A, T_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(T_B @ T_A.mT)
    return Q_B @ U[:, :rank], S[:rank], Q_A @ Vh.mT[:, :rank]


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Returns ||B A||_F, computed from the Gram matrices."""
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt()
