"""Whether vLLM and llama.cpp will load an adapter, told from its files: what is refused there is known here already.

Read from their code, for neither is installed here: vLLM (lora/peft_helper.py, lora/lora_model.py, config/lora.py)
takes LoRA alone, of rank 512 at most, for architectures that support it; llama.cpp's convert_lora_to_gguf.py stops at
any tensor that is no lora_A or lora_B, and turns GPT-2's layers around as if they were weights. Both serve causal
language models. Architectures and layers that are not in the lists below may load: nobody has looked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank may be, and has kernels for
USUAL_RANK = 16  # vLLM's own max_lora_rank
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")  # of which both are known
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # theirs
MERGE = "merge it: fedsb export RUN --to DIR --merged"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a server makes of an adapter."""

    name: str
    loads: bool | None  # None: not known
    says: str  # why not, or how


def serving(config: Mapping[str, Any], model_type: str) -> tuple[Serving, ...]:
    """vLLM's and llama.cpp's view of an adapter_config.json, on a base of that `model_type` (of its config.json)."""
    rank, names = int(config["r"]), config["target_modules"]
    names = [names] if isinstance(names, str) else [*names]
    names += [name.removesuffix(".weight") for name in config.get("target_parameters") or ()]
    layers = sorted({name.rsplit(".", 1)[-1] for name in names})
    if config["task_type"] != "CAUSAL_LM":
        only = "they serve causal language models, and this adapter has a task head: load it with PEFT"
        return tuple(Serving(name=name, loads=False, says=only) for name in ("vLLM", "llama.cpp"))
    common = [f"{key} = {config[key]!r}" for key in ("modules_to_save", "use_dora") if config.get(key)]
    common += [f"bias = {config['bias']!r}"] if config.get("bias", "none") != "none" else []
    room = max_lora_rank(rank)
    vllm = [*common, *([f"rank {rank} is above {LORA_RANKS[-1]}"] if room is None else [])]
    gguf = list(common)
    if config.get("fan_in_fan_out"):
        vllm.append(f"no LoRA for {model_type}")
        gguf.append(f"the converter turns {model_type}'s layers around")
    strange = [] if model_type in ARCHITECTURES else [f"the architecture {model_type}"]
    strange += [f"the layer {layer}" for layer in layers if layer not in LAYERS]
    return (
        _verdict(
            "vLLM", vllm, strange, f"vllm serve BASE --enable-lora --max-lora-rank {room} --lora-modules NAME=DIR"
        ),
        _verdict("llama.cpp", gguf, strange, "convert_lora_to_gguf.py --base BASE DIR"),
    )


def serving_lines(servers: Sequence[Mapping[str, Any]], *, only_doubts: bool = False) -> list[str]:
    """A line for each thing to say of the servers (as dicts); `only_doubts` leaves out what loads."""
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
    """The smallest max_lora_rank that vLLM takes for an adapter of that rank; None where there is none."""
    return next((known for known in LORA_RANKS if known >= rank), None)


def _verdict(name: str, refused: Sequence[str], strange: Sequence[str], how: str) -> Serving:
    if refused:
        return Serving(name=name, loads=False, says=f"{'; '.join(refused)}; {MERGE}")
    if strange:
        return Serving(name=name, loads=None, says=f"not known for {', '.join(strange)}; if it refuses, {MERGE}")
    return Serving(name=name, loads=True, says=how)
