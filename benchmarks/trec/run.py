"""TREC: Fed-SB against FedIT, each at the best learning rate of an equal sweep, three seeds, scored on the 500 tests.

    python benchmarks/trec/run.py --data FOLDER        (FOLDER holds train.jsonl[.gz] and test.jsonl[.gz])

The sweep trains on the first 5,000 rows with seed 0 and is scored on the 452 rows behind them; the tests are touched
only at the end. The split over clients changes with the seed.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import Cell, run_cells, spread

HERE = Path(__file__).parent
TRAIN_ROWS = 5000
SEEDS = (0, 1, 2)
CONTENDERS = {
    "fed-sb r32": ({"method.name": "fed-sb", "method.rank": 32}, (0.01, 0.02, 0.04, 0.08)),
    "fed-sb r8": ({"method.name": "fed-sb", "method.rank": 8}, (0.02, 0.04, 0.08, 0.16)),
    "fedit r4": ({"method.name": "fedit", "method.rank": 4}, (0.0025, 0.005, 0.01, 0.02)),
    "fedit r1": ({"method.name": "fedit", "method.rank": 1}, (0.0025, 0.005, 0.01, 0.02)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    train, test = find(folder, "train"), find(folder, "test")
    tune = HERE / "tune.jsonl"  # not committed: the data's licence does not allow it
    tune.write_text("".join(read(train)[TRAIN_ROWS:]))
    common = {"data.train": train, "eval.every": 2, "basis.share_samples": 0}

    sweep = [
        Cell(f"tune {name} lr {lr}", "trec", {**common, **what, "data.test": tune, "seed": 0, "train.lr": lr})
        for name, (what, rates) in CONTENDERS.items()
        for lr in rates
    ]
    tuned = run_cells(sweep, HERE / "results.json")
    best = {
        name: max(rates, key=lambda lr, name=name: tuned[f"tune {name} lr {lr}"]["score"])
        for name, (_, rates) in CONTENDERS.items()
    }
    final = [
        Cell(
            f"test {name} seed {seed}",
            "trec",
            {**common, **what, "data.test": test, "seed": seed, "train.lr": best[name]},
        )
        for seed in SEEDS
        for name, (what, _) in CONTENDERS.items()
    ]
    done = run_cells(final, HERE / "results.json")
    lines = [
        "| method | lr | accuracy, mean ± sd of 3 seeds | one-off | up | down | total |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        cells = [done[f"test {name} seed {seed}"] for seed in SEEDS]
        counted = cells[0]["bytes"]["federation"]["with_head"]
        sizes = " | ".join(f"{counted[key] / 1e6:.2f} MB" for key in ("one_off", "up", "down", "total"))
        lines.append(f"| {name} | {best[name]} | {spread([cell['score'] for cell in cells])} | {sizes} |")
    print("\n".join(lines))
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


def find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.exists():
            return path.resolve()
    raise SystemExit(f"there is no {name}.jsonl or {name}.jsonl.gz in {folder}")


def read(path: Path) -> list[str]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return text.decode().splitlines(keepends=True)


if __name__ == "__main__":
    main()
