"""The base class of adapted layers: the frozen base, the leading axis of clients, and the routing of a batch's rows.

Several clients are trained in one forward. Their batches are concatenated along the first axis as K equal slices, and
each layer applies the adapter of the slice's client. This needs an input whose first axis is the rows of the batch. A
layer with a different input (a mixture of experts, packed rows) raises `RoutingError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedsb.adapters.residual import RESIDUAL
from fedsb.models.layers import linear_shape
from fedsb.utils.errors import RunError


class RoutingError(RunError):
    """Raised if a layer's input does not have one row per example, so that rows cannot be assigned to clients."""


@dataclass
class Routing:
    """The state of the current batch. One object is shared by all adapted layers of a model."""

    rows: int | None = None  # rows of the joined batch; None: a single client
    one_by_one: bool = False  # the model cannot route rows: per-example gradients need one forward per example
    dropout: Callable[[str, Tensor], Tensor] | None = None  # (layer key, x) -> x with each client's dropout


class AdaptedLinear(nn.Module):
    """A frozen linear layer (nn.Linear, GPT-2's Conv1D, a quantised layer) with an adapter, which subclasses define.

    A residual adapter, shared by all clients, may be added: see adapters/residual.py.
    """

    names: tuple[str, ...] = ()  # the adapter's tensors
    optional: tuple[str, ...] = RESIDUAL  # tensors that may be None
    shared: tuple[str, ...] = RESIDUAL  # tensors that all clients share, without a client axis

    def __init__(self, base: nn.Module, *, scale: float, routing: Routing, key: str) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.key = key
        self.routing = routing
        self.residual_A: Tensor | None = None
        self.residual_B: Tensor | None = None
        self.residual_D: Tensor | None = None

    # Some models read these attributes: T5 reads the dtype of `wo.weight`, Mamba multiplies with the weight.

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, in its own layout."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def in_features(self) -> int:
        return linear_shape(self.base)[1]

    @property
    def out_features(self) -> int:
        return linear_shape(self.base)[0]

    def adapter(self, x: Tensor) -> Tensor:  # (b, ..., n) -> (b, ..., m)
        """Returns the output of the adapter."""
        raise NotImplementedError

    @staticmethod
    def sizes(own: Mapping[str, Tensor], m: int, n: int) -> dict[str, tuple[int, ...]]:
        """Returns the expected shapes of one client's tensors, at the ranks of `own`."""
        q = length(own, "residual_A")
        return {"residual_A": (q, n), "residual_B": (m, q), "residual_D": (m, n)}

    def forward(self, x: Tensor) -> Tensor:
        check_rows(x, self.routing, self.key)
        y: Tensor = self.base(x)
        if self.residual_D is not None:
            y = y + nn.functional.linear(x, self.residual_D.to(x.dtype)).to(y.dtype)
        elif self.residual_A is not None and self.residual_B is not None:
            z = nn.functional.linear(x, self.residual_A.to(x.dtype))
            y = y + nn.functional.linear(z, self.residual_B.to(x.dtype)).to(y.dtype)
        if self.routing.dropout is not None:
            x = self.routing.dropout(self.key, x)
        return y + self.adapter(x).to(y.dtype)


def length(own: Mapping[str, Tensor], name: str) -> int:
    """Returns the length of the tensor's first axis, or 1 if the tensor is empty or missing."""
    return max([1, *own[name].shape[:1]]) if name in own else 1


class HeadLinear(nn.Module):
    """A linear layer of the task head, trained in full. Each client has its own weight (K, m, n) and bias (K, m).

    The head computes in float32 and returns the input's dtype.
    """

    names = ("weight", "bias")
    base: nn.Linear

    def __init__(self, base: nn.Linear, *, routing: Routing, key: str) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.__dict__["base"] = base  # restored by `unwrap`; not a submodule
        self.key = key
        self.routing = routing
        self.weight = nn.Parameter(base.weight.detach().float().unsqueeze(0))
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().float().unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        check_rows(x, self.routing, self.key)
        y_Kpm = x.reshape(len(self.weight), -1, x.shape[-1]).float() @ self.weight.to(x.device).mT
        if self.bias is not None:
            y_Kpm = y_Kpm + self.bias.to(x.device).unsqueeze(1)
        return y_Kpm.reshape(*x.shape[:-1], -1).to(x.dtype)


def check_rows(x: Tensor, routing: Routing, key: str) -> None:
    """Raises RoutingError if the first axis of a layer's input is not the rows of the joined batch."""
    if routing.rows is not None and x.shape[0] != routing.rows:
        raise RoutingError(
            f"Layer {key!r} receives {x.shape[0]} rows, and the batch has {routing.rows}, so its rows cannot be "
            "assigned to their clients or examples. Train one client at a time: engine.clients_per_forward = 1."
        )
