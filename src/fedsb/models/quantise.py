"""Quantised bases: the linear layers of the blocks in 4 or 8 bits by bitsandbytes, all else in the model's dtype.

    4bit    NF4 with double quantisation, blocks of 64 (QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314)
    8bit    LLM.int8(), outlier columns in float16 (Dettmers et al., NeurIPS 2022, arXiv 2208.07339)

The adapter is on top, in float32 as ever, and the quantised weights are never written to. Embeddings, the output
embedding and task heads are not quantised: a head is trained, and an output embedding costs accuracy.

Limits: an 8-bit product looks for outliers in the whole batch, so an example's result depends on the others of its
batch; settings.py refuses what that would make untrue (joint training, privacy of one row).
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
MISSING = "model.quantize = {!r} needs bitsandbytes, which is not installed here: pip install 'fedsb[quant]'"


def missing_package(quantize: str) -> str | None:
    """What to say where bitsandbytes is not installed; None where it is, or is not needed."""
    if quantize == "none" or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return MISSING.format(quantize)


def quantised_layers(quantize: str, model: nn.Module, head: Sequence[str]) -> set[str]:
    """Names of the layers that are quantised: every linear layer of the blocks.

    In 4 bits, those whose rows are whole blocks of scales. Of others the CPU kernels of bitsandbytes 0.50.2 make wrong
    values (64 x 96: off by 0.21 of the weight's norm, where 0.09 is NF4's), and every site must have the same base.
    """
    if quantize == "none":
        return set()
    shapes = {name: linear_shape(model.get_submodule(name)) for name in find_targets(model, "blocks", head)}
    return {name for name, (_, n) in shapes.items() if quantize == "8bit" or n % NF4_BLOCK == 0}


def quantization_keys(quantize: str, model: nn.Module, head: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The keys of transformers' BitsAndBytesConfig, as JSON has them, so that others can load the same base.

    `model` has the architecture, on the meta device or not. Empty for "none".
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
    """What is not quantised, towers beside the language model as wholes."""
    chosen, towers = quantised_layers(quantize, model, head), other_towers(model)
    linear = [name for name, module in model.named_modules() if is_linear(module) and name not in chosen]
    return [*towers, *(name for name in linear if not any(is_inside(name, tower) for tower in towers))]


def quantised_itself(config: Any) -> bool:
    """Returns whether a checkpoint's weights are stored quantised, by its own config."""
    return getattr(config, "quantization_config", None) is not None


def loading_options(keys: Mapping[str, Any], device: torch.device, *, itself: bool) -> dict[str, Any]:
    """What `from_pretrained` must be told beside; `itself`: the checkpoint is quantised already.

    Raises UserError where bitsandbytes is not installed, or where a quantised checkpoint would be quantised again.
    """
    if not keys:
        return {"device_map": {"": device}} if itself else {}
    if itself:
        raise UserError("model.quantize: this checkpoint is quantised already. Leave model.quantize out")
    if said := missing_package("4bit" if "load_in_4bit" in keys else "8bit"):
        raise UserError(said)
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would warn at every 8-bit product
    return {"quantization_config": BitsAndBytesConfig(**keys), "device_map": {"": device}}


def settle(model: nn.Module) -> None:
    """Makes loaded layers fit for training after scoring.

    On CPUs with AVX512-BF16, scoring would repack 4-bit weights for a product that has no backward.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  torch types it as a tensor


def choice(quantize: str, dtype: torch.dtype) -> ResolvedSetting | None:
    short = str(dtype).removeprefix("torch.")
    reason = {
        "4bit": f"as asked: NF4, double quantisation, products in {short}",
        "8bit": "as asked: LLM.int8(), which rounds the inputs of products to float16",
    }
    return (
        None if quantize == "none" else ResolvedSetting(key="model.quantize", value=quantize, reason=reason[quantize])
    )


def count_values(model: nn.Module) -> int:
    """Values of a model's parameters; a packed 4-bit weight counts as what it holds."""
    packed = {
        f"{name}.weight": math.prod(linear_shape(module))
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    return sum(packed.get(name, p.numel()) for name, p in model.named_parameters())


def weight_bytes(model: nn.Module, quantize: str, head: Sequence[str]) -> int:
    """Bytes of the weights of a model that is not quantised yet, such as one on the meta device."""
    chosen = quantised_layers(quantize, model, head)
    total = 0.0
    for name, p in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if layer in chosen and part == "weight":
            m = linear_shape(model.get_submodule(layer))[0]
            total += p.numel() + 4 * m if quantize == "8bit" else p.numel() * nf4_bytes_a_value()
        else:
            total += p.numel() * p.element_size()
    return round(total)


def nf4_bytes_a_value() -> float:
    """Half a byte, its block's 8-bit scale, and that scale's group's float32: 0.516."""
    return 0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_GROUP)
