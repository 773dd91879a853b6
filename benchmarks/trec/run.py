"""TREC: Fed-SB against FedIT, each at the best learning rate of an equal sweep, three seeds, scored on the 500 tests.

    python benchmarks/trec/run.py --data FOLDER        (FOLDER holds train.jsonl[.gz] and test.jsonl[.gz])

The sweep trains on the first 5,000 rows with seed 0 and is scored on the 452 rows behind them. It tries four learning
rates a factor 2 apart, and two more while the best lies at an end of those tried. The tests are touched only at the
end. The split over clients changes with the seed.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import Cell, find, run_cells, table

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
    tune_rows = HERE / "tune.jsonl"  # not committed: the data's licence does not allow it
    tune_rows.write_text("".join(read(train)[TRAIN_ROWS:]))
    common = {"data.train": train, "eval.every": 2, "basis.share_samples": 0}

    best = {name: tune(name, common | {"data.test": tune_rows}) for name in CONTENDERS}
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
    text = table(best, done, SEEDS, "accuracy")
    print(text)
    (HERE / "table.md").write_text(text)


def tune(name: str, common: dict[str, object]) -> float:
    """The best learning rate: of four, a factor 2 apart, and on while the best one lies at an end of those tried."""
    what, rates = CONTENDERS[name]
    rates = sorted(rates)
    while True:
        cells = [Cell(f"tune {name} lr {lr:g}", "trec", {**common, **what, "seed": 0, "train.lr": lr}) for lr in rates]
        done = run_cells(cells, HERE / "results.json")
        best = max(rates, key=lambda lr: done[f"tune {name} lr {lr:g}"]["score"])
        if best == rates[0]:
            rates = [rates[0] / 4, rates[0] / 2, *rates]
        elif best == rates[-1]:
            rates = [*rates, rates[-1] * 2, rates[-1] * 4]
        else:
            return best


def read(path: Path) -> list[str]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return text.decode().splitlines(keepends=True)


if __name__ == "__main__":
    main()
