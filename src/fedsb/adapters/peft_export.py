"""Saves a LoRA-SB adapter of a PEFT model as a plain LoRA, which loads without fedsb."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fedsb.adapters.core import core_left
from fedsb.adapters.export import lora_targets
from fedsb.adapters.peft_config import LoraSBConfig
from fedsb.adapters.peft_layer import adapter_layers
from fedsb.models.layers import is_conv1d
from fedsb.utils.errors import RunError, UserError, did_you_mean


def to_lora(model: Any, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns the adapter as plain LoRA of rank h r: lora_B = B R (m, h r), lora_A = A (h r, n), alpha = h r s. Exact.

    PEFT's `convert_to_lora` works too, by an SVD of each layer's (m, n) change.
    """
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise UserError(f"there is no adapter {adapter_name!r}; {did_you_mean(adapter_name, model.peft_config)}")
    config: LoraSBConfig = model.peft_config[adapter_name]
    alpha = config.total_rank * config.scale
    model_type = getattr(getattr(model.get_base_model(), "config", None), "model_type", "")
    target_modules, target_parameters = lora_targets(list(layers), model_type)
    lora = LoraConfig(
        r=config.total_rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=target_modules,
        target_parameters=target_parameters,
        fan_in_fan_out=any(is_conv1d(layer.get_base_layer()) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {key: value for key, value in state.items() if ".lorasb_" not in key}  # the modules to save
    for name, layer in layers.items():
        A, B, R = layer.factors(adapter_name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = core_left(B, R)
    return lora, tensors


def save_as_lora(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Writes the adapter as a plain LoRA folder that `PeftModel.from_pretrained` loads without fedsb.

    The folder is then loaded onto a copy of the base without weights. Raises RunError if PEFT adapts different layers,
    or adapts them differently.
    """
    config, tensors = to_lora(model, adapter_name)
    config.save_pretrained(str(folder))
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(_without_weights(model), str(folder)).get_base_model()
    found = {name: module for name, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    scale = model.peft_config[adapter_name].scale
    wrong = found.keys() ^ adapter_layers(model, adapter_name).keys()
    for name in found.keys() - wrong:
        A, B = found[name].lora_A["default"].weight, found[name].lora_B["default"].weight
        same = torch.equal(A.cpu(), tensors[f"base_model.model.{name}.lora_A.weight"])
        same &= torch.equal(B.cpu(), tensors[f"base_model.model.{name}.lora_B.weight"])
        if not same or not math.isclose(found[name].scaling["default"], scale):
            wrong.add(name)
    if wrong:
        raise RunError(
            f"PEFT does not load the adapter in {folder} as it was trained. {len(wrong)} layers differ, the first is "
            f"{min(wrong)!r}. Do not use this folder. This is a defect of fedsb: please report it with `fedsb env`."
        )


def _without_weights(model: Any) -> nn.Module:
    """Returns a copy of the base model whose parameters are zeros that take no memory.

    Quantised parameters and those of modules_to_save are copied as they are: PEFT reads or overwrites them.
    """
    saved = {id(p) for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and id(parameter) not in saved
    }
    base: nn.Module = copy.deepcopy(model, memo).unload()
    return base
