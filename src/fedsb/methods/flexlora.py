"""FlexLoRA: the server computes the exact update and returns its best approximation at each client's rank.

    M = sum_k p_k s B_k A_k,   U S V' = svd(M),   B <- U_r S_r^(1/2) / s^(1/2),   A <- S_r^(1/2) V_r' / s^(1/2)

Paper: "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", Bai et al.,
NeurIPS 2024, arXiv 2402.11505. Here the singular values are split evenly between the factors. One SVD serves all ranks:
the leading r_k columns and rows are the best approximation of rank r_k.

Shapes, per layer: A (r_k, n), drawn from the seed at the start; B (m, r_k), zero at the start. s = alpha / r, the same
for all.
What travels: A_k and B_k, up and down: r_k (m + n) values. Exact only if the rank of M is at most r.
Limits: the server sees every client's factors. The coordinates rotate in every round, so moments cannot be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fedsb.adapters.low_rank import product_svd
from fedsb.methods.averaging import ServerOptimizer, average, weighted_stack
from fedsb.methods.base import MethodSpec, State, Update
from fedsb.methods.fedit import FedIT, layers_of
from fedsb.utils.tensors import Tensors


class FlexLoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="flexlora",
        paper="FlexLoRA, Bai et al., arXiv 2402.11505",
        travels="A and B up; the best approximation at the client's rank down",
        adapter="factors",
        exact=False,
        secagg_compatible=False,
        mixed_ranks=True,
        supports_server_optimizer=False,
        rotates_basis=True,
        dp_noise="quadratic",
    )

    def broadcast(self, state: State, *, missed_last_round: bool = False, total_rank: int | None = None) -> Tensors:
        message = super().broadcast(state, missed_last_round=missed_last_round)
        return leading(message, self.rank if total_rank is None else total_rank)

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        tensors = dict(state.tensors)
        for layer in layers_of(tensors):
            A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]
            U, S, V = product_svd(*weighted_stack(updates, layer, 1.0), self.rank)
            root = torch.zeros(self.rank, dtype=S.dtype)
            root[: len(S)] = S.sqrt()
            tensors |= {f"{layer}.B": _widen(U, B) * root.to(B), f"{layer}.A": _widen(V, A.mT).mT * root.to(A)[:, None]}
        head = {key for key in tensors if not key.endswith((".A", ".B"))}
        heads = [replace(update, tensors={key: update.tensors[key] for key in head}) for update in updates]
        return replace(state, round=state.round + 1, tensors={**tensors, **average(heads, tensors)})


def leading(tensors: Tensors, rank: int) -> Tensors:
    """Returns the tensors with the leading `rank` rows of every A and columns of every B."""
    return {
        key: x[:rank] if key.endswith(".A") else x[:, :rank] if key.endswith(".B") else x for key, x in tensors.items()
    }


def _widen(columns: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns `columns` in the dtype of `like`, padded with zeros to its width."""
    wide = torch.zeros_like(like)
    wide[:, : columns.shape[1]] = columns.to(like)
    return wide
