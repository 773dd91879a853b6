"""Runs the cells of an experiment, each a `fedsb run` in a process of its own, and keeps every finished one.

A cell is a recipe with overrides, known by its name: whoever changes a recipe removes its cells. Its outcome is added
to results.json as soon as it is there, so that an experiment that was cut off goes on where it stopped. One thread a
cell, as many cells at a time as there are cores.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any

LOCK = Lock()


@dataclass(frozen=True)
class Cell:
    """One run: its name in results.json, the recipe, and what is set."""

    name: str
    recipe: str
    settings: Mapping[str, Any]


def run_cells(cells: Sequence[Cell], results: Path, *, workers: int | None = None) -> dict[str, Any]:
    """Runs the cells that `results` does not hold yet; gives back all outcomes by name."""
    results.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(results.read_text())["cells"] if results.exists() else {}
    left = [cell for cell in cells if cell.name not in done]
    if left:
        print(f"{results.parent.name}: {len(left)} of {len(cells)} cells to run", flush=True)

    def one(cell: Cell) -> None:
        outcome = run_cell(cell)
        with LOCK:
            done[cell.name] = outcome
            text = json.dumps({"machine": machine(), "cells": dict(sorted(done.items()))}, indent=1)
            temporary = results.with_suffix(".tmp")
            temporary.write_text(text + "\n")
            temporary.replace(results)
            print(f"{cell.name}: {outcome['score']} in {outcome['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(one, left))
    return done


def run_cell(cell: Cell) -> dict[str, Any]:
    """The outcome of one cell. Raises CalledProcessError, with fedsb's message on stderr, where it failed."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        settings = {**cell.settings, "out": folder, "name": "cell"}
        command = [sys.executable, "-m", "fedsb", "run", cell.recipe, "--json"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if ran.returncode:
            raise RuntimeError(f"{cell.name} failed:\n{ran.stderr}")
        summary = json.loads(ran.stdout)
        manifest = json.loads((Path(folder) / "cell" / "manifest.json").read_text())
        rounds = [json.loads(line) for line in (Path(folder) / "cell" / "rounds.jsonl").read_text().splitlines()]
        result = json.loads((Path(folder) / "cell" / "result.json").read_text())
    return {
        "settings": {key: value for key, value in cell.settings.items() if not isinstance(value, Path)},
        "score": summary["score"],
        "before": summary["before"],
        "majority": summary["majority"],
        "metric": summary["metric"],
        "scores": [row["score"] for row in rounds],
        "losses": [row["loss"] for row in rounds],
        "bytes": summary["bytes"],
        "captured_share": (manifest["basis"] or {}).get("captured_share"),
        "clients": result["clients"],
        "seconds": round(time.time() - started, 1),
        "commit": commit(),
    }


def tune(cell: Cell, rates: Sequence[float], results: Path) -> float:
    """The best learning rate on seed 0: of `rates`, a factor 2 apart, and on while the best lies at an end of them."""
    rates = sorted(rates)
    while True:
        names = {lr: f"tune {cell.name} lr {lr:g}" for lr in rates}
        cells = [Cell(names[lr], cell.recipe, {**cell.settings, "seed": 0, "train.lr": lr}) for lr in rates]
        done = run_cells(cells, results)
        best = max(rates, key=lambda lr: done[names[lr]]["score"])
        if best == rates[0]:
            rates = [rates[0] / 4, rates[0] / 2, *rates]
        elif best == rates[-1]:
            rates = [*rates, rates[-1] * 2, rates[-1] * 4]
        else:
            return best


def compare(
    recipe: str,
    contenders: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]],  # name -> (settings, learning rates)
    *,
    tuning: Mapping[str, Any],  # settings of a sweep: the data that it is scored on
    testing: Mapping[str, Any],
    seeds: Sequence[int],
    folder: Path,
    metric: str = "accuracy",
) -> None:
    """Tunes every contender, runs it over the seeds, prints the table and keeps it beside results.json."""
    results = folder / "results.json"
    best = {
        name: tune(Cell(name, recipe, {**tuning, **what}), rates, results) for name, (what, rates) in contenders.items()
    }
    cells = [
        Cell(f"test {name} seed {seed}", recipe, {**testing, **what, "seed": seed, "train.lr": best[name]})
        for seed in seeds
        for name, (what, _) in contenders.items()
    ]
    text = table(best, run_cells(cells, results), seeds, metric)
    print(text)
    (folder / "table.md").write_text(text)


def slice_of(train: Path, rows: int, to: Path) -> Path:
    """Writes the rows of `train` behind the first `rows`, to tune on. Not to be committed: licences do not allow it."""
    data = train.read_bytes()
    lines = (gzip.decompress(data) if train.suffix == ".gz" else data).splitlines(keepends=True)
    to.write_bytes(b"".join(lines[rows:]))
    return to


def table(contenders: Mapping[str, Any], done: Mapping[str, Any], seeds: Sequence[int], metric: str) -> str:
    """A row a contender: its learning rate, mean and spread over the seeds, and the four traffic numbers.

    The cells are those named "test <contender> seed <seed>"; bytes are the federation's, for the whole run.
    """
    score = f"{metric}, mean ± sd of {len(seeds)} seeds"
    lines = [f"| method | lr | {score} | one-off | up | down | total | total less the head |", "|---" * 8 + "|"]
    for name, lr in contenders.items():
        cells = [done[f"test {name} seed {seed}"] for seed in seeds]
        counted = cells[0]["bytes"]["federation"]
        sizes = [counted["with_head"][key] for key in ("one_off", "up", "down", "total")]
        shown = " | ".join(f"{size / 1e6:.2f} MB" for size in [*sizes, counted["without_head"]["total"]])
        lines.append(f"| {name} | {lr} | {spread([cell['score'] for cell in cells])} | {shown} |")
    return "\n".join(lines) + "\n"


def find(folder: Path, name: str) -> Path:
    """name.jsonl or name.jsonl.gz in a folder."""
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.exists():
            return path.resolve()
    raise SystemExit(f"there is no {name}.jsonl or {name}.jsonl.gz in {folder}")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def commit() -> str:
    """The commit that a cell ran with; "+changes" where a tracked file differed from it."""
    asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src"]).returncode
    return (asked.stdout.strip() or "unknown") + ("+changes" if changed else "")


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, no GPU, 1 thread a cell"
