"""FedSA-LoRA: A is shared; B stays with its client.

    dW_k = s B_k A_k        A <- sum_k p_k A_k;   client k keeps B_k and its task head

Paper: "Selective Aggregation for Low-Rank Adaptation in Federated Learning", Guo et al., ICLR 2025, arXiv 2410.01463.

Shapes, per layer: A (r, n), drawn from the seed, shared; B (m, r), zero at the start, one per client. s = alpha / r.
What travels: A, up and down: r n values.
Limits: no global model. The score is the mean over the clients' own models, and one adapter per client is exported. A
client that never took part has A and an untrained B.
"""

from __future__ import annotations

from typing import ClassVar

from fedsb.adapters.basis import Basis
from fedsb.methods.base import MethodSpec, State, Traffic
from fedsb.methods.fedit import FedIT
from fedsb.utils.tensors import Shapes, Tensors


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
        own_models=True,
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
