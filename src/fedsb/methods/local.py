"""Local: every client trains alone. A control that shows what federation is worth.

    dW_k stays with client k, from round to round.

Shapes as in Fed-SB or RAVAN (`adapter = "core"`, with `blocks` and `scalars`) or FedIT (`adapter = "factors"`, with
`alpha`).
What travels: nothing.
Limits: no global model. The score is the mean over the clients' own models, and one adapter per client is exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from fedsb.adapters.basis import Basis
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import MethodSpec, State, Update
from fedsb.methods.control import Control
from fedsb.utils.tensors import Shapes, Tensors


class Local(Control):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="local",
        paper="a control: no federation",
        travels="nothing",
        adapter=None,
        exact=False,
        secagg_compatible=True,
        client_state="its whole adapter and head",
        aggregates=False,
        dp_noise="linear",
        global_model=False,
        own_models=True,
    )

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        first = self.trains_as.start(shapes, basis, head, seed)
        return State(tensors={}, shared={**first.shared, **first.tensors})

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        return super().init_client({**shared, **client_state}, {}, {}, round)

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        return {}, self.trains_as.upload(received, trained, round)[0]

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        return replace(state, round=state.round + 1)
