"""Writes a trained adapter as a plain PEFT LoRA.

    lora_B = B R,  lora_A = A,  rank h r,  lora_alpha = h r s           multiplied in float32; exact

A trained head is saved with the adapter (PEFT's modules_to_save). Every adapter that is written is loaded again with
PEFT and compared with the trained model, see export_check.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from safetensors.torch import save
from torch.nn.functional import pad

from fedsb.adapters.factors import Factors
from fedsb.models.layers import is_conv1d
from fedsb.utils.tensors import Tensors

OLD_PEFT_KEYS = frozenset(  # fields of LoraConfig in PEFT 0.13, which refuses a config with other fields
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_alpha", "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r"),
        *("rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
    )
)


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """The facts about a base model, its head and its prompts that the files of an adapter contain."""

    name: str  # where the model was loaded from: a folder or a Hub name
    shared_name: str  # the name under which others find it
    revision: str | None
    auto_class: str
    task_type: str  # PEFT's: SEQ_CLS, TOKEN_CLS, CAUSAL_LM
    head: Sequence[str]  # modules trained in full
    label_names: Sequence[str]  # names of the head's outputs
    conv1d: bool  # whether the layers are GPT-2's, which are stored transposed
    pad_token: int | None = None  # set if a classifier needs one that the base's own config does not contain
    problem_type: str | None = None  # "regression" if the head returns a number
    model_type: str = ""  # as in its config.json
    origin: str | None = None  # for a folder that fedsb made: how others get the same one
    quantization: Mapping[str, Any] = field(default_factory=dict)  # keys of BitsAndBytesConfig
    max_tokens: int = 512  # for classifiers: longer texts are truncated
    pair: bool = False  # for classifiers: whether they read two texts
    chat: bool = False  # for generation: whether prompts are made by the tokenizer's chat template
    template: str = "{prompt}"  # for generation without a chat template: the text around a prompt
    starts: bool = False  # for generation without a chat template: whether the text starts with a begin token
    ends: Sequence[int] = ()  # tokens that end a generated text
    stops: Sequence[str] = ()  # texts at which a generated text is cut if it does not end

    @property
    def is_local(self) -> bool:
        """Returns whether the base is a folder on this machine, without a public name."""
        return Path(self.shared_name).is_dir()

    @property
    def averages(self) -> bool:
        """Returns whether logits are averaged over a text's tokens."""
        return self.task_type == "TOKEN_CLS"


def lora_tensors(factors: Mapping[str, Factors], head: Tensors) -> Tensors:
    """Returns the tensors of a PEFT LoRA file, with keys such as "base_model.model.<layer>.lora_A.weight".

    Layers of a lower rank are padded with zeros, since not every library supports a rank per layer.
    """
    tensors: Tensors = {}
    rank = max(len(factor.A) for factor in factors.values())
    for layer, factor in factors.items():
        missing = rank - len(factor.A)
        A, B = pad(factor.A.float(), (0, 0, 0, missing)), pad(factor.B.float(), (0, missing))
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B.contiguous()
    return tensors | {f"base_model.model.{key}": tensor.float().contiguous() for key, tensor in head.items()}


def lora_files(factors: Mapping[str, Factors], head: Tensors, base: BaseModelInfo, card: str) -> dict[str, bytes]:
    """Returns the files of a plain LoRA adapter folder that PEFT reads, by name, and its model card."""
    return {
        "adapter_model.safetensors": save(lora_tensors(factors, head), metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(lora_config(factors, base), indent=2, sort_keys=True, default=str).encode(),
        "README.md": card.encode(),
    }


def lora_config(factors: Mapping[str, Factors], base: BaseModelInfo) -> dict[str, Any]:
    """Returns the contents of adapter_config.json."""
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
        base_model_name_or_path=str(Path(base.shared_name).resolve()) if base.is_local else base.shared_name,
        revision=base.revision,
        fan_in_fan_out=base.conv1d,
        inference_mode=True,
    ).to_dict()
    default = LoraConfig().to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if key in OLD_PEFT_KEYS or (key != "peft_version" and value != default[key])
    }


def companion_files(tokenizer: Any, config: Any, base: BaseModelInfo) -> dict[str, bytes]:
    """Returns further files of an adapter folder: the tokenizer and, for classifiers, the config with the classes.

    The config.json also prevents transformers' `pipeline(task, model=folder)` from loading the adapter. Without it, the
    pipeline loads the base with a config without the classes and, with mean pooling, with a random head.
    """
    with TemporaryDirectory(prefix="fedsb.") as folder:
        ready_tokenizer(tokenizer, base).save_pretrained(folder)
        if base.label_names:
            labelled_config(config, base).save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def ready_tokenizer(tokenizer: Any, base: BaseModelInfo) -> Any:
    """Returns a copy of the tokenizer that pads, and truncates a classifier's texts, as in training."""
    ready = copy.deepcopy(tokenizer)
    if ready.pad_token is None and ready.eos_token is not None:
        ready.pad_token = ready.eos_token
    elif ready.pad_token is None and base.label_names:
        ready.pad_token = ready.convert_ids_to_tokens(0)
    if base.label_names:
        ready.model_max_length = base.max_tokens
        ready.padding_side = "right"
    return ready


def labelled_config(config: Any, base: BaseModelInfo) -> Any:
    """Returns a copy of a model's config with the classes, the pad token and the kind of problem."""
    labelled = copy.deepcopy(config)
    labelled.problem_type = base.problem_type
    labelled.id2label = dict(enumerate(base.label_names))
    labelled.label2id = {name: i for i, name in enumerate(base.label_names)}
    if base.pad_token is not None and labelled.get_text_config().pad_token_id is None:
        labelled.get_text_config().pad_token_id = base.pad_token
    if hasattr(labelled, "quantization_config"):  # part of loading the base
        del labelled.quantization_config
    return labelled


def lora_targets(layers: Sequence[str], model_type: str) -> tuple[list[str], list[str] | None]:
    """Returns target_modules and target_parameters with which PEFT adapts exactly these linear layers.

    In models with fused experts, such as DeepSeek-V3, PEFT treats every gate_proj, up_proj and down_proj as a part of
    the experts, also in dense and shared layers, and then adapts the wrong weights. Layers that are given by their
    parameters are not affected. The names of the tensors are the same in both cases.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    parameters = []
    for layer in layers:
        config = LoraConfig(target_modules=[layer])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it would be fused with layers that are not targets
            config.target_modules = set()
        if layer not in (config.target_modules or ()):
            parameters.append(layer)
    modules = [layer for layer in layers if layer not in parameters]
    return modules, [f"{layer}.weight" for layer in parameters] or None


def has_conv1d(layers: Mapping[str, Any]) -> bool:
    """Returns whether some of the adapted layers are GPT-2's Conv1D."""
    return any(is_conv1d(layer.base) for layer in layers.values())
