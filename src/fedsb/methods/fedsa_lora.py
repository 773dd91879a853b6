"""FedSA-LoRA: A is shared, B stays at home.

    dW_k = s B_k A_k        A <- sum_k p_k A_k;   B_k, and the task head, are client k's own

Paper: "Selective Aggregation for Low-Rank Adaptation in Federated Learning", Guo et al., ICLR 2025, arXiv 2410.01463.

Shapes, a layer: A (r, n) from a seed, common; B (m, r), zero at the start, kept by its client. s = alpha / r.
What travels: A, up and down: r n values.
Limits: no global model. It is scored as the mean over the clients' own models, and exports one adapter a client; a
client that never took part has A and an untrained B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.methods.base import MethodSpec, State, Traffic
from fedsb.methods.fedit import FedIT


@dataclass(frozen=True, kw_only=True)
class FedSALoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="fedsa-lora",
        paper="FedSA-LoRA, Guo et al., arXiv 2410.01463",
        travels="A, up and down; B and the head stay with each client",
        adapter="factors",
        exact=False,
        secagg_compatible=True,
        client_state="its B and its head",
        dp_noise="linear",
        global_model=False,
    )

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        A = sum(self.rank * n for _, n in shapes.values())
        return Traffic(up=A, down=A)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        first = super().start(shapes, basis, head, seed).tensors
        A = {f"{layer}.A": first.pop(f"{layer}.A") for layer in shapes}
        return State(tensors=A, shared=first)

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        return {**shared, **message, **client_state}

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        A = {key for key in trained if key.endswith(".A")}
        return {key: trained[key] for key in A}, {key: t for key, t in trained.items() if key not in A}
