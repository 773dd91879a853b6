"""What the two controls share: any adapter, trained as fed-sb or fedit would, and nothing that travels."""

from __future__ import annotations

from dataclasses import dataclass

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.methods.contract import AdapterKind, Method, State, Traffic
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT


@dataclass(frozen=True, kw_only=True)
class Control(Method):
    rank: int = 32
    adapter: AdapterKind = "core"  # here the user chooses

    @property
    def twin(self) -> Method:
        return FedSB(rank=self.rank) if self.adapter == "core" else FedIT(rank=self.rank)

    @property
    def scale(self) -> float:
        return self.twin.scale

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        return Traffic(up=0, down=0)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        return self.twin.start(shapes, basis, head, seed)

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return self.twin.trainable(tensors, round)

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        return self.twin.upload(received, trained, round)
