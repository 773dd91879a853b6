"""FedEx-LoRA: federated averaging of both factors; the error of the average is added to the base.

    A <- Abar = sum_k p_k A_k,   B <- Bbar = sum_k p_k B_k
    W0 <- W0 + E,   E = sum_k p_k s B_k A_k - s Bbar Abar = sum_k p_k s (B_k - Bbar)(A_k - Abar)

Paper: "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", Singhal et al.,
ACL 2025, arXiv 2410.09432. E contains the scale s.

Shapes, per layer: A (r, n), drawn from the seed; B (m, r), zero at the start. s = alpha / r. For c clients, the rank of
E is at most (c - 1) r.
What travels: A and B up, r (m + n) values; their means and E down, c r (m + n) values, or r (m + n) + m n if that is
less. E is sent as the factors U S and V' of its SVD, since the centred factors would reveal every client's factors to
all. Clients add E to the residual adapter (adapters/residual.py). A client that missed a round receives all of it.
Limits: the server sees every client's factors. The base changes, so the result as an ordinary LoRA has a high rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fedsb.adapters.low_rank import product_svd
from fedsb.adapters.residual import delta_of, delta_values
from fedsb.methods.averaging import ServerOptimizer, average, weighted_stack
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT, layers_of
from fedsb.utils.tensors import Shapes, Tensors


class FedExLoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="fedex-lora",
        paper="FedEx-LoRA, Singhal et al., arXiv 2410.09432",
        travels="A and B up; their means and the residual's factors down",
        adapter="factors",
        exact=True,
        secagg_compatible=False,
        changes_base=True,
        supports_server_optimizer=False,
        dp_noise="quadratic",
    )

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        up = sum(self.rank * (m + n) for m, n in shapes.values())
        residual = sum(delta_values(m, n, (clients - 1) * self.rank) for m, n in shapes.values()) if round else 0
        return Traffic(up=up, down=up + residual, head=head)

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        mean = average(updates, state.tensors)
        delta: Tensors = {}
        for layer in layers_of(mean):
            A, B = mean[f"{layer}.A"], mean[f"{layer}.B"]
            if not (rank := (len(updates) - 1) * self.rank):
                continue
            stack_B, stack_A = weighted_stack(updates, layer, self.scale)
            E_B, E_A = torch.cat([stack_B, -self.scale * B.double()], dim=1), torch.cat([stack_A, A.double()])
            m, n = len(B), A.shape[1]
            if delta_values(m, n, rank) == m * n:  # E is sent as a matrix and needs no SVD
                delta[f"{layer}.delta_D"] = (E_B @ E_A).to(B)
                continue
            U, S, V = product_svd(E_B, E_A, rank)
            delta |= delta_of(layer, (U * S).to(B), V.mT.to(A))
        shared = self.update_shared(state.shared, delta)
        return replace(
            state, round=state.round + 1, tensors={**state.tensors, **mean}, shared=shared, shared_delta=delta
        )
