"""SNLI: MiniLM as a pair classifier, three seeds, scored on the first 1,500 rows of dev.

    python benchmarks/snli/run.py --data FOLDER        (FOLDER holds train.jsonl[.gz] and dev.jsonl[.gz])

The sweep trains on the first 9,000 rows with seed 0 and is scored on the 999 behind them: three learning rates a factor
2 apart, and two more while the best lies at an end of those tried. Dev is touched only at the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import compare, find, slice_of

HERE = Path(__file__).parent
CONTENDERS = {
    "fed-sb r32": ({"method.name": "fed-sb", "method.rank": 32}, (0.01, 0.02, 0.04)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    train = find(folder, "train")
    common = {"data.train": train, "basis.share_samples": 0}
    compare(
        "snli",
        CONTENDERS,
        tuning=common | {"data.train_rows": 9000, "data.test": slice_of(train, 9000, HERE / "tune.jsonl")},
        testing=common | {"data.test": find(folder, "dev")},
        seeds=(0, 1, 2),
        folder=HERE,
    )


if __name__ == "__main__":
    main()
