"""FedRot-LoRA: every client rotates its factors towards the last global ones before they are averaged.

    O_k = argmin over orthogonal O of ||B_k O - B||^2 + ||O' A_k - A||^2
    A <- sum_k p_k O_k' A_k,   B <- sum_k p_k B_k O_k        (the rotation does not change the product B_k A_k)

Paper: "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", Zhang et al. 2026, arXiv 2602.23638.
O_k = P Q' from the SVD P D Q' of B_k' B + A_k A' (r x r): the orthogonal Procrustes problem, over both factors at
once and without partial rotation. The authors' code fits A and B in alternate rounds from the second round on, without
reflections, and also offers a partial rotation.

Shapes, per layer: A (r, n), drawn from the seed; B (m, r), zero at the start. s = alpha / r.
What travels: A and B, up and down: r (m + n) values, as in FedIT.
Limits: not exact, but closer than FedIT if clients differ only by a rotation.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fedsb.methods.base import MethodSpec
from fedsb.methods.fedit import FedIT, layers_of
from fedsb.utils.tensors import Tensors


class FedRotLoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="fedrot-lora",
        paper="FedRot-LoRA, Zhang et al., arXiv 2602.23638",
        travels="A and B up, rotated towards the last global ones; their means down",
        adapter="factors",
        exact=False,
        secagg_compatible=True,
        dp_noise="quadratic",
        rotates_basis=True,
    )

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        sent = dict(trained)
        for layer in layers_of(trained):
            A, B = trained[f"{layer}.A"].double(), trained[f"{layer}.B"].double()
            P, _, Qh = torch.linalg.svd(B.mT @ received[f"{layer}.B"].double() + A @ received[f"{layer}.A"].double().mT)
            O = P @ Qh  # noqa: E741
            sent |= {
                f"{layer}.A": (O.mT @ A).to(trained[f"{layer}.A"]),
                f"{layer}.B": (B @ O).to(trained[f"{layer}.B"]),
            }
        return sent, {}
