"""FFA-LoRA: A is frozen; only B is trained and averaged.

    dW_k = s B_k A        B <- sum_k p_k B_k

Paper: "Improving LoRA in Privacy-preserving Federated Learning", Sun et al., ICLR 2024, arXiv 2403.12313.

Shapes, per layer: A (r, n), drawn from the seed, different for each layer; B (m, r), zero at the start. s = alpha / r.
What travels: B, up and down: r m values. Exact, since A is shared.
Limits: half of LoRA's values are never trained. Every update lies in the row space of a random A.
"""

from __future__ import annotations

from typing import ClassVar

from fedsb.adapters.basis import Basis
from fedsb.methods.base import MethodSpec, State, Traffic
from fedsb.methods.fedit import FedIT
from fedsb.utils.tensors import Shapes, Tensors


class FFALoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="ffa-lora",
        paper="FFA-LoRA, Sun et al., arXiv 2403.12313",
        travels="B, up and down; A is frozen, from a seed",
        adapter="factors",
        exact=True,
        secagg_compatible=True,
        dp_noise="linear",
    )

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        B = sum(self.rank * m for m, _ in shapes.values())
        return Traffic(up=B, down=B, head=head)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        tensors = super().start(shapes, basis, head, seed).tensors
        A = {f"{layer}.A": tensors.pop(f"{layer}.A") for layer in shapes}
        return State(tensors=tensors, shared=A)

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(key for key in tensors if not key.endswith(".A"))
