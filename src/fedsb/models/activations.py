"""Activation checkpointing of a frozen base: less memory, at the price of a second forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from fedsb.utils.errors import UserError


def checkpoint_activations(model: Any) -> None:
    """Recomputes activations in the backward pass. Raises UserError if the model does not support it.

    Blocks are put in training mode, which enables it, but compute in evaluation mode: some (OPT, BART) have their own
    dropout, which stays off everywhere in the base.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"model.activation_checkpointing = true, but {type(model).__name__} does not support it. Set it to false."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated", category=FutureWarning)  # 5.0 has no new name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        block.training = True
        block._gradient_checkpointing_func = _in_evaluation(block, block._gradient_checkpointing_func)


def _in_evaluation(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `checkpoint` with the block in evaluation mode during every run of its forward pass."""

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        def in_evaluation(*args: Any) -> Any:
            block.training = False
            try:
                return forward(*args)
            finally:
                block.training = True

        return checkpoint(in_evaluation, *args)

    return run
