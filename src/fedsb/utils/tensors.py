"""The types of named tensors and of weight shapes, without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Shapes = dict[str, tuple[int, int]]  # (m, n) of each adapted layer
