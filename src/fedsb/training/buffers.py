"""The trained tensors of K clients as one matrix, with their gradients and the optimiser's moments.

Clipping is one norm, the optimizer updates one matrix, and a client's update is one row. The matrices are allocated
once and overwritten. The model's parameters are views of `values`, and their gradients are views of `gradients`.

If a layer computes in 16 bits, its parameters are views of `computed`, a copy of `values` in that dtype that is renewed
in one operation after each step. Its gradients add up in float32: `collect` takes them over after each backward pass.

Shapes: K clients, P trained values of one client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.layout import Layout
from fedsb.utils.tensors import Tensors


class ClientBuffers:
    """Matrices (capacity, P) for up to `capacity` clients of one layout.

    Args:
        dtypes: the dtype in which the model computes with each tensor, if it is not float32.
    """

    def __init__(
        self, layout: Layout, capacity: int, device: torch.device, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> None:
        self.layout = layout
        self.capacity = capacity
        shape = (capacity, layout.size)
        self.values, self.gradients, self.m, self.v = (torch.zeros(shape, device=device) for _ in range(4))
        halves = {dtype for dtype in (dtypes or {}).values() if dtype.itemsize == 2}
        assert len(halves) < 2, "a model computes in one dtype of 16 bits"
        self.rounded = frozenset(key for key, dtype in (dtypes or {}).items() if dtype in halves)
        self.computed: Tensor | None = None
        self.computed_gradients: Tensor | None = None
        for dtype in halves:
            self.computed, self.computed_gradients = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def read(self, clients: Sequence[Tensors], moments: Sequence[Mapping[str, Tensor]]) -> None:
        """Copies each client's tensors into its row, and its moments "m.<key>" and "v.<key>", or zeros."""
        for k, (tensors, own) in enumerate(zip(clients, moments, strict=True)):
            self.values[k].copy_(self.layout.flatten(tensors))
            for name, matrix in (("m", self.m), ("v", self.v)):
                matrix[k].zero_()
                for key, view in self.layout.views(matrix[k]).items():
                    if (moment := own.get(f"{name}.{key}")) is not None:
                        view.copy_(moment)
        self.renew(len(clients))

    def write(self, clients: int) -> list[tuple[Tensors, Tensors]]:
        """Returns (tensors, moments) of each of the first `clients` rows, on the CPU."""
        x, m, v = (matrix[:clients].to("cpu", copy=True) for matrix in (self.values, self.m, self.v))
        found = []
        for k in range(clients):
            moments = {f"m.{key}": view for key, view in self.layout.views(m[k]).items()}
            moments |= {f"v.{key}": view for key, view in self.layout.views(v[k]).items()}
            found.append((self.layout.views(x[k]), moments))
        return found

    def bind(self, adapted: AdaptedModel, clients: int, frozen: Tensors) -> None:
        """Makes the model's parameters views of the first `clients` rows; `frozen` are all other tensors."""
        values, gradients = (self.layout.views(matrix[:clients]) for matrix in (self.values, self.gradients))
        if self.computed is not None and self.computed_gradients is not None:
            rounded = (self.layout.views(matrix[:clients]) for matrix in (self.computed, self.computed_gradients))
            for views, own in zip((values, gradients), rounded, strict=True):
                views.update({key: own[key] for key in self.rounded})
        adapted.load({**frozen, **values}, gradients=gradients)

    def leaves(self, clients: int) -> Tensors:
        """Returns the float32 values of the first `clients` rows as tensors whose gradients add to `gradients`."""
        gradients = self.layout.views(self.gradients[:clients])
        leaves = {key: x.detach().requires_grad_() for key, x in self.layout.views(self.values[:clients]).items()}
        for key, leaf in leaves.items():
            leaf.grad = gradients[key]
        return leaves

    @torch.no_grad()
    def collect(self, clients: int) -> None:
        """Adds the 16-bit gradients of a backward pass to `gradients`, and clears them."""
        if self.computed_gradients is not None:
            self.gradients[:clients].add_(self.computed_gradients[:clients])
            self.computed_gradients[:clients].zero_()

    @torch.no_grad()
    def renew(self, clients: int) -> None:
        """Copies `values` to what the model computes with, after they have changed."""
        if self.computed is not None:
            self.computed[:clients].copy_(self.values[:clients])
