"""FedSVD: clients train B; after every round the SVD of the global update gives an orthonormal A and a new B.

    dW_k = s B_k A        U S V' = (sum_k p_k B_k) A,   A <- V',   B <- U S

Paper: "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", Lee et al., NeurIPS 2025,
arXiv 2505.12805.

Shapes, per layer: A (r, n), drawn from the seed at the start; B (m, r), zero at the start. s = alpha / r.
What travels: B up, r m values; A and B down, r (m + n) values. Exact: the SVD does not change the product.
Limits: the coordinates rotate in every round, so neither clients nor the server can keep an optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fedsb.adapters.low_rank import product_svd
from fedsb.methods.averaging import ServerOptimizer, average
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT, layers_of
from fedsb.utils.tensors import Shapes, Tensors


class FedSVD(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="fedsvd",
        paper="FedSVD, Lee et al., arXiv 2505.12805",
        travels="B up; A and B down",
        adapter="factors",
        exact=True,
        secagg_compatible=True,
        dp_noise="linear",
        supports_server_optimizer=False,
        rotates_basis=True,
    )

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        B, A = (sum(self.rank * shape[axis] for shape in shapes.values()) for axis in (0, 1))
        return Traffic(up=B, down=A + B, head=head)

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(key for key in tensors if not key.endswith(".A"))

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        tensors = {**state.tensors, **average(updates, state.tensors)}
        for layer in layers_of(tensors):
            A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]
            if torch.any(B != 0):  # a product of zero has no directions, so A stays
                U, S, V = product_svd(B, A)
                tensors |= {f"{layer}.A": V.mT.to(A), f"{layer}.B": (U * S).to(B)}
        return replace(state, round=state.round + 1, tensors=tensors)
