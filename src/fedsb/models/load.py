"""The base model: its source, dtype, device and task head, each choice with its reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedsb.config.inputs import ModelConfig
from fedsb.config.resolved import ResolvedSetting
from fedsb.models.activations import checkpoint_activations
from fedsb.models.devices import device_map
from fedsb.models.heads import find_fresh, find_head
from fedsb.models.hub import config_for_shapes, hub_errors, quiet, read_config
from fedsb.models.layers import is_inside
from fedsb.models.names import resolve_name, shared_name
from fedsb.models.quantise import choice as quantize_choice
from fedsb.models.quantise import count_values, loading_options, quantised_itself, quantization_keys, settle
from fedsb.utils.errors import UserError

CHANGES_NOTHING = {  # keys of a config.json that may differ between sites: names, versions, and site-specific choices
    "architectures",
    "dtype",
    "finetuning_task",
    "id2label",
    "label2id",
    "name_or_path",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A loaded model, before any adapter."""

    model: nn.Module
    name: str  # where it was loaded from: a folder or a Hub name
    shared_name: str  # the name for others: the Hub's name if it is certain, else `name`
    head: tuple[str, ...]  # modules to train in full
    pad_token: int | None  # that was set in the model; None if its own config names one, or it needs none
    model_type: str  # of its config.json
    parameters: int
    quantization: Mapping[str, Any]  # keys of BitsAndBytesConfig; empty: not quantised
    fingerprint: str  # of the weights; empty on the meta device
    choices: tuple[ResolvedSetting, ...]
    gathered_bytes: int = 0  # of a sharded model: the weights of other processes that a forward needs at once


@dataclass(kw_only=True)
class _Loaded:
    """A model as transformers loaded it."""

    model: Any
    quantization: dict[str, Any] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)  # parameters that the checkpoint lacks
    mismatched: Sequence[Any] = ()  # parameters whose shape differs in the checkpoint


def load_base(
    config: ModelConfig, *, auto_class: str, num_labels: int, pad_token: int | None, shapes_only: bool = False
) -> BaseModel:
    """Loads the base model for a task, frozen, in evaluation mode (its own dropout is off).

    Raises UserError for an unknown or gated model, a missing network, and weights that do not fit.

    Args:
        auto_class: the name of a transformers class, such as "AutoModelForCausalLM".
        num_labels: classes of the head; 0 without a head.
        pad_token: for models that need it to find the end of a text.
        shapes_only: builds the model on the meta device, from its config alone, without weights.
    """
    name, reason = resolve_name(config.name)
    device, device_reason = choose_device(config.device)
    dtype, dtype_reason = choose_dtype(config.dtype, device)
    labels: dict[str, Any] = {"num_labels": num_labels} if num_labels else {}
    shipped: str | None = None
    with quiet():
        if shapes_only:
            settings, shipped = config_for_shapes(name, config.revision, labels)
        else:
            settings = read_config(name, config.revision, labels)
        _refuse_encoder_decoder(settings, name, auto_class)
        settings.get_text_config().use_cache = False  # only generation needs one, and asks for it
        own_pad_token = _set_padding(settings, name, pad_token, classifier=bool(num_labels))
        with hub_errors(name):
            loaded = _load(config, name, settings, auto_class, dtype, None if shapes_only else device, num_labels > 0)
    model = loaded.model
    model.requires_grad_(False)
    model.eval()
    head, frozen = find_head(model) if num_labels else ((), ())
    _refuse_mismatch(loaded.mismatched, head, name)
    fresh = find_fresh(model, loaded.missing, head)
    if fresh and not num_labels:
        raise UserError(
            f"The checkpoint of {name!r} has no {fresh[0]!r}, so it is not one for {auto_class}. Choose a different "
            "model or task.kind."
        )
    if config.activation_checkpointing and not shapes_only:
        checkpoint_activations(model)
    quantised = quantize_choice(config.quantize, dtype)
    choices = [
        ResolvedSetting(key="model.name", value=name, reason=reason),
        ResolvedSetting(key="model.device", value=str(device), reason=device_reason),
        *(
            [ResolvedSetting(key="model.dtype", value=str(dtype).removeprefix("torch."), reason=dtype_reason)]
            if config.dtype == "auto"
            else []
        ),
        *([] if quantised is None else [quantised]),
        ResolvedSetting(
            key="model.head",
            value=", ".join([*head, *fresh]) or "none",
            reason="auto: the modules outside the base model" + (", or missing in its checkpoint" if fresh else ""),
        ),
    ]
    if shipped is not None:
        choices.append(ResolvedSetting(key="model.shapes", value=settings.model_type, reason=shipped))
    if frozen:
        choices.append(ResolvedSetting(key="model.frozen", value=", ".join(frozen), reason="auto: not linear layers"))
    return BaseModel(
        model=model,
        name=name,
        shared_name=shared_name(config.name, name),
        head=(*head, *fresh),
        pad_token=own_pad_token,
        model_type=settings.model_type,
        parameters=count_values(model),
        quantization=loaded.quantization,
        fingerprint="" if shapes_only else fingerprint(model, (*head, *fresh)),
        choices=tuple(choices),
    )


def _set_padding(settings: Any, name: str, pad_token: int | None, *, classifier: bool) -> int | None:
    """Sets the padding token in a model's config that names none. Returns it, or None if nothing was set."""
    named = getattr(settings.get_text_config(), "pad_token_id", None)
    if classifier and pad_token is not None and named is not None and 0 <= named != pad_token:
        raise UserError(
            f"The config of {name!r} pads with token {named}, its tokenizer with {pad_token}: a classifier would read "
            "padding as text. Make them agree in the model's folder (config.json, tokenizer_config.json)."
        )
    if pad_token is None or (named is not None and named >= 0):
        return None
    settings.get_text_config().pad_token_id = pad_token
    return pad_token


def _load(
    config: ModelConfig,
    name: str,
    settings: Any,
    auto_class: str,
    dtype: torch.dtype,
    device: torch.device | None,
    classifier: bool,
) -> _Loaded:
    """Loads the weights onto the device; without a device, builds the model on the meta device."""
    import transformers

    auto = getattr(transformers, auto_class)
    attention = {} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}
    keys: dict[str, Any] = {}
    if device is None or config.quantize != "none":
        with torch.device("meta"):
            model = auto.from_config(settings, dtype=dtype, **attention)
        keys = quantization_keys(config.quantize, model, find_head(model)[0] if classifier else (), dtype)
    if device is None:
        return _Loaded(model=model, quantization=keys)
    places = device_map(config, device)
    placed = bool(keys) or quantised_itself(settings) or config.placement == "balanced"
    model, info = auto.from_pretrained(
        name,
        revision=config.revision,
        config=settings,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused by _refuse_mismatch, with a clearer message
        trust_remote_code=False,
        **attention,
        **loading_options(keys, itself=quantised_itself(settings)),
        **({"device_map": places} if placed else {}),
    )
    if keys or quantised_itself(settings):
        settle(model)
    if not placed:
        model.to(device)
    missing, mismatched = set(info["missing_keys"]), info["mismatched_keys"]
    return _Loaded(model=model, quantization=keys, missing=missing, mismatched=mismatched)


def _refuse_encoder_decoder(settings: Any, name: str, auto_class: str) -> None:
    """Raises UserError for an encoder-decoder model in a next-token task."""
    if auto_class == "AutoModelForCausalLM" and getattr(settings, "is_encoder_decoder", False):
        raise UserError(
            f"{name!r} ({settings.model_type}) is an encoder-decoder model: it reads a text in one part and writes the "
            "answer in another, while this task's loss is on the next token of one text. Choose a decoder-only model "
            "(Llama, Qwen, Gemma, GPT-2). Classification accepts encoder-decoders for which transformers has a "
            "classifier."
        )


def _refuse_mismatch(mismatched: Sequence[Any], head: Sequence[str], name: str) -> None:
    """Raises UserError for tensors of a wrong size outside the head, whose weights are always drawn."""
    odd = [entry for entry in mismatched if not any(is_inside(entry[0], part) for part in head)]
    if odd:
        key, found, expected = odd[0]
        raise UserError(
            f"The weights of {name!r} do not fit its config.json: {key} is {tuple(found)} in the checkpoint and "
            f"{tuple(expected)} by the config ({len(odd)} such tensors). Use config.json and weights of one model."
        )


def config_facts(found: Any) -> Any:
    """Returns the parts of a model's config that determine its computation, without names, labels and versions."""
    if isinstance(found, Mapping):
        kept = {str(key): value for key, value in found.items()}
        return {k: config_facts(v) for k, v in kept.items() if k not in CHANGES_NOTHING and not k.startswith("_")}
    if isinstance(found, (list, tuple)):
        return [config_facts(value) for value in found]
    return found


def fingerprint(model: Any, head: tuple[str, ...]) -> str:
    """Returns a fingerprint of the frozen model: its config, and about a thousand values of each tensor."""
    facts = config_facts(model.config.to_dict())
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        if any(is_inside(name, part) for part in head):
            continue
        values = p.detach().flatten()[:: max(1, p.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:32]


def choose_device(name: str) -> tuple[torch.device, str]:
    """Returns (device, reason). Raises UserError for a device that this machine lacks."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), "auto: a CUDA device is available"
        return torch.device("cpu"), "auto: no CUDA device"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device, "as configured"


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns (dtype of the frozen base, reason). The adapter is always float32."""
    if name != "auto":
        return getattr(torch, name), "as configured"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "auto: half the memory, and the device computes in it"
    return torch.float32, f"auto: the fastest and most exact on {device.type}"


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets torch's precision of float32 products ("highest", "high", "medium") in the whole process.

    On GPUs "high" is TF32. On CPUs "medium" uses oneDNN: bfloat16 if the CPU multiplies matrices in it (AMX), else
    float32, which on AMD CPUs is twice as fast as the default but slows fused attention. Use "eager" attention with it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
