"""From a trained adapter to files that others load: plain PEFT LoRA, and a merged model.

    lora_B = B R,  lora_A = A,  rank h r,  lora_alpha = rank * s           multiplied in float32; exact

A trained head is saved with the adapter (PEFT's modules_to_save). Every adapter that is written is loaded again by
PEFT, on the same base, and its logits are compared with those of the model that was trained.

A classifier with mean pooling is trained as a token classifier whose logits are averaged over each text's tokens.
transformers has no text classifier that does this: loaded as one, the folder would get a head of random weights. It
is therefore merged into a folder of sentence-transformers (encoder, masked mean, linear layer), which has no
config.json of its own, so that `pipeline("text-classification")` refuses it.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import pad

from fedsb.adapters.factors import Factors
from fedsb.models.layers import is_conv1d
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.tensors import Tensors

TOLERANCE = 1e-5  # of a layer's change, relative to its largest entry, in float32
LOGITS_TOLERANCE = 1e-3  # of logits: B R first and R z first round differently, and deep layers make more of it
OLD_PEFT_KEYS = frozenset(  # fields of LoraConfig in PEFT 0.13, which refuses a config with any other
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_alpha", "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r"),
        *("rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
    )
)
ENCODER, POOLING, DENSE = "0_Transformer", "1_Pooling", "2_Dense"  # folders of a sentence-transformers model


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
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
    max_tokens: int = 512  # of a classifier: longer texts are cut
    pair: bool = False  # of a classifier: it reads two texts
    chat: bool = False  # of a model that writes: prompts are made by the tokenizer's chat template
    template: str = "{prompt}"  # else what a prompt stands in
    starts: bool = False  # and whether the begin-of-text token stands before it
    ends: Sequence[int] = ()  # tokens that end what is written
    stops: Sequence[str] = ()  # texts at which it is cut where none of them came

    @property
    def is_local(self) -> bool:
        """Returns whether others know the base by no name: it is a folder on this machine."""
        return Path(self.shared_name).is_dir()

    @property
    def averages(self) -> bool:
        """Returns whether logits are averaged over a text's tokens."""
        return self.task_type == "TOKEN_CLS"


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


def lora_files(factors: Mapping[str, Factors], head: Tensors, base: BaseModelInfo, card: str) -> dict[str, bytes]:
    """Returns the files of a plain LoRA adapter folder that PEFT reads, by name, and its model card."""
    return {
        "adapter_model.safetensors": save(lora_tensors(factors, head), metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(lora_config(factors, base), indent=2, sort_keys=True, default=str).encode(),
        "README.md": card.encode(),
    }


def lora_config(factors: Mapping[str, Factors], base: BaseModelInfo) -> dict[str, Any]:
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
    """Returns what a user of the adapter needs beside its weights, by name: the tokenizer and, for a classifier, the
    base model's config with the classes.

    A config.json also keeps `pipeline(task, model=folder)` of transformers from loading the adapter: without one it
    loads the base with a config that does not know the classes, and with mean pooling under a random head.
    """
    with TemporaryDirectory(prefix="fedsb.") as folder:
        ready_tokenizer(tokenizer, base).save_pretrained(folder)
        if base.label_names:
            labelled_config(config, base).save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def ready_tokenizer(tokenizer: Any, base: BaseModelInfo) -> Any:
    """Returns a copy of the tokenizer that pads, and cuts a classifier's texts, as in training."""
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
    if hasattr(labelled, "quantization_config"):  # said where the base is loaded
        del labelled.quantization_config
    return labelled


def try_adapter(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    wanted: Tensor,
    factors: Mapping[str, Factors],
    head: Tensors,
    base: BaseModelInfo,
) -> float:
    """Writes an adapter to a temporary folder, loads it with PEFT onto the bare base and compares, as `check_adapter`.

    Needs no training: with factors of zeros, `wanted` are the base's own logits.
    """
    with TemporaryDirectory(prefix="fedsb.") as folder:
        for name, content in lora_files(factors, head, base, "").items():
            Path(folder, name).write_bytes(content)
        return check_adapter(Path(folder), model, inputs, wanted, factors, base)


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
    base: BaseModelInfo,
) -> float:
    """Loads the adapter with PEFT onto the bare base and compares it with what was trained.

    Compared are the change of every layer's weight, in float32, and the logits, where the base is float32: on another
    the logits of two right adapters differ by rounding. Returns the largest relative difference of a layer's change.
    The model is given back without the adapter, but with its head, as PEFT leaves it.
    Raises:
        UserError: PEFT has no LoRA for one of the layers. The message names the layer.
        RunError: the files cannot be read, or a difference is above TOLERANCE or LOGITS_TOLERANCE.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():  # PEFT asks it
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
            _relative(modules[layer].get_delta_weight("default"), _stored(factor.scale * factor.B @ factor.A, base))
            for layer, factor in factors.items()
        ]
        difference = float(torch.tensor(by_layer).max())  # NaN where one is
        faults = [] if difference <= TOLERANCE else [f"the change of a layer differs by {difference:.2g}"]
        if all(p.dtype == torch.float32 for p in model.parameters()):
            logits = _relative(loaded(**inputs).logits, wanted)
            faults += [] if logits <= LOGITS_TOLERANCE else [f"logits differ by {logits:.2g}"]
    finally:
        loaded.unload()
    if faults:
        raise RunError(
            f"the adapter in {folder}, loaded by PEFT, is not the trained model: {' and '.join(faults)} of the largest "
            "value; this is a defect of fedsb, please report it with `fedsb env`"
        )
    return difference


def _names(error: Exception, layer: str) -> bool:
    return layer.rsplit(".", 1)[-1] in str(error)


def _refused_by_peft(folder: Path, layers: Sequence[str], error: Exception | None) -> UserError:
    """Returns the error for layers that PEFT does not adapt, with its own words where it has some."""
    named = ", ".join(map(repr, layers[:3])) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    what = f"the layer{'s' if len(layers) > 1 else ''} {named}" if layers else f"the adapter in {folder}"
    said = f": {error}" if error is not None else ", and leaves the base model as it is there."
    return UserError(
        f"PEFT loads no LoRA on {what}{said} Leave such layers out in a new run with model.target_modules, for example "
        '--set \'model.target_modules=["q_proj", "v_proj"]\''
    )


def _relative(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.float().cpu()
    return float((got.float().cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _stored(delta: Tensor, base: BaseModelInfo) -> Tensor:
    """A change (m, n) as the base stores its weights."""
    return delta.T if base.conv1d else delta


def merge(base: BaseModelInfo, adapter: Path, folder: Path, tokenizer: Any) -> BaseModelInfo:
    """Writes the base with the adapter merged into its weights, and the tokenizer, as an ordinary model folder.

    With mean pooling the folder is one of sentence-transformers. Returns `base` with the end tokens of the base model's
    own generation config added. Raises UserError where `merged_plan` says that there is no such folder.
    """
    import transformers
    from peft import PeftModel

    labels: dict[str, Any] = (
        {"num_labels": len(base.label_names), "ignore_mismatched_sizes": True} if base.label_names else {}
    )
    model = getattr(transformers, base.auto_class).from_pretrained(
        base.name, revision=base.revision, trust_remote_code=False, **labels
    )
    available, why = merged_plan(base, model.eval())
    if not available:
        raise UserError(f"--merged: {why}. Export the adapter, without --merged. Its README shows how to load it")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    ready = ready_tokenizer(tokenizer, base)
    if base.averages:
        _write_averaging(base, merged.eval(), ready, folder)
        return base
    if base.label_names:
        merged.config = labelled_config(merged.config, base)
    elif base.task_type == "CAUSAL_LM":
        own = merged.generation_config.eos_token_id
        named = own if isinstance(own, list) else [] if own is None else [own]
        base = replace(base, ends=sorted({*base.ends, *named}))
        merged.generation_config = _ending(merged.generation_config, base, ready.pad_token_id)
    merged.save_pretrained(folder)
    ready.save_pretrained(folder)
    return base


@torch.no_grad()
def merged_plan(base: BaseModelInfo, model: Any) -> tuple[bool, str]:
    """Returns whether the adapter can be merged into this base model, and into what, or why not.

    A classifier that averages its tokens' logits must be one linear layer on the encoder's last states: the mean of the
    logits is then that layer of the mean of the states.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return (
            False,
            f"the weights of {base.name} are stored quantised, and an adapter is merged into unquantised ones only",
        )
    if not base.averages:
        return True, "an ordinary model folder"
    encoder, ids = model.base_model, torch.arange(1, 5, device=model.device).unsqueeze(0)
    heads = _heads(model)
    try:
        plain = len(heads) == 1 and isinstance(heads[0], nn.Linear)
        plain = plain and _relative(heads[0](encoder(ids)[0]), model(ids).logits) <= TOLERANCE
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        plain = False  # an encoder that cannot be called by itself
    if plain:
        return True, "a folder of sentence-transformers: no class of transformers averages a classifier's logits"
    return False, (
        f"task.pooling = 'mean' is not available for a model of the type {model.config.model_type!r}: its classifier "
        "has more than one layer, and no format that others load averages its logits"
    )


def _heads(model: Any) -> list[nn.Module]:
    """Returns the parts of a model outside its encoder that have parameters."""
    return [part for part in model.children() if part is not model.base_model and any(True for _ in part.parameters())]


def _ending(settings: Any, base: BaseModelInfo, pad_token: int | None) -> Any:
    """Returns a copy of a generation config that stops at the end tokens of `base`.

    A config that contradicts itself, which transformers does not save, is replaced by one without its sampling.
    """
    from transformers import GenerationConfig

    ending = copy.deepcopy(settings)
    try:
        ending.validate(strict=True)
    except ValueError:
        ending = GenerationConfig(bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id)
    ending.eos_token_id = list(base.ends) or None
    ending._from_model_config = False  # else transformers may take the end token of config.json instead
    ending.pad_token_id = settings.pad_token_id if settings.pad_token_id is not None else pad_token
    return ending


@torch.no_grad()
def _write_averaging(base: BaseModelInfo, model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a token classifier, of which `merged_plan` approves, as an encoder, a masked mean and a linear layer."""
    from transformers import AutoModel

    encoder, kind, (head,) = model.base_model, model.config.model_type, _heads(model)
    assert isinstance(head, nn.Linear)
    whole = AutoModel.from_pretrained(  # with a pooler, where the base has one
        base.name, revision=base.revision, trust_remote_code=False
    )
    if strange := whole.load_state_dict(encoder.state_dict(), strict=False).unexpected_keys:
        raise RunError(f"the encoder of a {kind} model has no tensor {strange[0]!r}; please report it with `fedsb env`")
    whole.save_pretrained(folder / ENCODER)
    tokenizer.save_pretrained(folder / ENCODER)
    (m, n), dense = head.weight.shape, "torch.nn.modules.linear.Identity"
    types = ((ENCODER, "Transformer"), (POOLING, "Pooling"), (DENSE, "Dense"))
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(types)
        ],
        f"{ENCODER}/sentence_bert_config.json": {"max_seq_length": base.max_tokens, "do_lower_case": False},
        f"{POOLING}/config.json": {"word_embedding_dimension": n, "pooling_mode_mean_tokens": True},
        f"{DENSE}/config.json": {
            "in_features": n,
            "out_features": m,
            "bias": head.bias is not None,
            "activation_function": dense,
        },
        "labels.json": list(base.label_names),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    tensors = {f"linear.{name}": tensor.contiguous() for name, tensor in head.state_dict().items()}
    (folder / DENSE / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def has_conv1d(layers: Mapping[str, Any]) -> bool:
    return any(is_conv1d(layer.base) for layer in layers.values())
