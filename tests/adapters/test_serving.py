"""What vLLM and llama.cpp will make of an adapter, rule by rule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, set_all, write_rows
from fedsb.adapters.serving import LORA_RANKS, max_lora_rank, serving, serving_lines
from fedsb.config.load import load_config
from fedsb.runs.run import federate

PLAIN: dict[str, Any] = {
    "r": 24,
    "task_type": "CAUSAL_LM",
    "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"],
    "modules_to_save": None,
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
}
MERGE = "; merge it: fedsb export RUN --to DIR --merged"


def test_layers_named_by_their_parameter_count_too() -> None:
    both = PLAIN | {"target_modules": [], "target_parameters": ["model.layers.1.mlp.strange_proj.weight"]}
    assert all("not known for the layer strange_proj" in server.says for server in serving(both, "llama"))


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
def test_a_plain_adapter_loads_in_both(model: str) -> None:
    vllm, gguf = serving(PLAIN, model)
    assert (vllm.name, vllm.loads, gguf.name, gguf.loads) == ("vLLM", True, "llama.cpp", True)
    assert "--max-lora-rank 32 " in vllm.says and gguf.says == "convert_lora_to_gguf.py --base BASE DIR"
    both = [dataclasses.asdict(server) for server in (vllm, gguf)]
    assert serving_lines(both, only_doubts=True) == []
    assert serving_lines(both)[1] == "llama.cpp: convert_lora_to_gguf.py --base BASE DIR"


@pytest.mark.parametrize(
    ("changed", "model", "vllm", "gguf"),
    [
        ({"r": 512}, "llama", True, True),
        ({"r": 513}, "llama", f"rank 513 is above 512{MERGE}", True),
        ({"modules_to_save": ["lm_head"]}, "llama", f"modules_to_save = ['lm_head']{MERGE}", "vllm's"),
        ({"use_dora": True, "bias": "all"}, "llama", f"use_dora = True; bias = 'all'{MERGE}", "vllm's"),
        (
            {"fan_in_fan_out": True, "target_modules": ["h.0.attn.c_attn"]},
            "gpt2",
            f"no LoRA for gpt2{MERGE}",
            f"the converter transposes gpt2's layers{MERGE}",
        ),
    ],
)
def test_what_is_refused_and_the_way_round(
    changed: dict[str, Any], model: str, vllm: bool | str, gguf: bool | str
) -> None:
    """Where it loads the rank is the first that vLLM has."""
    for server, wanted in zip(serving(PLAIN | changed, model), (vllm, vllm if gguf == "vllm's" else gguf), strict=True):
        assert server.loads is (wanted is True)
        assert wanted is True or server.says == wanted


@pytest.mark.parametrize(
    ("changed", "model", "says"),
    [
        ({}, "phi3", "not known for the architecture phi3"),
        ({"target_modules": ["a.qkv_proj", "b.qkv_proj", "o_proj"]}, "llama", "not known for the layer qkv_proj"),
        ({"target_modules": "lm_head"}, "gpt_neox", "not known for the architecture gpt_neox, the layer lm_head"),
    ],
)
def test_what_nobody_has_looked_at_is_said_so(changed: dict[str, Any], model: str, says: str) -> None:
    for server in serving(PLAIN | changed, model):
        assert server.loads is None and server.says == f"{says}; if it refuses{MERGE.replace(';', ',')}"
    lines = serving_lines([dataclasses.asdict(s) for s in serving(PLAIN | changed, model)], only_doubts=True)
    assert lines == [f"vLLM and llama.cpp may not load it: {says}; if it refuses{MERGE.replace(';', ',')}"]


def test_vllms_ranks() -> None:
    assert [max_lora_rank(rank) for rank in (1, 8, 9, 200, 256, 257, 512, 513)] == [8, 8, 16, 256, 256, 320, 512, None]
    assert sorted(LORA_RANKS) == list(LORA_RANKS)


def test_a_run_and_its_export_say_it(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    """A classifier in one plain line, a Llama without a doubt, GPT-2 with both and the way round; merged nothing."""
    texts = str(
        write_rows(tmp_path / "texts.jsonl", [{"text": "red1 blue2 red3 blue4", "client": i % 2} for i in range(40)])
    )
    data, task = {"train": texts, "test": texts}, {"kind": "text"}
    runs = {
        "classes": tiny_config,
        "llama": set_all(tiny_config, data=data, task=task, model={"name": str(tiny_llama), "max_seq_length": 8}),
        "gpt2": set_all(tiny_config, data=data, task=task, model={"name": str(tiny_gpt2), "max_seq_length": 8}),
    }
    for name, config in runs.items():
        folder = federate(load_config(set_all(config, name=name, rounds=1))).folder
        result = json.loads((folder / "result.json").read_text())
        card, said = (folder / "adapter" / "README.md").read_text(), cli("report", folder).out
        found = json.loads(cli("export", folder, "--to", tmp_path / name, "--json").out)
        assert found["serving"] == result["serving"]
        shown = cli("export", folder, "--to", tmp_path / f"{name}-2").out
        line = " ".join(serving_lines(result["serving"])[0].split())
        assert line in card and line in " ".join(shown.split())
        match name:
            case "classes":
                assert "vLLM and llama.cpp will not load it: they serve causal language models" in said
            case "llama":
                assert [server["loads"] for server in result["serving"]] == [True, True]
                assert "elsewhere" not in said and "--max-lora-rank 8 " in card
            case "gpt2":
                assert [server["loads"] for server in result["serving"]] == [False, False]
                assert "--merged" in said and "no LoRA for gpt2" in card
    merged = json.loads(cli("export", folder, "--to", tmp_path / "merged", "--merged", "--json").out)
    assert merged["serving"] == []
