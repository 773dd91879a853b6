"""Task heads: the modules outside the base model, layers that a checkpoint lacks, and their common initial values."""

from __future__ import annotations

import torch
from torch import nn

from fedsb.models.layers import is_inside
from fedsb.utils.errors import UserError
from fedsb.utils.rng import keyed_generator
from fedsb.utils.tensors import Tensors


def find_head(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (trainable modules outside the base model, which are made of linear layers; the other modules there)."""
    prefix = getattr(model, "base_model_prefix", "")
    outside = [
        (name, part) for name, part in model.named_children() if name != prefix and any(True for _ in part.parameters())
    ]
    linear = [
        name
        for name, part in outside
        if all(isinstance(sub, nn.Linear) for sub in part.modules() if list(sub.parameters(recurse=False)))
    ]
    return tuple(linear), tuple(name for name, _ in outside if name not in linear)


def find_fresh(model: nn.Module, missing: set[str], head: tuple[str, ...]) -> tuple[str, ...]:
    """Returns linear layers outside the head that the checkpoint lacks. They are trained, sent and saved with the head.

    If they were frozen, every load would draw different values, and the adapter would fit none of them. Raises
    UserError for such a module of a different kind, unless its initial value is constant, like that of a norm.
    """
    fresh: list[str] = []
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for key in sorted(missing):
        part = key.rpartition(".")[0]
        if part in fresh or any(is_inside(part, module) for module in head):
            continue
        if isinstance(model.get_submodule(part), nn.Linear):
            fresh.append(part)
        elif bool((tensors[key] != tensors[key].flatten()[0]).any()):
            raise UserError(
                f"The checkpoint has no {key!r}, so every load draws different values. Use a complete checkpoint."
            )
    return tuple(fresh)


def head_start(shapes: Tensors, seed: int) -> Tensors:
    """Returns the head's initial tensors, equal for all clients: weights N(0, 0.02^2) by (seed, name), biases 0."""
    return {
        key: torch.from_numpy(keyed_generator(seed, "head", key).normal(0, 0.02, size=tuple(t.shape))).float()
        if t.dim() == 2
        else torch.zeros(t.shape)
        for key, t in shapes.items()
    }
