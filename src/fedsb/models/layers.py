"""The linear layers of a model: which ones can be adapted, their shapes and their weights.

Shapes: W0 is (m, n) = (out, in), whatever the layer stores.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import regex
import torch
from torch import Tensor, nn

from fedsb.utils.errors import UserError, did_you_mean

PATTERN_SECONDS = 1.0  # limit for matching a regular expression with one layer's name
# PEFT refuses to adapt out_proj in these models, whose fused kernels read the weight (peft.tuners.tuners_utils).
STATE_SPACE_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
IN_BLOCK = re.compile(r"\.\d+\.")


def find_targets(model: nn.Module, targets: str | Sequence[str] = "blocks", head: Sequence[str] = ()) -> list[str]:
    """Returns the names of the layers to adapt, in the model's order. Raises UserError if nothing matches.

    Embeddings, the output embedding and the head are never adapted.

    Args:
        targets: "blocks" (every linear layer of the language model's blocks except those of `left_out`), a regular
            expression that must match a layer's whole name, or a list of name endings such as ["query", "value"].
        head: names of the modules that are trained in full.
    """
    linear = _linear_layers(model, head)
    if targets == "blocks":
        chosen = block_layers(model, head)
    elif isinstance(targets, str):
        chosen = _matching(linear, targets)
    else:
        endings = {part: [name for name in linear if name == part or name.endswith("." + part)] for part in targets}
        for part, names in endings.items():
            if not names:
                known = did_you_mean(part, kinds(linear))
                raise UserError(f"model.target_modules: no linear layer is called {part!r}; {known}")
        chosen = [name for name in linear if any(name in names for names in endings.values())]
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layers that can be adapted. Choose a different model.")
    if not chosen:
        raise UserError(
            f"model.target_modules = {targets!r} matches no linear layer. There are: {', '.join(kinds(linear))}"
        )
    return chosen


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=PATTERN_SECONDS)]
    except regex.error as error:
        raise UserError(f"model.target_modules = {pattern!r} is not a regular expression: {error}") from error
    except TimeoutError as error:  # nested repeats, which a coordinator may send
        raise UserError(f"model.target_modules = {pattern!r} takes too long to match. Simplify it.") from error


def block_layers(model: nn.Module, head: Sequence[str] = ()) -> list[str]:
    """Returns the linear layers that "blocks" adapts; none in a model whose blocks have other kinds of layers."""
    excluded = left_out(model, head)
    return [name for name in _linear_layers(model, head) if IN_BLOCK.search(name) and name not in excluded]


def _linear_layers(model: nn.Module, head: Sequence[str]) -> list[str]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not output and not any(is_inside(name, part) for part in head)
    ]


def left_out(model: nn.Module, head: Sequence[str] = ()) -> dict[str, str]:
    """Returns the weights of the blocks that "blocks" does not adapt, each with its reason.

    Keys are names of linear layers and, for experts that are stored as one 3-D tensor, of parameters.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
    facts = text.to_dict() if text is not None else {}
    experts = any("expert" in key and type(value) is int and value > 1 for key, value in facts.items())
    towers = other_towers(model)
    found: dict[str, str] = {}
    for name in _linear_layers(model, head):
        if not IN_BLOCK.search(name):
            continue
        if any(is_inside(name, tower) for tower in towers):
            found[name] = "text does not reach it"
        elif experts and ROUTER.search(name):
            found[name] = "it routes tokens to experts"
        elif min(linear_shape(model.get_submodule(name))) == 1:
            found[name] = "it has one input or one output"
        elif reads_weight(model, name):
            found[name] = "the model reads its weight without calling it, at least in some of its kernels"
        elif name.rpartition(".")[2] == "out_proj" and facts.get("model_type") in STATE_SPACE_MODELS:
            found[name] = "PEFT cannot adapt it in this model"
    found |= {
        name: "its experts are one 3-D tensor, not linear layers"
        for name, p in model.named_parameters()
        if p.dim() == 3 and "expert" in name and IN_BLOCK.search(name)
    }
    return found


def other_towers(model: nn.Module) -> list[str]:
    """Returns the vision and audio towers of a multimodal model. Text never reaches them."""
    config = getattr(model, "config", None)
    configs = [getattr(config, f"{kind}_config", None) for kind in ("vision", "audio")]
    found: list[str] = []
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        is_tower = own is not None and any(own is tower for tower in configs)
        if name and is_tower and not any(is_inside(name, outer) for outer in found):
            found.append(name)
    return found


def kinds(names: Sequence[str]) -> list[str]:
    """Returns layer names without their block's number: 'attention.self.query', 'output.dense', ..."""
    return sorted({IN_BLOCK.split(name)[-1] for name in names})


def is_inside(name: str, module: str) -> bool:
    """Returns whether `name` is the module or a part of it."""
    return name == module or name.startswith(module + ".")


def is_linear(module: nn.Module) -> bool:
    """Returns whether the layer maps (..., n) to (..., m) with one weight: nn.Linear, its subclasses, GPT-2's Conv1D.

    A subclass with its own forward is tried on one row: Falcon's passes, a router that returns a tuple does not.
    """
    if not isinstance(module, nn.Linear):
        return is_conv1d(module)
    kind = type(module)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers."):
        return True
    weight = module.weight
    try:
        with torch.no_grad():
            y = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return isinstance(y, Tensor) and y.shape == (1, module.out_features)


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether the layer is GPT-2's Conv1D, which stores the transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """Returns (m, n) = (out, in) of a linear layer."""
    if is_conv1d(base):
        n, m = base.weight.shape  # type: ignore[misc]
        return int(m), int(n)
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]


def base_weight(base: nn.Module) -> Tensor:
    """Returns W0 (m, n), detached. A quantised layer is dequantised to a new float32 matrix.

    The weight of a sharded layer is gathered, by all processes together.
    """
    weight = base.weight
    if isinstance(sharded := weight, Tensor) and hasattr(sharded, "full_tensor"):
        weight = sharded.full_tensor()
    assert isinstance(weight, Tensor)
    kind = type(weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        return _dequantised(base, kind)
    return weight.detach().T if is_conv1d(base) else weight.detach()


def _dequantised(base: nn.Module, kind: str) -> Tensor:
    """Returns W0 (m, n) of a layer of bitsandbytes, float32."""
    from bitsandbytes import functional

    weight: Any = base.weight
    if kind == "Params4bit":
        W0: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        state: Any = base.state
        W0 = functional.int8_vectorwise_dequant(weight.data, weight.SCB if state.SCB is None else state.SCB)
    return W0.detach().float()


def reads_weight(model: nn.Module, name: str) -> bool:
    """Returns whether the model computes with the weight of this layer without calling the layer.

    The state-space mixers of Mamba and related models do so with dt_proj, and some fused kernels with x_proj and
    out_proj; PEFT refuses out_proj in these models. An adapter there has no effect until it is merged.
    """
    parent, _, child = name.removesuffix(".base_layer").rpartition(".")
    mixer = model.get_submodule(parent)
    return hasattr(mixer, "A_log") and f"self.{child}.weight" in inspect.getsource(type(mixer))
