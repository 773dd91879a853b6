"""The residual adapter: what rounds have added to the base outside the trained adapter, frozen.

    W = W0 + C + s * (adapter)          C = sum over rounds of E_t

FLoRA, FedEx-LoRA and a refreshed basis put their E_t here, in float32. A quantised base is therefore never written to,
and a client that skipped rounds can receive all of C at once.

Keys of a layer: "residual_B" (m, q) and "residual_A" (q, n) are the factors of all E_t side by side until q reaches
min(m, n) / 2, then "residual_D" (m, n) is their sum. E_t itself travels as "delta_B" (m, p) and "delta_A" (p, n), or as
"delta_D" (m, n).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

RESIDUAL = ("residual_A", "residual_B", "residual_D")
DELTA = ("delta_A", "delta_B", "delta_D")

Tensors = dict[str, Tensor]


def is_residual(key: str) -> bool:
    return key.rpartition(".")[2] in RESIDUAL


def is_delta(key: str) -> bool:
    return key.rpartition(".")[2] in DELTA


def residual_of(tensors: Mapping[str, Tensor]) -> Tensors:
    """Those of `tensors` that make up C."""
    return {key: tensor for key, tensor in tensors.items() if is_residual(key)}


def delta_of(layer: str, B: Tensor, A: Tensor) -> Tensors:
    """E = B A with B (m, p) and A (p, n), as it travels: its factors, or E where that is no larger.

    Row by row in memory, as a site reads them: products of the same numbers in another order differ in their last bits.
    """
    (m, p), n = B.shape, A.shape[1]
    A, B = A.contiguous(), B.contiguous()
    if p * (m + n) >= m * n:
        return {f"{layer}.delta_D": B @ A}
    return {f"{layer}.delta_A": A, f"{layer}.delta_B": B}


def delta_values(m: int, n: int, p: int) -> int:
    """Values that E of rank p takes."""
    return min(p * (m + n), m * n)


def apply_delta(held: Mapping[str, Tensor], message: Mapping[str, Tensor]) -> Tensors:
    """What a site holds after a message: with the news added to C, or with C as a whole from the message."""
    if whole := residual_of(message):
        return {**{key: tensor for key, tensor in held.items() if not is_residual(key)}, **whole}
    now = dict(held)
    for layer in sorted({key.rpartition(".")[0] for key in message if is_delta(key)}):
        part = {name: message.get(f"{layer}.{name}") for name in DELTA}
        old = {name: now.pop(f"{layer}.{name}", None) for name in RESIDUAL}
        now |= {f"{layer}.{name}": tensor for name, tensor in _add(*old.values(), *part.values()).items()}
    return now


def residual_factors(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    """(B (m, q), A (q, n)) of C; None where nothing was carried. A dense C has q = min(m, n): U S and V' of its SVD."""
    A, B, D = (tensors.get(f"{layer}.{name}") for name in RESIDUAL)
    if D is not None:
        U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
        return (U * S).to(D.dtype), Vh.to(D.dtype)
    return None if A is None or B is None else (B, A)


def _add(
    A: Tensor | None, B: Tensor | None, D: Tensor | None, A_new: Tensor | None, B_new: Tensor | None, E: Tensor | None
) -> Tensors:
    """C + E."""
    if D is None and E is None:
        assert A_new is not None and B_new is not None
        A = A_new if A is None else torch.cat([A, A_new])
        B = B_new if B is None else torch.cat([B, B_new], dim=1)
        if len(A) < min(len(B), A.shape[1]) / 2:
            return {"residual_A": A, "residual_B": B}
        return {"residual_D": B @ A}
    parts = [D, E]
    parts += [left @ right for left, right in ((B, A), (B_new, A_new)) if left is not None and right is not None]
    return {"residual_D": torch.stack([part for part in parts if part is not None]).sum(0)}
