"""Quantised base models: the linear layers of the blocks in 4 or 8 bits by bitsandbytes, all else in the model's dtype.

    4bit    NF4 with double quantisation, blocks of 64 (QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314)
    8bit    LLM.int8(), outlier columns in float16 (Dettmers et al., NeurIPS 2022, arXiv 2208.07339)

The adapter is added on top, in float32 as always, and the quantised weights are never changed. Embeddings, the output
embedding and task heads are not quantised: a head is trained, and a quantised output embedding costs accuracy.

Limits: an 8-bit product looks for outliers in the whole batch, so an example's result depends on the other examples of
its batch. The configuration refuses what that would make untrue (joint training, privacy of one row).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedsb.config.resolved import ResolvedSetting
from fedsb.models.layers import find_targets, is_inside, is_linear, linear_shape, other_towers
from fedsb.utils.errors import UserError

NF4_BLOCK, NF4_GROUP = 64, 256  # values that share a scale, and 8-bit scales that share a float32
MISSING = "model.quantize = {!r} needs bitsandbytes, which is not installed. Install it: pip install 'fedsb[quant]'"


def missing_package(quantize: str) -> str | None:
    """Returns the message if bitsandbytes is not installed; None if it is, or is not needed."""
    if quantize == "none" or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return MISSING.format(quantize)


def quantised_layers(quantize: str, model: nn.Module, head: Sequence[str]) -> set[str]:
    """Returns the names of the layers that are quantised: every linear layer of the blocks.

    In 4 bits, a layer's rows must be whole blocks of scales. For others the CPU kernels of bitsandbytes 0.50.2 compute
    wrong values (64 x 96: an error of 0.21 of the weight's norm, where NF4 has 0.09), and every client must have the
    same base.
    """
    if quantize == "none":
        return set()
    shapes = {name: linear_shape(model.get_submodule(name)) for name in find_targets(model, "blocks", head)}
    return {name for name, (_, n) in shapes.items() if quantize == "8bit" or n % NF4_BLOCK == 0}


def quantization_keys(quantize: str, model: nn.Module, head: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keys of transformers' BitsAndBytesConfig as JSON, so that others can load the same base.

    `model` has the architecture, on the meta device or not. The keys are empty for "none".
    """
    if quantize == "none":
        return {}
    left = {"llm_int8_skip_modules": left_modules(quantize, model, head)}
    if quantize == "8bit":
        return {"load_in_8bit": True, **left}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        **left,
    }


def left_modules(quantize: str, model: nn.Module, head: Sequence[str]) -> list[str]:
    """Returns the modules that are not quantised. Towers outside the language model are listed as a whole."""
    chosen, towers = quantised_layers(quantize, model, head), other_towers(model)
    linear = [name for name, module in model.named_modules() if is_linear(module) and name not in chosen]
    return [*towers, *(name for name in linear if not any(is_inside(name, tower) for tower in towers))]


def quantised_itself(config: Any) -> bool:
    """Returns whether a checkpoint's weights are stored quantised, by its own config."""
    return getattr(config, "quantization_config", None) is not None


def loading_options(keys: Mapping[str, Any], *, itself: bool) -> dict[str, Any]:
    """Returns further arguments of `from_pretrained`; `itself` means that the checkpoint is already quantised.

    Raises UserError if bitsandbytes is not installed, or if a quantised checkpoint would be quantised again.
    """
    if not keys:
        return {}
    if itself:
        raise UserError("model.quantize is set, but this checkpoint is already quantised. Leave model.quantize out.")
    if said := missing_package("4bit" if "load_in_4bit" in keys else "8bit"):
        raise UserError(said)
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every 8-bit product
    return {"quantization_config": BitsAndBytesConfig(**keys)}


def settle(model: nn.Module) -> None:
    """Makes loaded layers trainable after scoring.

    On CPUs with AVX512-BF16, scoring would repack 4-bit weights for a product without a backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  torch types it as a tensor


def choice(quantize: str, dtype: torch.dtype) -> ResolvedSetting | None:
    """Returns the resolved setting; None for "none"."""
    short = str(dtype).removeprefix("torch.")
    reason = {
        "4bit": f"as configured: NF4, double quantisation, products in {short}",
        "8bit": "as configured: LLM.int8(), which rounds the inputs of products to float16",
    }
    return (
        None if quantize == "none" else ResolvedSetting(key="model.quantize", value=quantize, reason=reason[quantize])
    )


def count_values(model: nn.Module) -> int:
    """Returns the number of values of a model's parameters. A packed 4-bit weight counts its unpacked values."""
    packed = {
        f"{name}.weight": math.prod(linear_shape(module))
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    return sum(packed.get(name, p.numel()) for name, p in model.named_parameters())


def weight_bytes(model: nn.Module, quantize: str, head: Sequence[str]) -> int:
    """Returns the bytes of the weights of a model that is not quantised yet, such as one on the meta device."""
    chosen = quantised_layers(quantize, model, head)
    total = 0.0
    for name, p in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if layer in chosen and part == "weight":
            m = linear_shape(model.get_submodule(layer))[0]
            total += p.numel() + 4 * m if quantize == "8bit" else p.numel() * nf4_bytes_per_value()
        else:
            total += p.numel() * p.element_size()
    return round(total)


def nf4_bytes_per_value() -> float:
    """Returns half a byte, its part of a block's 8-bit scale, and of a group's float32 scale: 0.516."""
    return 0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_GROUP)
