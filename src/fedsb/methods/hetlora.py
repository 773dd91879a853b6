"""HetLoRA: clients of different ranks, padded with zeros and weighted by the size of their updates; ranks may shrink.

    A <- sum_k w_k pad(A_k),   B <- sum_k w_k pad(B_k),   w_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F
    local loss + lambda ||B_k[:, g:]||_F ||A_k[g:]||_F,   g = gamma r_k; if that tail shrinks, it is removed for good

Paper: "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", Cho et al., EMNLP 2024,
arXiv 2401.06432.

Shapes, per layer: A (r_k, n), drawn from the seed at the start; B (m, r_k), zero at the start. s = alpha / r, the same
for all.
What travels: A_k and B_k, up and down: r_k (m + n) values; and one number up, the client's rank for the next round.
Limits: not exact. The server needs the size of every client's update. While all updates are zero, the weights are those
of the rows. The size of the tail is summed over all layers, so that a client has a single rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from fedsb.adapters.low_rank import product_norm
from fedsb.config.section import UsedIf
from fedsb.methods.averaging import ServerOptimizer, average
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT, layers_of
from fedsb.methods.flexlora import leading
from fedsb.utils.tensors import Shapes, Tensors

if TYPE_CHECKING:
    from fedsb.config.schema import Config

RANK = "rank"  # in an update: the client's rank for the next round


def _prunes(config: Config) -> bool:
    return isinstance(config.method, HetLoRA) and config.method.gamma < 1


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
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Fraction of a client's rank that is kept if its tail shrinks. 1: no pruning."""
    penalty_weight: Annotated[float, Field(ge=0, allow_inf_nan=False), UsedIf(_prunes, "method.gamma is 1")] = 1e-3
    """Weight lambda of the penalty on the tail in the local loss."""

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        factors = sum(self.rank * (m + n) for m, n in shapes.values())
        return Traffic(up=factors + 1, down=factors, head=head)

    def broadcast(self, state: State, *, missed_last_round: bool = False, total_rank: int | None = None) -> Tensors:
        message = super().broadcast(state, missed_last_round=missed_last_round)
        return leading(message, self.rank if total_rank is None else total_rank)

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        kept = self._pruned(self.rank)
        if kept == self.rank or self.penalty_weight == 0:
            return None
        return self.penalty_weight * tail_size(tensors, kept)

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        sent, client_state = super().upload(received, trained, round)
        rank = len(trained[f"{layers_of(trained)[0]}.A"])
        kept = self._pruned(rank)
        shrinks = kept < rank and bool(tail_size(trained, kept) < tail_size(received, kept))
        if shrinks:  # the tail is sent as zeros this once, as the server would pad it
            sent |= {key: _without_tail(sent[key], key, kept) for key in sent if key.endswith((".A", ".B"))}
        return {**sent, RANK: torch.tensor([float(kept if shrinks else rank)])}, client_state

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
        return replace(state, round=state.round + 1, tensors=tensors, total_ranks={**state.total_ranks, **ranks})

    def _pruned(self, rank: int) -> int:
        return max(int(self.gamma * rank), 1)

    def _padded(self, update: Update, layer: str) -> Tensors:
        A, B = update.tensors[f"{layer}.A"], update.tensors[f"{layer}.B"]
        missing = self.rank - len(A)
        return {f"{layer}.A": pad(A, (0, 0, 0, missing)), f"{layer}.B": pad(B, (0, missing))}


def _without_tail(factor: Tensor, key: str, kept: int) -> Tensor:
    factor = factor.clone()
    (factor if key.endswith(".A") else factor.mT)[kept:] = 0
    return factor


def tail_size(tensors: Mapping[str, Tensor], kept: int) -> Tensor:
    """Returns sum over layers of ||B[:, kept:]||_F ||A[kept:]||_F, per client if the tensors have a client axis."""
    parts = [
        ((tensors[f"{layer}.B"][..., kept:].square().sum((-2, -1)) + 1e-12) ** 0.5)  # differentiable at zero
        * ((tensors[f"{layer}.A"][..., kept:, :].square().sum((-2, -1)) + 1e-12) ** 0.5)
        for layer in layers_of(tensors)
    ]
    return torch.stack(parts).sum(0)
