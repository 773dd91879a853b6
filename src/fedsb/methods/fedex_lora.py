"""FedEx-LoRA: federated averaging of both factors, and what the average loses is added to the base.

    A <- Abar = sum_k p_k A_k,   B <- Bbar = sum_k p_k B_k
    W0 <- W0 + E,   E = sum_k p_k s B_k A_k - s Bbar Abar = sum_k p_k s (B_k - Bbar)(A_k - Abar)

Paper: "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", Singhal et al.,
ACL 2025, arXiv 2410.09432. The scale s is in E: it is added as it is.

Shapes, a layer: A (r, n) from a seed, B (m, r), zero at the start. s = alpha / r. E has rank (c - 1) r at most, for c
clients.
What travels: A and B up, r (m + n) values; their means and E down, c r (m + n), or r (m + n) + m n where that is less.
E travels as the factors U S and V' of its SVD: the centred factors side by side would show every client's to all. It is
kept in the carried adapter (adapters/carry.py); a site that missed a round gets all of that.
Limits: the server sees every client's factors. The base changes: an ordinary LoRA of the result has a high rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.low_rank import product_svd, weighted_stack
from fedsb.adapters.residual import delta_of, delta_values
from fedsb.methods.averaging import ServerOptimizer, average
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT, layers_of


@dataclass(frozen=True, kw_only=True)
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
            if delta_values(m, n, rank) == m * n:  # E travels as it is, and needs no SVD
                delta[f"{layer}.delta_D"] = (E_B @ E_A).to(B)
                continue
            U, S, V = product_svd(E_B, E_A, rank)
            delta |= delta_of(layer, (U * S).to(B), V.mT.to(A))
        shared = self.update_shared(state.shared, delta)
        return replace(
            state, round=state.round + 1, tensors={**state.tensors, **mean}, shared=shared, shared_delta=delta
        )
