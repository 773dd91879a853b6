"""Fed-SB: only the core R travels, and its plain average is exact.

    W = W0 + s B R A        client k trains R_k from the common R;   R <- sum_k p_k R_k

Paper: "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning", Singhal et al., arXiv 2502.15436. The basis is that of LoRA-SB (Ponkshe et al., arXiv 2411.19557), or
another of fedsb/adapters/basis.py.

Shapes, a layer: B (m, h r) and A (h r, n) frozen and common; R (h, r, r), h = `blocks`, 1 in the paper.
What travels: R, up and down: h r^2 values, whatever m, n and the number of clients. B and A once, if a site cannot
derive them for itself. Exact, since B and A are common: sum p_k B R_k A = B (sum p_k R_k) A.
Limits: the update stays in the span of the basis; with it badly chosen, a low rank learns little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.methods.contract import Facts, Method, State, Traffic


@dataclass(frozen=True, kw_only=True)
class FedSB(Method):
    facts: ClassVar[Facts] = Facts(
        id="fed-sb",
        paper="Fed-SB, Singhal et al., arXiv 2502.15436",
        travels="the core R, up and down",
        adapter="core",
        exact=True,
        sum_only=True,
        dp_noise="linear",
    )
    rank: int = 32
    blocks: int = 1

    @property
    def total_rank(self) -> int:
        return self.rank * self.blocks

    def traffic(self, shapes: Shapes, *, head: int, clients: int) -> Traffic:
        core = len(shapes) * self.blocks * self.rank**2
        return Traffic(up=core, down=core, head=head)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        assert basis is not None
        return State(tensors={**basis.start(self.blocks, self.rank), **head}, common=basis.tensors)

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(key for key in tensors if not key.endswith((".A", ".B")))

    def upload(self, received: Tensors, trained: Tensors) -> tuple[Tensors, Tensors]:
        return {key: trained[key] for key in self.trainable(trained, 0)}, {}
