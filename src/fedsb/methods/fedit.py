"""FedIT: federated averaging of LoRA's factors, each factor separately.

    dW_k = s B_k A_k        A <- sum_k p_k A_k,   B <- sum_k p_k B_k

Paper: "Towards Building the Federated GPT: Federated Instruction Tuning", Zhang et al., ICASSP 2024, arXiv 2305.05644.

Shapes, per layer: A (r, n), drawn from the seed, the same on every client; B (m, r), zero at the start. s = alpha / r.
What travels: A and B, up and down: r (m + n) values.
Limits: not exact. (sum p_k B_k)(sum p_k A_k) differs from sum p_k B_k A_k by sum p_k (B_k - Bbar)(A_k - Abar).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor

from fedsb.adapters.basis import Basis
from fedsb.adapters.factors import factor_start
from fedsb.adapters.residual import is_residual
from fedsb.config.section import Positive, Rate
from fedsb.methods.base import Method, MethodSpec, State, Traffic
from fedsb.utils.errors import UserError
from fedsb.utils.tensors import Shapes, Tensors


class FedIT(Method):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="fedit",
        paper="FedIT, Zhang et al., arXiv 2305.05644",
        travels="A and B, up and down",
        adapter="factors",
        exact=False,
        secagg_compatible=True,
        dp_noise="quadratic",
    )
    rank: Positive = 4
    """Rank r of the factors A and B."""
    alpha: Rate | None = None
    """Alpha of LoRA; the scale s is alpha / rank. Default: 2 x rank."""

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def at(self, total_rank: int) -> Self:
        """Returns the method at a lower rank, with the same scale."""
        if not 0 < total_rank <= self.rank:
            raise UserError(
                f"A client cannot have the total rank {total_rank} with {self.spec.id}. Choose at most {self.rank}, "
                "the rank of the federation."
            )
        return self.model_copy(update={"rank": total_rank, "alpha": self.scale * total_rank})

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        factors = sum(self.rank * (m + n) for m, n in shapes.values())
        return Traffic(up=factors, down=factors, head=head)

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        return State(tensors={**factor_start(shapes, self.rank, seed), **head})

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        return frozenset(key for key in tensors if not is_residual(key))


def layers_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the sorted names of the layers that have an A among `tensors`."""
    return sorted(key.removesuffix(".A") for key in tensors if key.endswith(".A"))
