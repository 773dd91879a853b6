"""Measures a whole run of a language model by phase: seconds, and memory at the peak.

    python benchmarks/scale/run.py [--size 1.2B] [--label new] [--set KEY=VALUE ...]     writes results.json, table.md

The model has the shape of its size, random weights in bfloat16, and the tokenizer of SmolLM2. Two clients train a core
of rank 64 for two rounds of five steps, with made-up rows that fill 64 tokens. The estimate of `fedsb check` is kept
with the measured figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedsb.models.names import resolve_name
from fedsb.utils.environment import describe_machine, git_hash
from fedsb.utils.formatting import bytes_text

HERE = Path(__file__).parent
LAYERS = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
SIZES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "1.2B": {**LAYERS, "num_hidden_layers": 16, "vocab_size": 128_256, "head_dim": 64, "tie_word_embeddings": True},
}
TEXT = "the patient was given two doses of the drug and the fever went down after one day"
SETTINGS = """
name = "run"
out = "runs"
rounds = 2
seed = 0

[model]
name = "model"
max_seq_length = 64

[task]
kind = "text"

[data]
train = "train.jsonl"
test = "test.jsonl"

[clients]
partition = "iid"
count = 2

[method]
name = "fed-sb"
rank = 64

[train]
local_steps = 5
batch_size = 2
lr = 1e-3

[eval]
batch_size = 8
"""


def make_model(folder: Path, size: str) -> None:
    """Writes a Llama with random weights in bfloat16, and SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_name("smollm2")[0])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(folder: Path) -> None:
    words = TEXT.split()
    for name, count in (("train", 64), ("test", 16)):
        rows = [{"text": " ".join(words[(i + j) % len(words)] for j in range(80))} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def fedsb(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fedsb", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def measure(size: str, settings: list[str]) -> dict[str, Any]:
    """Returns the phases of a run, and what `check` says of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pid = os.fork()  # so that the memory of making the model is not this process's
        if not pid:
            make_model(folder / "model", size)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("the model was not made")
        make_rows(folder)
        (folder / "run.toml").write_text(SETTINGS)
        words = ["run.toml", *(word for setting in settings for word in ("--set", setting))]
        said = json.loads(fedsb(folder, "check", "--json", *words))
        fedsb(folder, "run", *words)
        result = json.loads((folder / "runs/run/result.json").read_bytes())
        manifest = json.loads((folder / "runs/run/manifest.json").read_bytes())
        return {
            "phases": result["phases"],
            "preflight": next(found["value"] for found in manifest["settings"] if found["key"] == "preflight"),
            "check": {"phases": said.get("phases"), "memory_bytes": said["memory_bytes"], "seconds": said["seconds"]},
        }


def table(found: dict[str, Any]) -> str:
    lines = ["| run | " + " | ".join(PHASES) + " | all | before round 1 |", "|---" * (len(PHASES) + 3) + "|"]
    for name, run in found.items():
        phases = run["phases"]
        cells = [
            f"{phases[phase]['seconds']:.0f} s, {bytes_text(phases[phase]['peak_memory_bytes'])}" for phase in PHASES
        ]
        total = sum(phase["seconds"] for phase in phases.values())
        early = sum(phases[phase]["seconds"] for phase in ("load", "basis", "captured share"))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {total:.0f} s | {early / total:.0%} |")
    return "\n".join(lines)


PHASES = ("load", "basis", "captured share", "scores", "rounds", "export")


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--size", choices=SIZES, default="1.2B")
    words.add_argument("--label", default="")
    words.add_argument("--set", action="append", default=[])
    given = words.parse_args()
    path = HERE / "results.json"
    kept = json.loads(path.read_bytes()) if path.exists() else {"runs": {}}
    name = f"{given.size}, {given.label}".removesuffix(", ")
    found = measure(given.size, given.set)
    kept["runs"][name] = {**found, "commit": git_hash(), "set": given.set}
    kept["machine"] = describe_machine()
    path.write_text(json.dumps(kept, indent=1))
    (HERE / "table.md").write_text(table(kept["runs"]) + "\n")
    print(table({name: found}))


if __name__ == "__main__":
    main()
