"""Counts the kernels and the host's waits of a training step, against PEFT's LoRA with fused AdamW.

    python benchmarks/training_step/count.py        writes count.json and count.md

A Llama in bfloat16 trains on the accelerator that tests/support/accelerator.py pretends. The counts of 2 and of 4
blocks give those of one block, and so of 32. A step is a forward, a backward, the clip and the update of the optimiser.
That of fedsb is taken from the difference of rounds of 3 and of 8 steps. The clip and fused AdamW of PEFT are counted
as torch runs them on a GPU: one kernel for up to 36 (AdamW) or 110 (norm) tensors.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fedsb.utils.environment import describe_machine, git_hash

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
BLOCKS, TARGET = (2, 4), 32
STEPS = (3, 8)
ROWS = 96
RANK = 8
CASES: dict[str, dict[str, Any]] = {
    "fed-sb": {"method": {"name": "fed-sb", "rank": RANK}},
    "fed-sb, 4 clients": {"method": {"name": "fed-sb", "rank": RANK}, "clients": {"partition": "iid", "count": 4}},
    "fedit": {"method": {"name": "fedit", "rank": RANK}},
    "fedit, 4 clients": {"method": {"name": "fedit", "rank": RANK}, "clients": {"partition": "iid", "count": 4}},
    "fed-sb, dropout": {"method": {"name": "fed-sb", "rank": RANK}, "train": {"dropout": 0.1}},
    "fed-sb, private": {
        "method": {"name": "fed-sb", "rank": RANK},
        "privacy": {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3},
        "train": {"batch_size": ROWS},  # every row in every step, so that steps are alike
    },
}


def llama(folder: Path, blocks: int) -> Path:
    """Returns the folder of a small Llama with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from conftest import save_model
    from support.architectures import WORDS

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS) + 3, num_hidden_layers=blocks, max_position_embeddings=64, **sizes)
    return save_model(folder, LlamaForCausalLM(config).bfloat16())


def fedsb_step(folder: Path, blocks: int, case: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Returns (kernels, waits) of one step, by line and operation."""
    from conftest import labelled_rows
    from support.accelerator import accelerator
    from support.architectures import write_rows
    from support.server import started

    rows = write_rows(folder / "rows.jsonl", labelled_rows(ROWS, 0))
    counts = []
    for steps in STEPS:
        config: dict[str, Any] = {
            "name": "counted",
            "out": str(folder),
            "model": {"name": str(llama(folder / "model", blocks)), "device": "pretend", "dtype": "bfloat16"},
            "data": {"train": str(rows)},
            "task": {"kind": "text"},
            "clients": {"partition": "iid", "count": 1},
            "basis": {"kind": "random", "share_samples": 0},
            **case,
            "train": {"local_steps": steps, "batch_size": 4, **case.get("train", {})},
        }
        with accelerator() as record, tempfile.TemporaryDirectory() as ledgers:
            server, state = started(config, Path(ledgers))
            state = server.run_round(state).state
            record.clear()
            server.run_round(state)
            counts.append((Counter(record.kernels), Counter(record.waits)))
    return _per_step(counts[0][0], counts[1][0]), _per_step(counts[0][1], counts[1][1])


def _per_step(few: Counter[str], many: Counter[str]) -> Counter[str]:
    found = Counter(many)
    found.subtract(few)
    return Counter({key: count / (STEPS[1] - STEPS[0]) for key, count in found.items() if count})


def peft_step(folder: Path, blocks: int, *, float32: bool) -> tuple[Counter[str], Counter[str]]:
    """Returns (kernels, waits) of one step of a plain loop with PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from support.accelerator import accelerator

    with accelerator() as record:
        model = AutoModelForCausalLM.from_pretrained(llama(folder / "model", blocks), dtype=torch.bfloat16)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=float32).to("pretend")
        trained = [p for p in adapted.parameters() if p.requires_grad]
        ids = torch.randint(3, 40, (4, 16)).to("pretend")
        for _ in range(2):
            record.clear()
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            for p in trained:
                p.grad = None
        kernels = Counter(record.kernels)
    count = len(trained)
    kernels["clip_grad_norm_"] = 2 * math.ceil(count / 110) + 6
    kernels["fused AdamW"] = math.ceil(count / 36) + math.ceil(count / 110)
    return kernels, Counter(record.waits)


def extrapolated(counts: list[Counter[str]]) -> float:
    """Returns the sum at TARGET blocks."""
    small, large = (sum(count.values()) for count in counts)
    return small + (large - small) / (BLOCKS[1] - BLOCKS[0]) * (TARGET - BLOCKS[0])


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = {f"PEFT LoRA, {kind} adapters": [peft_step(folder, b, float32=f) for b in BLOCKS]
                    for kind, f in (("float32", True), ("bfloat16", False))}  # fmt: skip
        measured |= {case: [fedsb_step(folder, b, settings) for b in BLOCKS] for case, settings in CASES.items()}
    for case, counts in measured.items():
        kernels, waits = ([each[i] for each in counts] for i in (0, 1))
        found[case] = {"kernels": round(extrapolated(kernels)), "waits": round(extrapolated(waits), 2)}
        print(case, found[case], flush=True)
        if "--lines" in sys.argv:
            for key, count in kernels[1].most_common(40):
                print(f"    {count:7.1f} {key}")
    reference = found["PEFT LoRA, float32 adapters"]["kernels"]
    lines = ["| a step of 32 blocks | kernels | over PEFT's with float32 adapters | host waits |", "|---|---|---|---|"]
    lines += [f"| {c} | {f['kernels']} | {f['kernels'] / reference:.2f} | {f['waits']:g} |" for c, f in found.items()]
    (HERE / "count.md").write_text("\n".join(lines) + "\n")
    facts = {"commit": git_hash(), "machine": describe_machine(), "cases": found}
    (HERE / "count.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
