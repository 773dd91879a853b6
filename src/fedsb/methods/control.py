"""The common part of the two controls, which train the adapter of another method without communication.

    adapter = "core"       W = W0 + sum_i s_i B_i R_i A_i    i = 1..blocks; s_i is trained if `scalars` is true, else 1
    adapter = "factors"    W = W0 + (alpha / rank) B A       alpha is 2 x rank by default

`control_options` returns the options with which a control has the adapter of a given method.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import model_validator

from fedsb.adapters.basis import Basis
from fedsb.config.section import Positive, Rate, used_if
from fedsb.methods.base import AdapterKind, Method, State, Traffic
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT
from fedsb.methods.ravan import Ravan
from fedsb.utils.tensors import Shapes, Tensors


class Control(Method):
    """The base class of the controls."""

    rank: Positive = 32
    """Rank r of one core, or of the factors A and B."""
    adapter: AdapterKind = "core"  # type: ignore[misc]
    """Adapter to train: a core, or LoRA's factors."""
    blocks: Annotated[Positive, used_if("method.adapter", "core")] = 1
    """Number h of cores per layer."""
    tied: Annotated[bool, used_if("method.adapter", "core")] = False
    """Whether layers whose names differ only in their number share one core."""
    scalars: Annotated[bool, used_if("method.adapter", "core")] = False
    """Whether the scalars s of RAVAN are trained."""
    alpha: Annotated[Rate | None, used_if("method.adapter", "factors")] = None
    """Alpha of LoRA; the scale s is alpha / rank. Default: 2 x rank."""

    @model_validator(mode="after")
    def _options_of_the_adapter(self) -> Self:
        if self.adapter == "core" and self.alpha is not None:
            raise ValueError(
                "alpha scales LoRA's two factors, and adapter is 'core'. Remove alpha, or set adapter to 'factors'"
            )
        if self.adapter == "factors" and (self.blocks != 1 or self.tied or self.scalars):
            raise ValueError(
                "blocks, tied and scalars belong to a core, and adapter is 'factors'. Remove them, or set adapter to "
                "'core'"
            )
        return self

    @property
    def trains_as(self) -> Method:
        """The federated method that trains the same adapter."""
        if self.adapter == "factors":
            return FedIT(rank=self.rank, alpha=self.alpha)
        if self.scalars:
            return Ravan(rank=self.rank, blocks=self.blocks, tied=self.tied)
        return FedSB(rank=self.rank, blocks=self.blocks, tied=self.tied)

    @property
    def scale(self) -> float:
        return self.trains_as.scale

    @property
    def total_rank(self) -> int:
        return self.trains_as.total_rank

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        own = self.trains_as.traffic(shapes, head=head, clients=clients, round=round)
        return Traffic(up=0, down=0, trained=own.step)  # the head too, which does not travel either

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        return self.trains_as.start(shapes, basis, head, seed)

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        return self.trains_as.init_client(shared, message, client_state, round)

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return self.trains_as.trainable(tensors, round)

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        return self.trains_as.upload(received, trained, round)


def control_options(method: Method) -> dict[str, Any]:
    """Returns the options of a control with the adapter of `method`."""
    if method.adapter == "factors":
        alpha = getattr(method, "alpha", method.scale * method.rank)
        return {"adapter": "factors", "rank": method.rank, "alpha": alpha}
    blocks = method.total_rank // method.rank
    return {"adapter": "core", "rank": method.rank, "blocks": blocks, "scalars": getattr(method, "scalars", False)}
