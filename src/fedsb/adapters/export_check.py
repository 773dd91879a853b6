"""Loads a written adapter with PEFT and compares it with the model that was trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsb.adapters.export import BaseModelInfo, lora_files
from fedsb.adapters.factors import Factors
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.rng import keyed_generator
from fedsb.utils.tensors import Tensors

TOLERANCE = 1e-5  # relative to the largest entry of a layer's change times the probes, in float32
PROBES = 4  # random vectors that a layer's change is multiplied with: its full matrix would take minutes at 7B
LOGITS_TOLERANCE = 1e-3  # (B R) z and B (R z) round differently, and deep models amplify the difference


def try_adapter(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    factors: Mapping[str, Factors],
    head: Tensors,
    base: BaseModelInfo,
) -> float:
    """Writes an adapter to a temporary folder and checks it as `check_adapter` does.

    This needs no training: with factors of zeros, `expected` are the base's own logits.
    """
    with TemporaryDirectory(prefix="fedsb.") as folder:
        for name, content in lora_files(factors, head, base, "").items():
            Path(folder, name).write_bytes(content)
        return check_adapter(Path(folder), model, inputs, expected, factors, base)


@torch.no_grad()
def check_adapter(
    folder: Path,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    factors: Mapping[str, Factors],
    base: BaseModelInfo,
) -> float:
    """Loads the adapter with PEFT onto the base without an adapter, and compares it with the trained model.

    It compares the change of every layer's weight, times PROBES random vectors and in float32, and the logits
    `expected`, if the base is in float32: in other dtypes, the logits of two equal adapters differ by rounding. Returns
    the largest relative difference of a layer's change. Afterwards the model has no adapter, but its head is the
    adapter's.

    Raises:
        UserError: PEFT does not support LoRA on one of the layers. The message names the layer.
        RunError: the files cannot be read, or a difference is above TOLERANCE or LOGITS_TOLERANCE.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():  # raised by PEFT itself
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            loaded = PeftModel.from_pretrained(model, folder)
    except (ValueError, NotImplementedError) as error:
        raise _refused_by_peft(folder, [layer for layer in factors if _names(error, layer)], error) from error
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(f"PEFT cannot load the adapter in {folder}: {type(error).__name__}: {error}") from error
    try:
        loaded.eval()
        modules = dict(loaded.get_base_model().named_modules())
        if left_out := [layer for layer in factors if not hasattr(modules.get(layer), "get_delta_weight")]:
            raise _refused_by_peft(folder, left_out, None)
        by_layer = [
            relative_difference(
                _loaded_change(modules[layer], x := _probes(factor), base), factor.scale * (factor.B @ (factor.A @ x))
            )
            for layer, factor in factors.items()
        ]
        difference = float(torch.tensor(by_layer).max())  # NaN if one of them is
        faults = [] if difference <= TOLERANCE else [f"the change of a layer differs by {difference:.2g}"]
        if all(p.dtype == torch.float32 for p in model.parameters()):
            logits = relative_difference(loaded(**inputs).logits, expected)
            faults += [] if logits <= LOGITS_TOLERANCE else [f"logits differ by {logits:.2g}"]
    finally:
        loaded.unload()
    if faults:
        raise RunError(
            f"The adapter in {folder}, loaded by PEFT, is not the trained model: {' and '.join(faults)} of the largest "
            "value. This is a defect of fedsb: please report it with `fedsb env`."
        )
    return difference


def _names(error: Exception, layer: str) -> bool:
    return layer.rsplit(".", 1)[-1] in str(error)


def _refused_by_peft(folder: Path, layers: Sequence[str], error: Exception | None) -> UserError:
    """Returns the error for layers that PEFT does not adapt, with PEFT's own message if there is one."""
    named = ", ".join(map(repr, layers[:3])) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    what = f"the layer{'s' if len(layers) > 1 else ''} {named}" if layers else f"the adapter in {folder}"
    reason = f": {error}" if error is not None else " and leaves the base model unchanged there."
    return UserError(
        f"PEFT loads no LoRA on {what}{reason} Leave such layers out in a new run with model.target_modules, such as "
        '--set \'model.target_modules=["q_proj", "v_proj"]\''
    )


def _probes(factor: Factors) -> Tensor:
    """Returns random vectors (n, PROBES), the same for every layer with n inputs."""
    n = factor.A.shape[1]
    return torch.from_numpy(keyed_generator(0, "export probes", n).standard_normal((n, PROBES))).to(factor.A)


def _loaded_change(module: Any, x: Tensor, base: BaseModelInfo) -> Tensor:
    """Returns the change of a layer's weight that PEFT has loaded, times x (n, p): (m, p)."""
    if hasattr(module, "parameter_name") or module.fan_in_fan_out != base.conv1d:
        delta: Tensor = module.get_delta_weight("default").float().cpu()
        return (delta.T if base.conv1d else delta) @ x.float().cpu()
    A, B = (module.get_submodule(f"lora_{name}.default").weight.float() for name in ("A", "B"))
    change: Tensor = module.scaling["default"] * (B @ (A @ x.to(A)))
    return change


def relative_difference(result: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference, relative to the largest expected value."""
    expected = expected.float().cpu()
    return float((result.float().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
