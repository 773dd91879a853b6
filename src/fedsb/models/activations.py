"""Activation checkpointing of a frozen base: less memory for a second forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from fedsb.utils.errors import UserError


def checkpoint_activations(model: Any) -> None:
    """Recomputes activations in the backward. Blocks are put in training mode, which switches it on, but do not compute
    in it: some (OPT, BART) have dropout of their own, which stays off as everywhere in the base."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"model.activation_checkpointing: {type(model).__name__} does not support it; set it to false")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated", category=FutureWarning)  # 5.0 has no other name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        block.training = True
        block._gradient_checkpointing_func = _in_evaluation(block, block._gradient_checkpointing_func)


def _in_evaluation(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint`, with the block in evaluation mode while its forward runs, the first time and again."""

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        def in_evaluation(*args: Any) -> Any:
            block.training = False
            try:
                return forward(*args)
            finally:
                block.training = True

        return checkpoint(in_evaluation, *args)

    return run
