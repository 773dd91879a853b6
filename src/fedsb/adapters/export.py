"""From a trained adapter to files that others load: plain PEFT LoRA, a merged model, a model card.

    lora_B = B R,  lora_A = A,  rank h r,  lora_alpha = rank * s           multiplied in float32; exact

A trained head is saved with the adapter (PEFT's modules_to_save). Every adapter that is written is loaded again by
PEFT, on the same base, and its logits are compared with those of the model that was trained.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import pad

from fedsb.adapters.adapted import Tensors
from fedsb.adapters.factors import Factors
from fedsb.adapters.layer import is_conv1d
from fedsb.adapters.serving import Serving, serving_lines
from fedsb.errors import RunError

TOLERANCE = 1e-5  # of a layer's change, relative to its largest entry, in float32
LOGITS_TOLERANCE = 1e-3  # of logits: B R first and R z first round differently, and deep layers make more of it


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What a plain adapter must say of its base."""

    name: str  # where it was loaded from: a folder or a Hub name
    shared_name: str  # what others know it by
    revision: str | None
    auto_class: str
    task_type: str  # PEFT's: SEQ_CLS, TOKEN_CLS, CAUSAL_LM
    head: Sequence[str]  # modules trained in full
    label_names: Sequence[str]  # of the head's outputs
    conv1d: bool  # GPT-2's layers, stored transposed
    pad_token: int | None = None  # where the base's own config names none and a classifier needs one
    problem_type: str | None = None  # "regression", where the head gives a number
    model_type: str = ""  # of its config.json
    quantization: Mapping[str, Any] = field(default_factory=dict)  # keys of BitsAndBytesConfig, of a quantised base


def lora_tensors(factors: Mapping[str, Factors], head: Tensors) -> Tensors:
    """The tensors of a PEFT LoRA file: "base_model.model.<layer>.lora_A.weight" (R, n), ".lora_B.weight" (m, R).

    Layers of a lower rank are filled up with zeros: not everything that loads LoRA knows a rank for each layer.
    """
    tensors: Tensors = {}
    rank = max(len(factor.A) for factor in factors.values())
    for layer, factor in factors.items():
        missing = rank - len(factor.A)
        A, B = pad(factor.A.float(), (0, 0, 0, missing)), pad(factor.B.float(), (0, missing))
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B.contiguous()
    return tensors | {f"base_model.model.{key}": tensor.float().contiguous() for key, tensor in head.items()}


def lora_files(factors: Mapping[str, Factors], head: Tensors, base: BaseFacts, card: str) -> dict[str, bytes]:
    """The files of a plain LoRA adapter folder, by name."""
    return {
        "adapter_model.safetensors": save(lora_tensors(factors, head), metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(lora_config(factors, base), indent=2, sort_keys=True, default=str).encode(),
        "README.md": card.encode(),
    }


def lora_config(factors: Mapping[str, Factors], base: BaseFacts) -> dict[str, Any]:
    """What is written as adapter_config.json."""
    from peft import LoraConfig

    rank = max(len(factor.A) for factor in factors.values())
    alpha = next(iter(factors.values())).scale * rank
    target_modules, target_parameters = lora_targets(sorted(factors), base.model_type)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=target_modules,
        target_parameters=target_parameters,
        modules_to_save=list(base.head) or None,
        task_type=base.task_type,
        base_model_name_or_path=base.shared_name,
        revision=base.revision,
        fan_in_fan_out=base.conv1d,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def lora_targets(layers: Sequence[str], model_type: str) -> tuple[list[str], list[str] | None]:
    """Returns target_modules and target_parameters with which PEFT adapts exactly these linear layers.

    In models with fused experts, such as DeepSeek-V3, PEFT takes every gate_proj, up_proj and down_proj for one of the
    experts', also in dense and shared layers, and then adapts other weights than were trained. A layer that is named
    by its parameter is left alone. The names of the tensors are the same either way.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    parameters = []
    for layer in layers:
        config = LoraConfig(target_modules=[layer])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it would be fused with others that are not named
            config.target_modules = set()
        if layer not in (config.target_modules or ()):
            parameters.append(layer)
    modules = [layer for layer in layers if layer not in parameters]
    return modules, [f"{layer}.weight" for layer in parameters] or None


@torch.no_grad()
def check_adapter(
    folder: Path,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    wanted: Tensor,
    factors: Mapping[str, Factors],
    base: BaseFacts,
) -> float:
    """Loads the adapter with PEFT onto the bare base and compares it with what was trained.

    Compared are the change of every layer's weight, in float32, and the logits, where the base is float32: on another
    the logits of two right adapters differ by rounding. Returns the largest relative difference of a layer's change.
    The model is given back without the adapter, but with its head, as PEFT leaves it.
    Raises RunError where PEFT cannot load it, or a difference is above TOLERANCE or LOGITS_TOLERANCE.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():  # PEFT asks it
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            loaded = PeftModel.from_pretrained(model, folder)
    except (KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise RunError(f"PEFT cannot load the adapter in {folder}: {type(error).__name__}: {error}") from error
    loaded.eval()
    modules = dict(loaded.get_base_model().named_modules())
    by_layer = [
        _relative(modules[layer].get_delta_weight("default"), _stored(factor.scale * factor.B @ factor.A, base))
        for layer, factor in factors.items()
    ]
    difference = float(torch.tensor(by_layer).max())  # NaN where one is
    faults = [] if difference <= TOLERANCE else [f"the change of a layer differs by {difference:.2g}"]
    if all(p.dtype == torch.float32 for p in model.parameters()):
        logits = _relative(loaded(**inputs).logits, wanted)
        faults += [] if logits <= LOGITS_TOLERANCE else [f"logits differ by {logits:.2g}"]
    loaded.unload()
    if faults:
        raise RunError(
            f"the adapter in {folder}, loaded by PEFT, is not the trained model: {' and '.join(faults)} of the largest "
            "value; this is a defect of fedsb, please report it with `fedsb env`"
        )
    return difference


def _relative(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.float().cpu()
    return float((got.float().cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _stored(delta: Tensor, base: BaseFacts) -> Tensor:
    """A change (m, n) as the base stores its weights."""
    return delta.T if base.conv1d else delta


def load_lines(base: BaseFacts, adapter: Path | str) -> str:
    """Three lines of Python that load the adapter, with transformers and peft alone; mean pooling needs a word more."""
    labels = f", num_labels={len(base.label_names)}" if base.label_names else ""
    if base.label_names and base.pad_token is not None:
        labels += f", pad_token_id={base.pad_token}"
    if base.problem_type is not None:
        labels += f", problem_type={base.problem_type!r}"
    revision = f", revision={base.revision!r}" if base.revision else ""
    pooling = '\n# of a text: model(**tokenizer(text, return_tensors="pt")).logits.mean(1), the mean over its tokens'
    quantised = ", ".join(f"{key}={value!r}" for key, value in base.quantization.items())
    how = f", quantization_config=BitsAndBytesConfig({quantised})" if quantised else ""
    return (
        f"from transformers import {base.auto_class}{', BitsAndBytesConfig' if quantised else ''}; "
        "from peft import PeftModel\n"
        f"base = {base.auto_class}.from_pretrained({str(base.name)!r}{labels}{revision}{how})\n"
        f"model = PeftModel.from_pretrained(base, {str(adapter)!r})"
        + (pooling if base.task_type == "TOKEN_CLS" else "")
    )


def merge(base: BaseFacts, adapter: Path, folder: Path) -> None:
    """Writes the base with the adapter merged into its weights, as an ordinary model folder."""
    import transformers
    from peft import PeftModel

    labels: dict[str, Any] = {"num_labels": len(base.label_names)} if base.label_names else {}
    model = getattr(transformers, base.auto_class).from_pretrained(base.name, revision=base.revision, **labels)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if base.label_names:
        merged.config.problem_type = base.problem_type
        merged.config.id2label = dict(enumerate(base.label_names))
        merged.config.label2id = {name: i for i, name in enumerate(base.label_names)}
        if merged.config.get_text_config().pad_token_id is None:
            merged.config.get_text_config().pad_token_id = base.pad_token
    merged.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base.name, revision=base.revision).save_pretrained(folder)


def has_conv1d(layers: Mapping[str, Any]) -> bool:
    return any(is_conv1d(layer.base) for layer in layers.values())


def model_card(base: BaseFacts, facts: Mapping[str, str], adapter: Path | str, servers: Sequence[Serving] = ()) -> str:
    """A model card in Markdown: what it is, how it was made, what it scored, how to load it, where else."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    labels = "".join(f"\n- {i}: {name}" for i, name in enumerate(base.label_names))
    elsewhere = "\n".join(f"- {line}" for line in serving_lines([asdict(server) for server in servers]))
    heading = "Output, a number" if base.problem_type == "regression" else "Classes"
    quantised = (
        "\nIt was trained on the base quantised as above. On the unquantised base it works too, but is not what was "
        "scored.\n"
        if base.quantization
        else ""
    )
    return (
        f"---\nbase_model: {json.dumps(base.shared_name)}\nlibrary_name: peft\n"
        f"tags: [lora, federated-learning, fedsb]\n---\n\n"
        f"# A LoRA adapter, trained by federation with fedsb\n\n| | |\n|---|---|\n{rows}\n\n"
        f"## Load it\n\n```python\n{load_lines(replace(base, name=base.shared_name), adapter)}\n```\n"
        + quantised
        + (f"\n## Elsewhere\n\n{elsewhere}\n" if elsewhere else "")
        + (f"\n## {heading}\n{labels}\n" if labels else "")
    )
