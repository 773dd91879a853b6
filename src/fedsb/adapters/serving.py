"""Predicts from an adapter's files whether vLLM and llama.cpp can load it.

The rules are taken from their code; neither is installed here. vLLM (lora/peft_helper.py, lora/lora_model.py,
config/lora.py) supports plain LoRA up to rank 512, for certain architectures. llama.cpp's convert_lora_to_gguf.py stops
at any tensor that is not a lora_A or lora_B, and transposes GPT-2's layers as if they were weights. Both serve causal
language models only. Architectures and layers that are not listed below may load; this was not checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of max_lora_rank for which vLLM has kernels
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")  # supported by both
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of these architectures
MERGE = "merge it: fedsb export RUN --to DIR --merged"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A statement whether an inference server can load an adapter."""

    name: str
    loads: bool | None  # None: unknown
    says: str  # the reason, or the command


def serving(config: Mapping[str, Any], model_type: str) -> tuple[Serving, ...]:
    """Returns the results for vLLM and llama.cpp, from an adapter_config.json and the `model_type` of the base."""
    rank, names = int(config["r"]), config["target_modules"]
    names = [names] if isinstance(names, str) else [*names]
    names += [name.removesuffix(".weight") for name in config.get("target_parameters") or ()]
    layers = sorted({name.rsplit(".", 1)[-1] for name in names})
    if config["task_type"] != "CAUSAL_LM":
        only = "they serve causal language models, and this adapter has a task head: load it with PEFT"
        return tuple(Serving(name=name, loads=False, says=only) for name in ("vLLM", "llama.cpp"))
    common = [f"{key} = {config[key]!r}" for key in ("modules_to_save", "use_dora") if config.get(key)]
    common += [f"bias = {config['bias']!r}"] if config.get("bias", "none") != "none" else []
    max_rank = max_lora_rank(rank)
    vllm = [*common, *([f"rank {rank} is above {LORA_RANKS[-1]}"] if max_rank is None else [])]
    gguf = list(common)
    if config.get("fan_in_fan_out"):
        vllm.append(f"no LoRA for {model_type}")
        gguf.append(f"the converter transposes {model_type}'s layers")
    strange = [] if model_type in ARCHITECTURES else [f"the architecture {model_type}"]
    strange += [f"the layer {layer}" for layer in layers if layer not in LAYERS]
    return (
        _verdict(
            "vLLM", vllm, strange, f"vllm serve BASE --enable-lora --max-lora-rank {max_rank} --lora-modules NAME=DIR"
        ),
        _verdict("llama.cpp", gguf, strange, "convert_lora_to_gguf.py --base BASE DIR"),
    )


def serving_lines(servers: Sequence[Mapping[str, Any]], *, only_doubts: bool = False) -> list[str]:
    """Returns a line for each result (as a dict); `only_doubts` leaves out the servers that can load the adapter."""
    said: dict[tuple[bool | None, str], list[str]] = {}
    for server in servers:
        said.setdefault((server["loads"], server["says"]), []).append(server["name"])
    states = {True: "", False: "will not load it: ", None: "may not load it: "}
    return [
        f"{' and '.join(names)}{' ' if loads is not True else ': '}{states[loads]}{says}"
        for (loads, says), names in said.items()
        if not (loads and only_doubts)
    ]


def max_lora_rank(rank: int) -> int | None:
    """Returns the smallest max_lora_rank of vLLM for an adapter of this rank; None if the rank is too large."""
    return next((known for known in LORA_RANKS if known >= rank), None)


def _verdict(name: str, refused: Sequence[str], strange: Sequence[str], how: str) -> Serving:
    if refused:
        return Serving(name=name, loads=False, says=f"{'; '.join(refused)}; {MERGE}")
    if strange:
        return Serving(name=name, loads=None, says=f"not known for {', '.join(strange)}; if it refuses, {MERGE}")
    return Serving(name=name, loads=True, says=how)
