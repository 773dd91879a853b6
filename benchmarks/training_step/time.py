"""Measures the CPU time of a training step, and the activations that it saves, against PEFT's LoRA.

    python benchmarks/training_step/time.py        writes time.json and time.md, in about ten minutes

The models are the real SmolLM2-135M (next token, 4 x 128 tokens) and MiniLM (classification, 8 x 64 tokens), with
adapters on all linear layers of the blocks. A step is collating, a forward, a backward, the clip and AdamW. For fedsb
it is a step inside a round of joint training. For PEFT it is a plain loop with fused AdamW over a batch that is
collated before. With 8 clients, a joint step of fedsb is compared with 8 steps of PEFT, each on as many rows as a
client has; two of them are run and counted four times.

The two sides take turns in one process: a step of fedsb, steps of PEFT, and so on. The ratio is the median of the
ratios of neighbours. Seconds are CPU time of one thread, which depends little on what else runs on the machine. Saved
activations are the storages that autograd keeps for the backward pass, each counted once, without the tensors of the
model and the adapter.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sides import FedsbSide, PeftSide, examples_of, saved_activations

from fedsb.config.inputs import ModelConfig
from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.methods.base import Method
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT
from fedsb.models.load import load_base
from fedsb.models.tokenizer import load_tokenizer
from fedsb.utils.environment import describe_machine, git_hash

HERE = Path(__file__).parent
METHODS: dict[str, tuple[Method, int]] = {  # with the rank of PEFT's LoRA
    "fed-sb r 16": (FedSB(rank=16), 16),
    "fed-sb r 64": (FedSB(rank=64), 64),
    "fed-sb r 64, PEFT r 16": (FedSB(rank=64), 16),
    "fedit r 16": (FedIT(rank=16), 16),
}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {"task": "text", "rows": 4, "tokens": 128, "labels": []},
    "minilm": {"task": "classification", "rows": 8, "tokens": 64, "labels": ["a", "b", "c", "d", "e", "f"]},
}
SAME_RANK = ("fed-sb r 16", "fed-sb r 64", "fedit r 16")
CELLS: list[tuple[str, str, int, int, tuple[str, ...]]] = [  # model, dtype, clients, repeats, methods
    ("minilm", "float32", 1, 15, tuple(METHODS)),
    ("minilm", "float32", 8, 5, SAME_RANK),
    ("smollm2", "float32", 1, 5, SAME_RANK),
    ("smollm2", "bfloat16", 1, 5, SAME_RANK),
    ("smollm2", "float32", 8, 2, ("fed-sb r 16",)),
]
WARM_UP = 1
PEFT_STEPS = 2  # between two steps of fedsb


class Pair:
    """A method of fedsb and PEFT's LoRA on one model, each with its own copy of it."""

    def __init__(self, name: str, dtype: str, clients: int, method: Method, rank: int) -> None:
        facts = MODELS[name]
        config = ModelConfig(name=name, dtype=dtype, device="cpu", max_seq_length=facts["tokens"])
        tokenizer = load_tokenizer(config)
        options = TaskOptions()
        self.task = open_task(facts["task"], tokenizer=tokenizer, options=options, max_tokens=facts["tokens"])
        self.task.label_names = facts["labels"]
        self.rows = [examples_of(self.task, facts["rows"], facts["tokens"], seed) for seed in range(clients)]
        mine, others = (
            load_base(config, auto_class=self.task.auto_class, num_labels=len(facts["labels"]), pad_token=None)
            for _ in range(2)
        )
        self.fedsb = FedsbSide(mine.model, self.task, method, head=mine.head)
        self.peft = PeftSide(others.model, self.task, rank=rank, head=others.head)
        self.batch = self.peft.batch_of(self.rows[0])

    def seconds(self, repeats: int) -> tuple[list[float], list[float]]:
        """Returns the CPU seconds of each step of fedsb, and of the same work with PEFT after it."""
        own: list[float] = []
        theirs: list[float] = []
        started = 0.0

        def between() -> None:
            nonlocal started
            now = time.process_time()
            own.append(now - started)
            steps = min(len(self.rows), PEFT_STEPS)
            for _ in range(steps):
                self.peft.step(self.batch)
            started = time.process_time()
            theirs.append((started - now) * len(self.rows) / steps)

        self.fedsb.train(self.rows, WARM_UP + repeats + 1, between)
        return own[1 + WARM_UP :], theirs[1 + WARM_UP :]  # the first entry is the start of the round

    def saved_bytes(self) -> tuple[int, int]:
        """Returns the bytes that autograd saves in a step of fedsb, and in one of PEFT."""
        with saved_activations(self.fedsb.frozen) as own:
            self.fedsb.train(self.rows, 1)
        with saved_activations(self.peft.frozen) as theirs:
            self.peft.step(self.batch)
        return sum(own.values()), sum(theirs.values())


def measure(name: str, dtype: str, clients: int, repeats: int, method: str) -> dict[str, Any]:
    pair = Pair(name, dtype, clients, *METHODS[method])
    own_bytes, their_bytes = pair.saved_bytes()
    own, theirs = pair.seconds(repeats)
    ratios = sorted(a / b for a, b in zip(own, theirs, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "commit": git_hash(),
        "model": name,
        "dtype": dtype,
        "clients": clients,
        "method": method,
        "repeats": len(own),
        "seconds": round(statistics.median(own), 4),
        "peft_seconds": round(statistics.median(theirs), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "saved_bytes": own_bytes,
        "peft_saved_bytes": their_bytes,  # of one of its steps, whatever the number of clients
        "saved_ratio": round(own_bytes / (their_bytes * clients), 3),
    }


def table(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | dtype | clients | method | step, s | PEFT, s | ratio (quartiles) | saved, MiB | PEFT, MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        low, high = c["ratio_quartiles"]
        saved, theirs = c["saved_bytes"] / 2**20, c["peft_saved_bytes"] * c["clients"] / 2**20
        lines.append(
            f"| {c['model']} | {c['dtype']} | {c['clients']} | {c['method']} | {c['seconds']:.3f} | "
            f"{c['peft_seconds']:.3f} | {c['ratio']:.2f} ({low:.2f} to {high:.2f}) | {saved:.0f} | {theirs:.0f} | "
            f"{c['saved_ratio']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="a part of cells' names, such as 'minilm float32 8'; the others are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name, dtype, clients, repeats, methods in CELLS:
        for method in methods:
            if given.only and given.only not in f"{name} {dtype} {clients} {method}":
                continue
            cell = measure(name, dtype, clients, repeats, method)
            print(table([cell])[-1], flush=True)
            gc.collect()
            write(cell)


def cell_name(cell: dict[str, Any]) -> str:
    return " ".join(str(cell[key]) for key in ("model", "dtype", "clients", "method"))


def write(cell: dict[str, Any]) -> None:
    """Writes a cell to the others, in the order of CELLS, each with the commit at which it was measured."""
    known = json.loads((HERE / "time.json").read_text())["cells"] if (HERE / "time.json").exists() else []
    done = {cell_name(each): each for each in [*known, cell]}
    names = [" ".join((c[0], c[1], str(c[2]), method)) for c in CELLS for method in c[4]]
    cells = [done[name] for name in names if name in done]
    machine = describe_machine()
    facts = {"machine": machine, "threads": 1, "cells": cells}
    (HERE / "time.json").write_text(json.dumps(facts, indent=1) + "\n")
    commits = ", ".join(dict.fromkeys(cell["commit"] for cell in cells))
    said = f"Commits {commits}, {machine['machine']}, {machine['cores']} cores, one thread, torch {machine['torch']}, "
    said += (
        f"peft {machine['peft']}. PEFT's LoRA has the method's rank, unless a different one is named. See time.py for "
    )
    said += "what is measured."
    (HERE / "time.md").write_text("\n".join([*table(cells), "", said]) + "\n")


if __name__ == "__main__":
    main()
