"""Every architecture through a whole run: task x privacy x merged export, on tiny random models.

    python benchmarks/architectures/run.py [--only bert,gpt2] [--out FOLDER]

A cell is "ok", "refused" with the reason (before anything was trained or charged), or a "fault": an exception that is
not meant for the user, an adapter that PEFT reads differently, a merged model with other logits. Writes results.json
and table.md to the folder of this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
TASKS = {"classification": "AutoModelForSequenceClassification", "text": "AutoModelForCausalLM"}
MODES = ("plain", "private", "merged")
TOLERANCE = 1e-4  # of a merged model's logits, relative


def main() -> None:
    import torch
    from transformers import logging

    from fedsb.utils.environment import describe_machine, git_hash
    from support.architectures import ARCHITECTURES

    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = asked.only.split(",") if asked.only else ARCHITECTURES
    rows: list[dict[str, Any]] = []
    for model_type in names:
        for task, auto_class in TASKS.items():
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                row = check_site(Path(folder), model_type, task, auto_class)
            if row is not None:
                rows.append({"model": model_type, "task": task, **row, "seconds": round(time.monotonic() - started, 1)})
                print(model_type, task, *(f"{mode}: {row[mode]}" for mode in MODES), sep=" | ", flush=True)
    facts = {"commit": git_hash(), "machine": describe_machine(), "cells": rows}
    (asked.out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (asked.out / "table.md").write_text(table(rows, facts["commit"]))
    counts = {said: sum(str(row[m]).split(":")[0] == said for row in rows for m in MODES) for said in STATES}
    print(counts)
    if counts["fault"]:
        sys.exit(1)


STATES = ("ok", "refused", "fault", "not tried")


def check_site(folder: Path, model_type: str, task: str, auto_class: str) -> dict[str, str] | None:
    """Returns the three cells of one model and task, or None if transformers has no such class."""
    from support.architectures import build

    try:
        model = build(folder / "model", model_type, auto_class)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            return None
        raise
    found = {"plain": cell(lambda: train(folder, model, task, {}))}
    private = {"privacy": {"unit": "example", "epsilon": 8.0}}
    found["private"] = cell(lambda: train(folder, model, task, private))
    found = {mode: said.replace(f"{folder}/", "") for mode, said in found.items()}
    ran = found["plain"] == "ok"
    found["merged"] = cell(lambda: merged(folder, auto_class)) if ran else "not tried"
    return found


def cell(run: Any) -> str:
    from fedsb.utils.errors import UserError

    try:
        run()
    except UserError as error:
        return f"refused: {' '.join(str(error).split())[:200]}"
    except Exception as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        return f"fault: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "ok"


def train(folder: Path, model: Path, task: str, more: dict[str, Any]) -> None:
    """Runs two rounds with two clients. PEFT's reload is part of a run."""
    from fedsb.config.load import load_config
    from fedsb.runs.run import federate
    from support.architectures import WORDS, write_rows

    words = [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(3 + i % 11)) for i in range(24)]
    rows = [{"text": text, "label": ("red", "blue", "green")[i % 3]} for i, text in enumerate(words)]
    data = str(write_rows(folder / "rows.jsonl", rows))
    config = {
        "name": "private" if more else "plain",
        "rounds": 2,
        "out": str(folder / "runs"),
        "model": {"name": str(model), "max_seq_length": 48},
        "task": {"kind": task},
        "data": {"train": data, "test": data},
        "clients": {"count": 2},
        "method": {"name": "fed-sb", "rank": 2},
        "train": {"local_steps": 2, "batch_size": 4, "lr": 0.01, "head_lr": 0.01},
        **more,
    }
    federate(load_config(config))


def merged(folder: Path, auto_class: str) -> None:
    """Compares the merged model, loaded by transformers alone, with the adapter, loaded by PEFT."""
    import torch
    import transformers
    from peft import PeftModel

    from fedsb.runs.evaluate import export_to

    where = Path(export_to(folder / "runs" / "plain", str(folder / "merged"), merged=True))
    auto = getattr(transformers, auto_class)
    ours = auto.from_pretrained(where).eval()
    tokens = {
        "input_ids": torch.tensor([[7, 12, 30, 41, 9, 22, 2]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
    }
    labels = {"num_labels": 3} if "Classification" in auto_class else {}
    base = auto.from_pretrained(folder / "model", **labels)
    adapted = PeftModel.from_pretrained(base, folder / "runs" / "plain" / "adapter").eval()
    with torch.no_grad():
        a, b = ours(**tokens).logits, adapted(**tokens).logits
    by = float((a - b).abs().max() / b.abs().max())
    if not by <= TOLERANCE:
        raise RuntimeError(f"logits of the merged model differ by {by:.2g}")


def table(rows: list[dict[str, Any]], commit: str | None) -> str:
    """Writes one line per model and task, followed by the reasons of refusals."""
    lines = [
        f"Made by `python benchmarks/architectures/run.py` at commit {commit}: tiny random models, two clients, two "
        "rounds.",
        "",
        "| model | task | plain | private (per row) | merged |",
        "|---|---|---|---|---|",
    ]
    reasons: dict[str, int] = {}
    for row in rows:
        cells = []
        for mode in MODES:
            said, _, why = str(row[mode]).partition(": ")
            cells.append(said if not why else f"{said} [{reasons.setdefault(why, len(reasons) + 1)}]")
        lines.append(f"| {row['model']} | {row['task']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for why, number in reasons.items())]) + "\n"


if __name__ == "__main__":
    main()
