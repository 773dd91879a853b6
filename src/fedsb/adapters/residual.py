"""The residual adapter: the sum of what rounds have added to the base outside the trained adapter. It is frozen.

    W = W0 + C + s * (adapter)          C = sum over rounds of E_t

FLoRA, FedEx-LoRA and a refreshed basis add their E_t here, in float32. A quantised base is therefore never modified,
and a client that skipped rounds can receive all of C at once.

Keys of a layer: "residual_B" (m, q) and "residual_A" (q, n) are the concatenated factors of all E_t until q reaches
min(m, n) / 2. From then on, "residual_D" (m, n) is their sum. E_t itself is sent as "delta_B" (m, p) and "delta_A"
(p, n), or as "delta_D" (m, n).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsb.utils.tensors import Tensors

RESIDUAL = ("residual_A", "residual_B", "residual_D")
DELTA = ("delta_A", "delta_B", "delta_D")


def is_residual(key: str) -> bool:
    """Returns whether the tensor is a part of C."""
    return key.rpartition(".")[2] in RESIDUAL


def is_delta(key: str) -> bool:
    """Returns whether the tensor is a part of some E_t."""
    return key.rpartition(".")[2] in DELTA


def residual_of(tensors: Mapping[str, Tensor]) -> Tensors:
    """Returns those of `tensors` that are parts of C."""
    return {key: tensor for key, tensor in tensors.items() if is_residual(key)}


def delta_of(layer: str, B: Tensor, A: Tensor) -> Tensors:
    """Returns E = B A, with B (m, p) and A (p, n), as it is sent: as its factors, or as a matrix if that is not larger.

    The tensors are contiguous, as a client reads them. Otherwise products of the same numbers would differ in their
    last bits.
    """
    (m, p), n = B.shape, A.shape[1]
    A, B = A.contiguous(), B.contiguous()
    if p * (m + n) >= m * n:
        return {f"{layer}.delta_D": B @ A}
    return {f"{layer}.delta_A": A, f"{layer}.delta_B": B}


def delta_values(m: int, n: int, p: int) -> int:
    """Returns the number of values with which E of rank p is sent."""
    return min(p * (m + n), m * n)


def apply_delta(shared: Mapping[str, Tensor], message: Mapping[str, Tensor]) -> Tensors:
    """Returns a client's shared tensors after a message, which contains either E_t or the whole of C."""
    if whole := residual_of(message):
        return {**{key: tensor for key, tensor in shared.items() if not is_residual(key)}, **whole}
    now = dict(shared)
    for layer in sorted({key.rpartition(".")[0] for key in message if is_delta(key)}):
        part = {name: message.get(f"{layer}.{name}") for name in DELTA}
        old = {name: now.pop(f"{layer}.{name}", None) for name in RESIDUAL}
        now |= {f"{layer}.{name}": tensor for name, tensor in _add(*old.values(), *part.values()).items()}
    return now


def residual_factors(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    """Returns the factors B (m, q) and A (q, n) of C, or None if C is zero.

    A dense C has q = min(m, n): the factors are U S and V' of its SVD.
    """
    A, B, D = (tensors.get(f"{layer}.{name}") for name in RESIDUAL)
    if D is not None:
        U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
        return (U * S).to(D.dtype), Vh.to(D.dtype)
    return None if A is None or B is None else (B, A)


def _add(
    A: Tensor | None, B: Tensor | None, D: Tensor | None, A_new: Tensor | None, B_new: Tensor | None, E: Tensor | None
) -> Tensors:
    """Returns C + E."""
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
