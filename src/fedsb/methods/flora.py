"""FLoRA: the clients' factors are stacked and added to the base, and every client restarts.

    W0 <- W0 + [p_1 s B_1, ..., p_c s B_c] [A_1; ...; A_c]        then A random, B = 0

Paper: "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", Wang et al.,
NeurIPS 2024, arXiv 2409.05976. Here only B is multiplied by the weights.

Shapes, per layer: A_k (r_k, n), drawn from (seed, round); B_k (m, r_k), zero at every restart. s = alpha / r, the same
for all.
What travels: A_k and B_k up, r_k (m + n) values; the stack down, sum_k r_k (m + n) values, or m n if that is less.
Clients add the stack to the residual adapter (adapters/residual.py). A client that missed a round receives all of it.
Limits: the server sees every client's factors, and so does every client, through the stack. The result as an ordinary
LoRA has a high rank. An optimizer's moments have no meaning after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fedsb.adapters.basis import Basis
from fedsb.adapters.factors import factor_start
from fedsb.adapters.residual import delta_of, delta_values
from fedsb.methods.averaging import ServerOptimizer, average, weighted_stack
from fedsb.methods.base import MethodSpec, State, Traffic, Update
from fedsb.methods.fedit import FedIT, layers_of
from fedsb.utils.tensors import Shapes, Tensors

SEED = "seed"  # a shared tensor, from which A is drawn in every round


class FLoRA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="flora",
        paper="FLoRA, Wang et al., arXiv 2409.05976",
        travels="A and B up; every client's A and B down",
        adapter="factors",
        exact=True,
        secagg_compatible=False,
        changes_base=True,
        mixed_ranks=True,
        supports_server_optimizer=False,
        rotates_basis=True,
        dp_noise="quadratic",
    )

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        up = sum(self.rank * (m + n) for m, n in shapes.values())
        stack = sum(delta_values(m, n, clients * self.rank) for m, n in shapes.values()) if round else 0
        return Traffic(up=up, down=stack, head=head)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        first = factor_start(shapes, self.rank, seed)
        return State(tensors=dict(head), shared={**first, SEED: torch.tensor(seed)})

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        """Returns a client's tensors, with A drawn from the seed and the round. A lower rank uses A's leading rows."""
        own = super().init_client(shared, message, client_state, round)
        seed = int(own.pop(SEED))
        shapes = {layer: (len(own[f"{layer}.B"]), own[f"{layer}.A"].shape[1]) for layer in layers_of(own)}
        fresh = factor_start(shapes, self.rank, seed, round)
        return own | {key: tensor.to(own[key].dtype) for key, tensor in fresh.items()}

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        delta: Tensors = {}
        for layer in layers_of(state.shared):
            B, A = weighted_stack(updates, layer, self.scale)
            delta |= delta_of(layer, B.to(state.shared[f"{layer}.B"]), A.to(state.shared[f"{layer}.A"]))
        head = [replace(u, tensors={key: u.tensors[key] for key in state.tensors}) for u in updates]
        shared = self.update_shared(state.shared, delta)
        tensors = average(head, state.tensors)
        return replace(state, round=state.round + 1, tensors=tensors, shared=shared, shared_delta=delta)
