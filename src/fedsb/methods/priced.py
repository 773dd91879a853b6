"""Methods that are priced but not yet trained here: their facts and their traffic, so that any run can be compared.

| id | paper | up | down (values a layer; c clients a round) |
|---|---|---|---|
| ffa-lora | Sun et al., ICLR 2024, arXiv 2403.12313 | r m | r m |
| fedex-lora | Singhal et al., ACL 2025, arXiv 2410.09432 | r (m + n) | c r (m + n), the residual no dearer than m n |
| flora | Wang et al., NeurIPS 2024, arXiv 2409.05976 | r (m + n) | c r (m + n) |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsb.adapters.adapted import Shapes
from fedsb.methods.contract import Facts, Method, Traffic


@dataclass(frozen=True, kw_only=True)
class FFALoRA(Method):
    facts: ClassVar[Facts] = Facts(
        id="ffa-lora",
        paper="FFA-LoRA, Sun et al., arXiv 2403.12313",
        travels="B, up and down; A is frozen, from a seed",
        adapter="factors",
        exact=True,
        sum_only=True,
        dp_noise="linear",
        trainable_here=False,
    )
    rank: int = 4

    def traffic(self, shapes: Shapes, *, head: int, clients: int) -> Traffic:
        B = sum(self.rank * m for m, _ in shapes.values())
        return Traffic(up=B, down=B, head=head)


@dataclass(frozen=True, kw_only=True)
class FedExLoRA(Method):
    facts: ClassVar[Facts] = Facts(
        id="fedex-lora",
        paper="FedEx-LoRA, Singhal et al., arXiv 2410.09432",
        travels="A and B up; their means and the residual's factors down",
        adapter="factors",
        exact=True,
        sum_only=False,
        changes_base=True,
        dp_noise="quadratic",
        trainable_here=False,
    )
    rank: int = 4

    def traffic(self, shapes: Shapes, *, head: int, clients: int) -> Traffic:
        """The residual has rank (c - 1) r: its factors hold (c - 1) r (m + n) values."""
        up = sum(self.rank * (m + n) for m, n in shapes.values())
        residual = sum(min((clients - 1) * self.rank * (m + n), m * n) for m, n in shapes.values())
        return Traffic(up=up, down=up + residual, head=head)


@dataclass(frozen=True, kw_only=True)
class FLoRA(Method):
    facts: ClassVar[Facts] = Facts(
        id="flora",
        paper="FLoRA, Wang et al., arXiv 2409.05976",
        travels="A and B up; every client's A and B down",
        adapter="factors",
        exact=True,
        sum_only=False,
        changes_base=True,
        mixed_ranks=True,
        dp_noise="quadratic",
        trainable_here=False,
    )
    rank: int = 4

    def traffic(self, shapes: Shapes, *, head: int, clients: int) -> Traffic:
        up = sum(self.rank * (m + n) for m, n in shapes.values())
        return Traffic(up=up, down=clients * up, head=head)
