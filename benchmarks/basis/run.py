"""TREC: what the basis is worth at low rank. Fed-SB from every basis, each at its best learning rate of an equal sweep.

    python benchmarks/basis/run.py --data FOLDER        (FOLDER holds train.jsonl[.gz] and test.jsonl[.gz])

As benchmarks/trec: tuned on the rows behind the 5,000 of training, three seeds, scored on the 500 tests. The bases that
look at gradients see 256 rows of all clients together; R starts at zero for all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import compare, find, slice_of

HERE = Path(__file__).parent
RATES = {8: (0.04, 0.08, 0.16, 0.32), 16: (0.02, 0.04, 0.08, 0.16)}
CONTENDERS = {
    f"{basis} r{rank}": (
        {"method.name": "fed-sb", "method.rank": rank, "basis.kind": basis}
        | ({"basis.R0": "zero"} if basis in ("core", "update-pooled") else {}),
        RATES[rank],
    )
    for rank in RATES
    for basis in ("core", "random", "weights", "update-pooled")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    train = find(folder, "train")
    common = {"data.train": train, "eval.every": 2}
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
