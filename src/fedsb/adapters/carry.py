"""The carried adapter: what rounds have added to the base, frozen, beside the adapter that is trained.

    W = W0 + C + s * (adapter)          C = sum over rounds of E_t

Methods that change the base (FLoRA, FedEx-LoRA) and a basis that is refreshed put their E_t here, in float32, so that a
quantised base is never written to and a site that skipped rounds can be told all of C at once.

Keys, a layer: "carry_B" (m, q) and "carry_A" (q, n), the factors of all E_t side by side, until q is min(m, n) / 2;
then "carry_D" (m, n), their sum. E_t itself travels as "news_B" (m, p) and "news_A" (p, n), or as "news_D" (m, n).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CARRY = ("carry_A", "carry_B", "carry_D")
NEWS = ("news_A", "news_B", "news_D")

Tensors = dict[str, Tensor]


def is_carried(key: str) -> bool:
    return key.rpartition(".")[2] in CARRY


def is_news(key: str) -> bool:
    return key.rpartition(".")[2] in NEWS


def carried(tensors: Mapping[str, Tensor]) -> Tensors:
    """Those of `tensors` that make up C."""
    return {key: tensor for key, tensor in tensors.items() if is_carried(key)}


def news_of(layer: str, B: Tensor, A: Tensor) -> Tensors:
    """E = B A with B (m, p) and A (p, n), as it travels: its factors, or E where that is no larger.

    Row by row in memory, as a site reads them: products of the same numbers in another order differ in their last bits.
    """
    (m, p), n = B.shape, A.shape[1]
    A, B = A.contiguous(), B.contiguous()
    if p * (m + n) >= m * n:
        return {f"{layer}.news_D": B @ A}
    return {f"{layer}.news_A": A, f"{layer}.news_B": B}


def news_values(m: int, n: int, p: int) -> int:
    """Values that E of rank p takes."""
    return min(p * (m + n), m * n)


def catch_up(held: Mapping[str, Tensor], message: Mapping[str, Tensor]) -> Tensors:
    """What a site holds after a message: with the news added to C, or with C as a whole from the message."""
    if whole := carried(message):
        return {**{key: tensor for key, tensor in held.items() if not is_carried(key)}, **whole}
    now = dict(held)
    for layer in sorted({key.rpartition(".")[0] for key in message if is_news(key)}):
        part = {name: message.get(f"{layer}.{name}") for name in NEWS}
        old = {name: now.pop(f"{layer}.{name}", None) for name in CARRY}
        now |= {f"{layer}.{name}": tensor for name, tensor in _add(*old.values(), *part.values()).items()}
    return now


def carry_factors(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    """(B (m, q), A (q, n)) of C; None where nothing was carried. A dense C has q = min(m, n): U S and V' of its SVD."""
    A, B, D = (tensors.get(f"{layer}.{name}") for name in CARRY)
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
            return {"carry_A": A, "carry_B": B}
        return {"carry_D": B @ A}
    parts = [D, E]
    parts += [left @ right for left, right in ((B, A), (B_new, A_new)) if left is not None and right is not None]
    return {"carry_D": torch.stack([part for part in parts if part is not None]).sum(0)}
