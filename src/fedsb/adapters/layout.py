"""The order of a client's tensors in one flat vector, and the vector's views by name.

The same layout orders training buffers, clipping, noise, payloads, codecs and secure aggregation: names are sorted, and
each tensor is stored row by row.

Shapes: P values of a client, K clients (or rows) along leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

Array = TypeVar("Array", bound=Any)  # a tensor of torch or an array of numpy


@dataclass(frozen=True)
class Layout:
    """Names and shapes, in sorted order of the names."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> Layout:
        """Returns the layout of one client's tensors or arrays."""
        return cls(tuple((key, tuple(tensors[key].shape)) for key in sorted(tensors)))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The slice of the vector that contains each tensor."""
        found, at = {}, 0
        for (key, _), size in zip(self.shapes, self.sizes, strict=True):
            found[key] = slice(at, at + size)
            at += size
        return found

    def views(self, x: Array) -> dict[str, Array]:  # (..., P)
        """Returns the tensors of each vector by name: (..., *shape) each, without a copy."""
        slices = self.slices
        axes: tuple[int, ...] = tuple(x.shape[:-1])
        return {key: x[..., slices[key]].reshape((*axes, *shape)) for key, shape in self.shapes}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns (P,), the float32 vector of one client's tensors."""
        if not self.shapes:
            return torch.zeros(0)
        return torch.cat([tensors[key].detach().reshape(-1).float() for key, _ in self.shapes])

    def mask(self, keys: frozenset[str]) -> Tensor:
        """Returns (P,), 1 where the value belongs to one of `keys` and 0 elsewhere."""
        found = torch.zeros(self.size)
        for key in keys & self.slices.keys():
            found[self.slices[key]] = 1.0
        return found
