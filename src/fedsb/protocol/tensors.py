"""Between torch, which trains, and numpy, which travels."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedsb.adapters.adapted import Tensors
from fedsb.protocol.payload import Arrays
from fedsb.secagg.fixed_point import Floats, flatten


def to_arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """float32 arrays on the CPU."""
    return {key: tensor.detach().to("cpu", torch.float32).numpy() for key, tensor in tensors.items()}


def to_tensors(arrays: Arrays) -> Tensors:
    return {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}


def change_of(sent: Mapping[str, torch.Tensor], unmoved: Mapping[str, torch.Tensor]) -> Floats:
    """sent - unmoved, end to end in order of the names: what a client puts into a secure sum."""
    return flatten(to_arrays({key: x - unmoved[key] for key, x in sent.items()}))


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """`under("a", {"x": t})` -> `{"a/x": t}`; `within` is its inverse."""
    return {f"{prefix}/{key}": tensor for key, tensor in tensors.items()}


def within(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {key.removeprefix(f"{prefix}/"): t for key, t in tensors.items() if key.startswith(f"{prefix}/")}
