"""Names of tensors with a prefix, and checks of received tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedsb.adapters.layout import Layout
from fedsb.protocol.payload import Payload
from fedsb.utils.tensors import Tensors

TensorShapes = Mapping[str, tuple[int, ...]]


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Prefixes the keys: `under("a", {"x": t})` is `{"a/x": t}`. `within` is its inverse."""
    return {f"{prefix}/{key}": tensor for key, tensor in tensors.items()}


def within(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {key.removeprefix(f"{prefix}/"): t for key, t in tensors.items() if key.startswith(f"{prefix}/")}


def storable(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Returns tensors as safetensors requires them: on the CPU, contiguous, without shared memory."""
    own: Tensors = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        own[key] = tensor.detach().contiguous().cpu()
        if own[key].data_ptr() in seen:
            own[key] = own[key].clone()
        seen.add(own[key].data_ptr())
    return own


def norm_l2(x: NDArray[np.float64]) -> float:
    """Returns the L2 norm. After np.linalg.norm, NumPy's BLAS threads spin for some 30 ms and slow torch's threads."""
    return math.sqrt(np.square(x).sum())


def rejection_of(payload: Payload, expected: Layout) -> str | None:
    """Returns why the payload's tensors are not the expected ones, or not finite; None for good ones."""
    if payload.layout != expected and (reason := shape_mismatch(dict(payload.layout.shapes), dict(expected.shapes))):
        return reason
    finite = np.isfinite(payload.vector)
    if finite.all():
        return None
    name = next(key for key, where in payload.layout.slices.items() if not finite[where].all())
    bad = int((~finite[payload.layout.slices[name]]).sum())
    return f"{name!r} contains {bad} values that are NaN or infinite"


def shape_mismatch(found: TensorShapes, expected: TensorShapes) -> str | None:
    """Returns what is wrong with names and shapes; None for the expected ones."""
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or extra:
        return "wrong keys: " + "; ".join([*_some("missing", missing), *_some("unknown", extra)])
    for name, shape in found.items():
        if shape != expected[name]:
            return f"{name!r} has shape {shape}, expected {expected[name]}"
    return None


def _some(what: str, names: set[str]) -> list[str]:
    shown = ", ".join(f"{name!r:.80}" for name in sorted(names)[:3])
    return [f"{what} {shown}{' and more' if len(names) > 3 else ''}"] if names else []
