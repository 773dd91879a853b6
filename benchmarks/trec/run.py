"""TREC: Fed-SB against FedIT, each at the best learning rate of an equal sweep, three seeds, scored on the 500 tests.

    python benchmarks/trec/run.py --data FOLDER        (FOLDER holds train.jsonl[.gz] and test.jsonl[.gz])

The sweep trains on the first 5,000 rows with seed 0 and is scored on the 452 rows behind them. It tries four learning
rates a factor 2 apart, and two more while the best lies at an end of those tried. The tests are touched only at the
end. The split over clients changes with the seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import compare, find, slice_of

HERE = Path(__file__).parent
CONTENDERS = {
    "fed-sb r32": ({"method.name": "fed-sb", "method.rank": 32}, (0.01, 0.02, 0.04, 0.08)),
    "fed-sb r8": ({"method.name": "fed-sb", "method.rank": 8}, (0.04, 0.08, 0.16, 0.32)),
    "fedit r4": ({"method.name": "fedit", "method.rank": 4}, (0.0025, 0.005, 0.01, 0.02)),
    "fedit r1": ({"method.name": "fedit", "method.rank": 1}, (0.0025, 0.005, 0.01, 0.02)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    train = find(folder, "train")
    common = {"data.train": train, "eval.every": 2, "basis.share_samples": 0}
    compare(
        "trec",
        CONTENDERS,
        tuning=common | {"data.test": slice_of(train, 5000, HERE / "tune.jsonl")},
        testing=common | {"data.test": find(folder, "test")},
        seeds=(0, 1, 2),
        folder=HERE,
    )


if __name__ == "__main__":
    main()
