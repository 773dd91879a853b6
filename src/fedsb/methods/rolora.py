"""RoLoRA: the rounds train B and A in turn, so that each average is exact.

    even rounds:  dW_k = s B_k A,  B <- sum_k p_k B_k        odd rounds:  dW_k = s B A_k,  A <- sum_k p_k A_k

Paper: "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", Chen et al., NeurIPS 2025,
arXiv 2502.01755.

Shapes, a layer: A (r, n) from a seed, B (m, r), zero at the start. s = alpha / r. B comes first: with B = 0, the
gradient of A is zero.
What travels: up, the factor that was trained, r m or r n values; down, the one that was trained in the round before;
a site that missed a round gets both.
Limits: each factor trains in half of the rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT


@dataclass(frozen=True, kw_only=True)
class RoLoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="rolora",
        paper="RoLoRA, Chen et al., arXiv 2502.01755",
        travels="B and A in turn: up the one that is trained, down the one that was",
        adapter="factors",
        exact=True,
        secagg_compatible=True,
        dp_noise="linear",
    )

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        values = {
            "B": sum(self.rank * m for m, _ in shapes.values()),
            "A": sum(self.rank * n for _, n in shapes.values()),
        }
        return Traffic(up=values[turn(round)], down=values[turn(round - 1)] if round else 0, head=head)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        first = super().start(shapes, basis, head, seed)
        return replace(first, shared=_factors(first.tensors))

    def broadcast(self, state: State, *, late: bool = False, rank: int | None = None) -> Tensors:
        known = set() if late else set(_factors(state.tensors, except_for=turn(state.round - 1) if state.round else ""))
        return {key: tensor for key, tensor in state.tensors.items() if key not in known}

    def update_shared(self, shared: Tensors, message: Tensors) -> Tensors:
        return {**shared, **_factors(message)}

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(tensors) - set(_factors(tensors, except_for=turn(round)))

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        after = super().aggregate(state, updates, server)
        return replace(after, shared=_factors(after.tensors))


def turn(round: int) -> str:
    """The factor that this round trains."""
    return "BA"[round % 2]


def _factors(tensors: Tensors, except_for: str = "") -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in {"A", "B"} - {except_for}}
