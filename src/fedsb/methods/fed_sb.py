"""Fed-SB: of the adapter, clients send only the core R. The weighted average of the cores is exact.

    W = W0 + s B R A        client k trains R_k, starting from the shared R;   R <- sum_k p_k R_k

W0 is the frozen weight, s the fixed scale of the adapter, and p_k the weight of client k, with sum_k p_k = 1.

Paper: "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning", Singhal et al., arXiv 2502.15436. The basis is that of LoRA-SB (Ponkshe et al., arXiv 2411.19557) or any
other basis of adapters/basis.py.

Shapes, per layer: B (m, h r) and A (h r, n), frozen and shared; R (h, r, r), with h = `blocks`, 1 in the paper.
What travels: R, up and down: h r^2 values per layer, independent of m, n and the number of clients, and a trained
head. B and A are sent once, if a client cannot compute them itself. Exact, since B and A are shared:
sum p_k B R_k A = B (sum p_k R_k) A.
Mixed ranks: a client of rank r_k per block trains the leading r_k x r_k corner of each, and each entry is averaged
over the clients that sent it. This is exact only if all ranks are equal.
Tied cores (`tied`): layers that differ only in their number share one R, so that the same number of values has a higher
rank. The average is exact, and W linear in R, as before.
Limits: the update stays in the span of the basis. With a bad basis, a low rank learns little.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch

from fedsb.adapters.basis import Basis
from fedsb.adapters.core import key_of, tied_name
from fedsb.adapters.residual import is_residual
from fedsb.config.section import Positive
from fedsb.methods.base import Method, MethodSpec, State, Traffic
from fedsb.utils.errors import UserError
from fedsb.utils.tensors import Shapes, Tensors


class FedSB(Method):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="fed-sb",
        paper="Fed-SB, Singhal et al., arXiv 2502.15436",
        travels="the core R, up and down",
        adapter="core",
        exact=True,
        secagg_compatible=True,
        mixed_ranks=True,
        dp_noise="linear",  # W is linear in R: no product of two noised factors
    )
    rank: Positive = 32
    """Rank r of one core."""
    blocks: Positive = 1
    """Number h of cores per layer, each with its own part of the basis."""
    tied: bool = False
    """Whether layers whose names differ only in their number share one core."""

    @property
    def total_rank(self) -> int:
        return self.rank * self.blocks

    def at(self, total_rank: int) -> Self:
        if total_rank % self.blocks or not 0 < total_rank <= self.total_rank:
            raise UserError(
                f"A client cannot have the total rank {total_rank} with {self.spec.id}. Choose a multiple of "
                f"{self.blocks}, the number of blocks, up to {self.total_rank}."
            )
        return self.model_copy(update={"rank": total_rank // self.blocks})

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        core = len(self.cores(shapes)) * self.blocks * self.rank**2
        return Traffic(up=core, down=core, head=head)

    def cores(self, shapes: Shapes) -> set[str]:
        """Returns the names of the cores: the layers', or those that layers share."""
        return {tied_name(layer) if self.tied else layer for layer in shapes}

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        assert basis is not None
        cores = basis.start(self.blocks, self.rank)
        if self.tied:  # at zero: requirements.py refuses a first step
            cores = {f"{core}.R": torch.zeros(self.blocks, self.rank, self.rank) for core in self.cores(shapes)}
        return State(tensors={**cores, **head}, shared=basis.tensors)

    def broadcast(self, state: State, *, missed_last_round: bool = False, total_rank: int | None = None) -> Tensors:
        """Returns the broadcast. A client of a lower rank receives the leading corner of every block."""
        message = super().broadcast(state, missed_last_round=missed_last_round)
        r = self.rank if total_rank is None else self.at(total_rank).rank
        return {key: tensor[..., :r, :r] if key.endswith(".R") else tensor for key, tensor in message.items()}

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        """Returns a client's tensors. A lower rank takes the first, most important, directions of the basis."""
        own = super().init_client(shared, message, client_state, round)
        for layer in [key.removesuffix(".A") for key in own if key.endswith(".A")]:
            A, B = own[f"{layer}.A"], own[f"{layer}.B"]
            h, r, _ = own[key_of(layer, "R", own)].shape
            if len(A) != h * r:
                own[f"{layer}.A"] = A.reshape(h, -1, A.shape[1])[:, :r].reshape(h * r, -1)
                own[f"{layer}.B"] = B.reshape(len(B), h, -1)[..., :r].reshape(-1, h * r)
        return own

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(key for key in tensors if not key.endswith((".A", ".B")) and not is_residual(key))
