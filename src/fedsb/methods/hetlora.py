"""HetLoRA: clients of different ranks, padded with zeros, weighted by the size of their updates; ranks may shrink.

    A <- sum_k w_k pad(A_k),   B <- sum_k w_k pad(B_k),   w_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F
    local loss + lambda ||B_k[:, g:]||_F ||A_k[g:]||_F,   g = gamma r_k; where that tail shrank, it is cut off for good

Paper: "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", Cho et al., EMNLP 2024,
arXiv 2401.06432.

Shapes, a layer: A (r_k, n) from a seed at first, B (m, r_k), zero at the start. s = alpha / r, the same for all.
What travels: A_k and B_k, up and down: r_k (m + n) values; and up one number, the rank that the client goes on with.
Limits: not exact. The server needs the size of every client's update. While all updates are zero, they weigh by rows.
The tail's size is that of all layers together, so that a client has one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.low_rank import product_norm
from fedsb.methods.averaging import ServerOptimizer, average
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT, layers_of
from fedsb.methods.flexlora import leading

RANK = "rank"  # goes up: the rank that the client goes on with


@dataclass(frozen=True, kw_only=True)
class HetLoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="hetlora",
        paper="HetLoRA, Cho et al., arXiv 2401.06432",
        travels="A and B, up and down; the client's next rank up",
        adapter="factors",
        exact=False,
        secagg_compatible=False,
        client_state="its rank, which the server knows too",
        mixed_ranks=True,
        supports_server_optimizer=False,
        dp_noise="quadratic",
    )
    metadata_keys: ClassVar[frozenset[str]] = frozenset({RANK})
    gamma: float = 0.99  # of a client's rank stays where its tail shrinks; 1: never pruned
    penalty_weight: float = 1e-3  # lambda

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        factors = sum(self.rank * (m + n) for m, n in shapes.values())
        return Traffic(up=factors + 1, down=factors, head=head)

    def broadcast(self, state: State, *, late: bool = False, rank: int | None = None) -> Tensors:
        return leading(super().broadcast(state, late=late), self.rank if rank is None else rank)

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        kept = self._kept(self.rank)
        if kept == self.rank or self.penalty_weight == 0:
            return None
        return self.penalty_weight * tail(tensors, kept)

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        sent, own = super().upload(received, trained, round)
        rank = len(trained[f"{layers_of(trained)[0]}.A"])
        kept = self._kept(rank)
        shrank = kept < rank and bool(tail(trained, kept) < tail(received, kept))
        if shrank:  # it sends no tail any more; here zeros for this once, as the server would pad it
            sent |= {key: _without_tail(sent[key], key, kept) for key in sent if key.endswith((".A", ".B"))}
        return {**sent, RANK: torch.tensor([float(kept if shrank else rank)])}, own

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        ranks = {update.client: min(max(int(update.tensors[RANK]), 1), self.rank) for update in updates}
        tensors = average(
            [replace(u, tensors={k: u.tensors[k] for k in u.tensors if k != RANK}) for u in updates], state.tensors
        )
        for layer in layers_of(tensors):
            sizes = [product_norm(u.tensors[f"{layer}.B"].double(), u.tensors[f"{layer}.A"].double()) for u in updates]
            weighted = [
                Update(
                    client=update.client,
                    weight=float(size) if sum(sizes) > 0 else update.weight,
                    tensors=self._padded(update, layer),
                )
                for update, size in zip(updates, sizes, strict=True)
            ]
            tensors |= average(weighted, state.tensors)
        return replace(state, round=state.round + 1, tensors=tensors, ranks={**state.ranks, **ranks})

    def _kept(self, rank: int) -> int:
        return max(int(self.gamma * rank), 1)

    def _padded(self, update: Update, layer: str) -> Tensors:
        A, B = update.tensors[f"{layer}.A"], update.tensors[f"{layer}.B"]
        missing = self.rank - len(A)
        return {f"{layer}.A": pad(A, (0, 0, 0, missing)), f"{layer}.B": pad(B, (0, missing))}


def _without_tail(factor: Tensor, key: str, kept: int) -> Tensor:
    factor = factor.clone()
    (factor if key.endswith(".A") else factor.mT)[kept:] = 0
    return factor


def tail(tensors: Mapping[str, Tensor], kept: int) -> Tensor:
    """sum over layers of ||B[:, kept:]||_F ||A[kept:]||_F, of each client where there is a first axis of them."""
    parts = [
        ((tensors[f"{layer}.B"][..., kept:].square().sum((-2, -1)) + 1e-12) ** 0.5)  # a slope at zero, too
        * ((tensors[f"{layer}.A"][..., kept:, :].square().sum((-2, -1)) + 1e-12) ** 0.5)
        for layer in layers_of(tensors)
    ]
    return torch.stack(parts).sum(0)
