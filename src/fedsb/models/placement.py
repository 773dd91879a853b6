"""The placement of a base model's weights: on one device, or in parts on several (channels/sharded.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fedsb.config.inputs import ModelConfig
from fedsb.models.load import BaseModel
from fedsb.utils.errors import UserError


class Placement:
    """Leaves a base model on the device on which it was loaded."""

    @contextmanager
    def loading(self, config: ModelConfig) -> Iterator[ModelConfig]:
        """Yields the settings with which this process loads its base model; `place` is called before the end.

        Raises UserError if the settings ask for a different placement.
        """
        if config.placement == "sharded":
            raise UserError(
                "model.placement = 'sharded' divides the base model among the processes of a torchrun launch, and this "
                "command has one process. Start the run with `torchrun --nproc-per-node N -m fedsb run my.toml`, or "
                "set model.placement = 'single'."
            )
        yield config

    def place(self, base: BaseModel) -> BaseModel:
        """Returns the base model with its weights where they stay."""
        return base


def device_bytes(model: nn.Module) -> int:
    """Returns the bytes of the parameters that are in this process: of a sharded model, those of its own part."""
    found = 0
    for parameter in model.parameters():
        own: Any = parameter
        found += (own.to_local() if is_sharded(own) else own).nbytes
    return found


def is_sharded(tensor: Any) -> bool:
    """Returns whether other processes have parts of the tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")
