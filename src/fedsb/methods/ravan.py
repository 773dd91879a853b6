"""RAVAN: several cores with their own frozen bases, each scaled by a trained scalar.

    dW_k = sum_i s_i B_i R_i A_i        R_i <- sum_k p_k s_i,k R_i,k,   s_i <- 1          i = 1..h blocks

Paper: "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", Raje et al., NeurIPS 2025, arXiv 2506.05568
(its H_i is R_i here, its heads are blocks).

Shapes, per layer: B (m, h r) and A (h r, n), frozen, orthonormal over all blocks; R (h, r, r), zero at the start;
s (h,), one at the start of every round.
What travels: s_i R_i, up and down: h r^2 values. Exact, as in Fed-SB. With a budget of N values, the update has rank
sqrt(N h), compared with sqrt(N) for Fed-SB.
Mixed ranks: a client of total rank h_k r trains the first h_k blocks. This is exact only if all ranks are equal.
Limits: as in Fed-SB, the update stays in the span of the bases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch

from fedsb.config.section import Positive
from fedsb.methods.base import Method, MethodSpec, State, Traffic
from fedsb.methods.fed_sb import FedSB
from fedsb.utils.errors import UserError
from fedsb.utils.tensors import Shapes, Tensors


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
    rank: Positive = 16
    """Rank r of one core."""
    blocks: Positive = 4
    """Number h of cores per layer, each with its own part of the basis."""
    scalars: bool = True
    """Whether the scalars s are trained. If not, this is Fed-SB with blocks."""

    def at(self, total_rank: int) -> Self:
        if total_rank % self.rank or not 0 < total_rank <= self.total_rank:
            raise UserError(
                f"A client cannot have the total rank {total_rank} with {self.spec.id}, which trains whole blocks. "
                f"Choose a multiple of {self.rank} up to {self.total_rank}."
            )
        return self.model_copy(update={"blocks": total_rank // self.rank})

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        core = super().traffic(shapes, head=head, clients=clients, round=round)
        return replace(core, trained=core.up + self.scalars * self.blocks * len(self.cores(shapes)))

    def broadcast(self, state: State, *, missed_last_round: bool = False, total_rank: int | None = None) -> Tensors:
        """Returns the broadcast. A client of a lower rank receives the first blocks."""
        h = self.blocks if total_rank is None else self.at(total_rank).blocks
        message = Method.broadcast(self, state, missed_last_round=missed_last_round)
        return {key: tensor[:h] if key.endswith(".R") else tensor for key, tensor in message.items()}

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        own = Method.init_client(self, shared, message, client_state, round)
        cores = {key: R for key, R in own.items() if key.endswith(".R")}
        total_rank = self.rank * max(len(R) for R in cores.values())  # the client's own
        own |= {key: A[:total_rank] for key, A in own.items() if key.endswith(".A")}
        own |= {key: B[:, :total_rank] for key, B in own.items() if key.endswith(".B")}
        return own | {f"{key[:-2]}.s": torch.ones(len(R), dtype=R.dtype) for key, R in cores.items()}

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        keys = super().trainable(tensors, round)
        return keys if self.scalars else frozenset(key for key in keys if not key.endswith(".s"))

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        sent, client_state = super().upload(received, trained, round)
        scalars = {key.removesuffix(".s"): trained[key] for key in trained if key.endswith(".s")}
        scaled = {f"{layer}.R": trained[f"{layer}.R"] * s[:, None, None] for layer, s in scalars.items()}
        return {key: tensor for key, tensor in sent.items() if not key.endswith(".s")} | scaled, client_state
