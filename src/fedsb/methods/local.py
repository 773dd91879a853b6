"""Local: every client trains alone. The control that shows what federation is worth.

    dW_k stays with client k, from round to round; nothing travels.

Shapes as in fed-sb or ravan (`adapter = "core"`, with `blocks` and `scalars`) or fedit (`adapter = "factors"`, with
`alpha`).
Limits: no global model. It is scored as the mean over the clients' own models, and exports one adapter a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import MethodSpec, State, Update
from fedsb.methods.control import Control


@dataclass(frozen=True, kw_only=True)
class Local(Control):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="local",
        paper="a control: no federation",
        travels="nothing",
        adapter=None,
        exact=False,
        secagg_compatible=True,
        client_state="its whole adapter and head",
        dp_noise="linear",
        global_model=False,
    )

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        first = self.twin.start(shapes, basis, head, seed)
        return State(tensors={}, shared={**first.shared, **first.tensors})

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        return super().init_client({**shared, **client_state}, {}, {}, round)

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        return {}, self.twin.upload(received, trained, round)[0]

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        return replace(state, round=state.round + 1)
