"""The trained tensors of K clients as one matrix, with their gradients and the optimiser's moments.

The model's parameters are views of `values` and their gradients are views of `gradients`. So clipping is one norm, the
optimizer updates one matrix, and a client's update is one row. The matrices are allocated once and overwritten.

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
    """Matrices (capacity, P) for up to `capacity` clients of one layout."""

    def __init__(self, layout: Layout, capacity: int, device: torch.device) -> None:
        self.layout = layout
        self.capacity = capacity
        shape = (capacity, layout.size)
        self.values, self.gradients, self.m, self.v = (torch.zeros(shape, device=device) for _ in range(4))

    def read(self, clients: Sequence[Tensors], moments: Sequence[Mapping[str, Tensor]]) -> None:
        """Copies each client's tensors into its row, and its moments "m.<key>" and "v.<key>", or zeros."""
        for k, (tensors, own) in enumerate(zip(clients, moments, strict=True)):
            self.values[k].copy_(self.layout.flatten(tensors))
            for name, matrix in (("m", self.m), ("v", self.v)):
                matrix[k].zero_()
                for key, view in self.layout.views(matrix[k]).items():
                    if (moment := own.get(f"{name}.{key}")) is not None:
                        view.copy_(moment)

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
        gradients = self.layout.views(self.gradients[:clients])
        adapted.load({**frozen, **self.layout.views(self.values[:clients])}, gradients=gradients)
