"""RAVAN: several blocks with their own frozen bases, each block scaled by a trained scalar.

    dW_k = sum_i s_i B_i R_i A_i        R_i <- sum_k p_k s_i,k R_i,k,   s_i <- 1          i = 1..h blocks

Paper: "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", Raje et al., NeurIPS 2025, arXiv 2506.05568
(its H_i is R_i here, its heads are blocks).

Shapes, a layer: B (m, h r) and A (h r, n), frozen, orthonormal over all blocks; R (h, r, r), zero at the start;
s (h,), one at the start of every round.
What travels: s_i R_i, up and down: h r^2 values. Exact, as in Fed-SB. At a budget of N values, an update reaches the
rank sqrt(N h) where Fed-SB's reaches sqrt(N).
Mixed ranks: a client of total rank h_k r trains the first h_k blocks; exact only where all ranks are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from fedsb.adapters.adapted import Tensors
from fedsb.methods.base import Method, MethodSpec, State
from fedsb.methods.fed_sb import FedSB
from fedsb.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ravan(FedSB):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="ravan",
        paper="Ravan, Raje et al., arXiv 2506.05568",
        travels="the scaled blocks s_i R_i, up and down",
        adapter="core",
        exact=True,
        secagg_compatible=True,
        mixed_ranks=True,
        dp_noise="linear",
    )
    rank: int = 16
    blocks: int = 4
    scalars: bool = True  # False: they stay at 1, and this is Fed-SB with several blocks

    def at(self, rank: int) -> Self:
        if rank % self.rank or not 0 < rank <= self.total_rank:
            raise UserError(f"a client's rank of {rank}: it must be some of the {self.blocks} blocks of {self.rank}")
        return replace(self, blocks=rank // self.rank)

    def broadcast(self, state: State, *, late: bool = False, rank: int | None = None) -> Tensors:
        """A client of a lower rank gets the first blocks."""
        h = self.blocks if rank is None else self.at(rank).blocks
        message = Method.broadcast(self, state, late=late)
        return {key: tensor[:h] if key.endswith(".R") else tensor for key, tensor in message.items()}

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        own = Method.init_client(self, shared, message, client_state, round)
        for layer in [key.removesuffix(".R") for key in own if key.endswith(".R")]:
            R = own[f"{layer}.R"]
            own |= {f"{layer}.A": own[f"{layer}.A"][: len(R) * self.rank]}
            own |= {f"{layer}.B": own[f"{layer}.B"][:, : len(R) * self.rank]}
            own |= {f"{layer}.s": torch.ones(len(R), dtype=R.dtype)}
        return own

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        keys = super().trainable(tensors, round)
        return keys if self.scalars else frozenset(key for key in keys if not key.endswith(".s"))

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        sent, kept = super().upload(received, trained, round)
        scalars = {key.removesuffix(".s"): trained[key] for key in trained if key.endswith(".s")}
        scaled = {f"{layer}.R": trained[f"{layer}.R"] * s[:, None, None] for layer, s in scalars.items()}
        return {key: tensor for key, tensor in sent.items() if not key.endswith(".s")} | scaled, kept
