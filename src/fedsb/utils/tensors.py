"""Named tensors and weight shapes, the norms of rows, and the way of a tensor to its device.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device

Tensors = dict[str, "Tensor"]
Shapes = dict[str, tuple[int, int]]  # (m, n) of each adapted layer
CACHED = 1 << 14  # columns of a matrix that are converted at a time


def same_tensors(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the very same tensors under the same names, without comparing values."""
    return some.keys() == others.keys() and all(x is others[key] for key, x in some.items())


def row_norms(rows: Tensor) -> Tensor:
    """Returns the L2 norm of each row of a matrix, (b, P) -> (b,), in float64.

    A CPU converts parts that stay in its cache: `vector_norm` would convert single values, ten times as slowly.
    """
    import torch

    if rows.device.type != "cpu":
        found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return found
    squares = torch.zeros(len(rows), dtype=torch.float64)
    for part in torch.split(rows, CACHED, dim=1):
        squares += part.double().square_().sum(1)
    return squares.sqrt_()


def to_device(tensor: Tensor, where: device) -> Tensor:
    """Returns a tensor of the host on a device, without waiting for the copy where the device allows it."""
    if where.type in ("cpu", "mps"):
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)
