"""The common part of the two controls: the adapter of another method, trained as its clients train it. Nothing travels.

    adapter = "core"       W = W0 + sum_i s_i B_i R_i A_i    i = 1..blocks; s_i is trained if `scalars` is true, else 1
    adapter = "factors"    W = W0 + (alpha / rank) B A       alpha is 2 rank by default

`control_options` gives the options with which a control has the same adapter as a given method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.methods.base import AdapterKind, Method, State, Traffic
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT
from fedsb.methods.ravan import Ravan
from fedsb.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Control(Method):
    rank: int = 32
    adapter: AdapterKind = "core"  # here the user chooses
    blocks: int = 1
    scalars: bool = False
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an option of the adapter that was not chosen."""
        if self.adapter == "core" and self.alpha is not None:
            raise UserError("method.alpha scales LoRA's two factors. Leave it out, or set method.adapter = 'factors'.")
        if self.adapter == "factors" and (self.blocks != 1 or self.scalars):
            raise UserError(
                "method.blocks and method.scalars are of a core. Leave them out, or set method.adapter = 'core'."
            )

    @property
    def twin(self) -> Method:
        """The method that trains this adapter."""
        if self.adapter == "factors":
            return FedIT(rank=self.rank, alpha=self.alpha)
        if self.scalars:
            return Ravan(rank=self.rank, blocks=self.blocks)
        return FedSB(rank=self.rank, blocks=self.blocks)

    @property
    def scale(self) -> float:
        return self.twin.scale

    @property
    def total_rank(self) -> int:
        return self.twin.total_rank

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        return Traffic(up=0, down=0)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        return self.twin.start(shapes, basis, head, seed)

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        return self.twin.init_client(shared, message, client_state, round)

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return self.twin.trainable(tensors, round)

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        return self.twin.upload(received, trained, round)


def control_options(method: Method) -> dict[str, Any]:
    """Returns the options of the control whose adapter is that of `method`."""
    if method.adapter == "factors":
        alpha = getattr(method, "alpha", method.scale * method.rank)
        return {"adapter": "factors", "rank": method.rank, "alpha": alpha}
    blocks = method.total_rank // method.rank
    return {"adapter": "core", "rank": method.rank, "blocks": blocks, "scalars": getattr(method, "scalars", False)}
