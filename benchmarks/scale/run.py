"""Measures a whole run of a language model by phase, and compares it with the estimate of `fedsb check`.

    python benchmarks/scale/run.py [--size 1.2B] [--label new] [--set KEY=VALUE ...]     writes results.json, table.md
    python benchmarks/scale/run.py --size 7B --gpu 80                                    an estimate alone

The model has the shape of its size, random weights in bfloat16, and the tokenizer of SmolLM2. Two clients train a core
of rank 64 for two rounds of five steps, with made-up rows that fill 64 tokens. Memory is the peak of each phase.
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
from fedsb.utils.formatting import bytes_text, seconds_text

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
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32_000,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
        "vocab_size": 128_256,
    },
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


def make_model(folder: Path, size: str, *, weights: bool) -> None:
    """Writes a Llama with SmolLM2's tokenizer, and with random weights in bfloat16 or without any."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_name("smollm2")[0])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    pad, name = tokenizer.pad_token_id, "LlamaForCausalLM"
    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, pad_token_id=pad, architectures=[name])
    config.save_pretrained(folder)
    if weights:
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(folder: Path) -> None:
    words = TEXT.split()
    for name, count in (("train", 64), ("test", 16)):
        rows = [{"text": " ".join(words[(i + j) % len(words)] for j in range(80))} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def fedsb(folder: Path, *words: str) -> str:
    """Returns what a command said. Its cache is empty, so that a basis is computed."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-m", "fedsb", *words], cwd=folder, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def measure(size: str, settings: list[str], gpu: float | None) -> dict[str, Any]:
    """Returns the phases of a run, and what `check` says of it; for a GPU that is not here, the latter alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pid = os.fork()  # so that the memory of making the model is not this process's
        if not pid:
            make_model(folder / "model", size, weights=gpu is None)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("the model was not made")
        make_rows(folder)
        (folder / "run.toml").write_text(SETTINGS)
        words = ["run.toml", *(word for setting in settings for word in ("--set", setting))]
        said = json.loads(fedsb(folder, "check", "--json", *words, *([] if gpu is None else ["--gpu", f"{gpu:g}"])))
        phases = said.get("phases", {})
        found = {"estimated": {k: (v["seconds"], v["memory_bytes"]) for k, v in phases.items()}}
        found |= {"speed": said["seconds_reason"], "warnings": said["warnings"]}
        if gpu is None:
            fedsb(folder, "run", *words)
            measured = json.loads((folder / "runs/run/result.json").read_bytes())["phases"]
            found["measured"] = {k: (v["seconds"], v["peak_memory_bytes"]) for k, v in measured.items()}
        return found


def table(runs: dict[str, Any]) -> str:
    lines = ["| run | " + " | ".join(PHASES) + " | all | before round 1 |", "|---" * (len(PHASES) + 3) + "|"]
    for name, run in runs.items():
        for kind in ("measured", "estimated"):
            if phases := run.get(kind):
                cells = [f"{seconds_text(phases[key][0])}, {bytes_text(phases[key][1])}" for key in PHASES]
                total = sum(seconds for seconds, _ in phases.values())
                early = sum(phases[phase][0] for phase in ("load", "basis", "captured share"))
                row = (f"{name}, {kind}", *cells, seconds_text(total), f"{early / total:.0%}")
                lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


PHASES = ("load", "basis", "captured share", "scores", "rounds", "export")


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--size", choices=SIZES, default="1.2B")
    words.add_argument("--label", default="")
    words.add_argument("--set", action="append", default=[])
    words.add_argument("--gpu", type=float)
    given = words.parse_args()
    path = HERE / "results.json"
    kept = json.loads(path.read_bytes()) if path.exists() else {"runs": {}}
    name = f"{given.size}, {given.label}".removesuffix(", ")
    found = measure(given.size, given.set, given.gpu)
    kept["runs"][name] = {**found, "commit": git_hash(), "set": given.set}
    kept["machine"] = describe_machine()
    path.write_text(json.dumps(kept, indent=1))
    (HERE / "table.md").write_text(table(kept["runs"]) + "\n")
    print(table({name: found}))


if __name__ == "__main__":
    main()
