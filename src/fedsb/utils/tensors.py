"""Named tensors and weight shapes, and the way of a tensor to its device. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device

Tensors = dict[str, "Tensor"]
Shapes = dict[str, tuple[int, int]]  # (m, n) of each adapted layer


def same_tensors(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the very same tensors under the same names, without comparing values."""
    return some.keys() == others.keys() and all(x is others[key] for key, x in some.items())


def to_device(tensor: Tensor, where: device) -> Tensor:
    """Returns a tensor of the host on a device, without waiting for the copy where the device allows it."""
    if where.type in ("cpu", "mps"):
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)
