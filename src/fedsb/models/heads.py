"""Task heads: what stands outside the base model, what its checkpoint lacks, and where all sites start it."""

from __future__ import annotations

import torch
from torch import nn

from fedsb.models.layers import is_inside
from fedsb.utils.errors import UserError
from fedsb.utils.rng import keyed_generator
from fedsb.utils.tensors import Tensors


def find_head(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules outside the base model made of linear layers, the others there): the first train, the others do not."""
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
    """Linear layers outside the head that the checkpoint does not hold. They train, travel and are saved with the head.

    Frozen, they would be drawn anew by everyone who loads the model, and the adapter would fit no one's.
    Raises UserError for such a part of another kind, unless it starts as a constant, as a norm does.
    """
    fresh: list[str] = []
    there = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for key in sorted(missing):
        part = key.rpartition(".")[0]
        if part in fresh or any(is_inside(part, module) for module in head):
            continue
        if isinstance(model.get_submodule(part), nn.Linear):
            fresh.append(part)
        elif bool((there[key] != there[key].flatten()[0]).any()):
            raise UserError(f"the checkpoint holds no {key!r}, so every load draws it anew; take a whole checkpoint")
    return tuple(fresh)


def head_start(shapes: Tensors, seed: int) -> Tensors:
    """The head's first tensors, the same for every site: weights N(0, 0.02^2) keyed by (seed, name), biases 0."""
    return {
        key: torch.from_numpy(keyed_generator(seed, "head", key).normal(0, 0.02, size=tuple(t.shape))).float()
        if t.dim() == 2
        else torch.zeros(t.shape)
        for key, t in shapes.items()
    }
