"""RoLoRA: rounds train B and A alternately, so that each average is exact.

    even rounds:  dW_k = s B_k A,  B <- sum_k p_k B_k        odd rounds:  dW_k = s B A_k,  A <- sum_k p_k A_k

Paper: "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", Chen et al., NeurIPS 2025,
arXiv 2502.01755.

Shapes, per layer: A (r, n), drawn from the seed; B (m, r), zero at the start. s = alpha / r. B is trained first: with
B = 0, the gradient of A is zero.
What travels: up, the factor that was trained in this round, r m or r n values; down, the factor that was trained in the
previous round. A client that missed a round receives both factors.
Limits: each factor is trained in half of the rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from fedsb.adapters.basis import Basis
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT
from fedsb.utils.tensors import Shapes, Tensors


class RoLoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="rolora",
        paper="RoLoRA, Chen et al., arXiv 2502.01755",
        travels="B and A alternately: up the factor of this round, down that of the last round",
        adapter="factors",
        exact=True,
        secagg_compatible=True,
        dp_noise="linear",
        alternates=True,
    )

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        values = {
            "B": sum(self.rank * m for m, _ in shapes.values()),
            "A": sum(self.rank * n for _, n in shapes.values()),
        }
        up, down = values[trained_factor(round)], values[trained_factor(round - 1)] if round else 0
        return Traffic(up=up, down=down, head=head)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        first = super().start(shapes, basis, head, seed)
        return replace(first, shared=_factors(first.tensors))

    def broadcast(self, state: State, *, missed_last_round: bool = False, total_rank: int | None = None) -> Tensors:
        changed = trained_factor(state.round - 1) if state.round else ""
        known = set() if missed_last_round else set(_factors(state.tensors, except_for=changed))
        return {key: tensor for key, tensor in state.tensors.items() if key not in known}

    def update_shared(self, shared: Tensors, message: Tensors) -> Tensors:
        return {**shared, **_factors(message)}

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(tensors) - set(_factors(tensors, except_for=trained_factor(round)))

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        after = super().aggregate(state, updates, server)
        return replace(after, shared=_factors(after.tensors))


def trained_factor(round: int) -> str:
    """Returns the factor that this round trains: "B" or "A"."""
    return "BA"[round % 2]


def _factors(tensors: Tensors, except_for: str = "") -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in {"A", "B"} - {except_for}}
