"""The devices of a base model's weights: one, or all GPUs that this process sees, block by block.

With "balanced" the blocks follow each other from GPU to GPU, one of which computes at a time: a model that does not fit
one GPU can be trained, no faster than on one that it fits. The trained tensors stay on the first, and each layer takes
a copy of its own.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from fedsb.config.inputs import ModelConfig
from fedsb.utils.environment import memory_of
from fedsb.utils.errors import UserError


def device_map(config: ModelConfig, device: torch.device) -> Any:
    """Returns the `device_map` of transformers. Raises UserError where a model cannot be placed so."""
    if config.placement != "balanced":
        return {"": device}
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2 or device.index is not None:
        raise UserError(
            f"model.placement = 'balanced' needs two or more GPUs, and this process uses {count or 'none'} (device "
            f"{device}). Use model.placement = 'single', and for a smaller model model.quantize = '4bit'."
        )
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("model.placement = 'balanced' needs accelerate, which is missing: pip install 'fedsb[quant]'.")
    return "balanced"


def memory_of_all(config: ModelConfig, device: torch.device) -> int | None:
    """Returns the bytes of memory of the devices that a model is placed on; None if it is not known."""
    if config.placement != "balanced":
        return memory_of(device)
    return sum(memory_of(torch.device("cuda", i)) or 0 for i in range(torch.cuda.device_count()))
