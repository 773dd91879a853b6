"""TREC, SST-2 and SNLI, each by `fedsb compare`, and one table of all three: table.md.

    python benchmarks/glue/run.py --data FOLDER

FOLDER contains trec/, sst2/ and snli/, each with train.jsonl.gz and test.jsonl.gz (TREC) or dev.jsonl.gz. Completed
runs are kept in trec/, sst2/ and snli/ here, and a second command continues after the last one.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from fedsb.comparison.compare import compare
from fedsb.config.load import ResolvedConfig, load_config
from fedsb.utils.formatting import bytes_text, score_text

HERE = Path(__file__).parent
TASKS: dict[str, dict[str, str]] = {
    "trec": {"data.train": "train.jsonl.gz", "data.test": "test.jsonl.gz"},
    "sst2": {"data.train": "train.jsonl.gz", "data.test": "dev.jsonl.gz"},
    "snli": {
        "data.train": "train.jsonl.gz",
        "data.test": "dev.jsonl.gz",
        "data.test_rows": "1500",
        "task.text": "premise",
        "task.text_pair": "hypothesis",
    },
}
# SNLI is not tuned here: fedit r1's best rate is benchmarks/snli's, and so is fed-sb's, carried over from r = 8 by rank
# times rate (0.08 x 8 / 32); fedit r4's and ffa-lora's are where that one starts them, central's is half of fed-sb's.
RATES = {"snli": {"fed-sb r32": 0.02, "fedit r4": 0.0025, "fedit r1": 0.01, "ffa-lora r4": 0.005, "central r32": 0.01}}
# a task's columns: of two classes F1 is that of the second (positive), of more the plain mean over them
COLUMNS = {
    "trec": {"accuracy": "accuracy", "f1": "macro F1"},
    "sst2": {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews"},
    "snli": {"accuracy": "accuracy", "f1": "macro F1", "matthews": "Matthews"},
}


def loaded(task: str, overrides: list[str]) -> ResolvedConfig:
    """Returns compare.toml for a task. If RATES has the task, every contender has its rate, without trials."""
    raw = tomllib.loads((HERE / "compare.toml").read_text())
    if task in RATES:
        raw["compare"]["trials"] = 0
        for contender in raw["compare"]["contenders"]:
            contender["set"]["train.lr"] = RATES[task][contender["name"]]
    return load_config(raw, [f"name={task}", *overrides])


def table(found: dict[str, dict[str, Any]]) -> str:
    """Contenders by tasks and metrics, the mean of the accuracies, and the bytes of the three runs."""
    titles = [f"{task} {title}" for task in found for title in COLUMNS[task].values()]
    lines = [f"| contender | {' | '.join(titles)} | mean accuracy | bytes |", "|---" * (len(titles) + 3) + "|"]
    for rows in zip(*(of["contenders"] for of in found.values()), strict=True):
        cells = [
            spread(row["score"] if metric == "accuracy" else row["extra_metrics"][metric], metric)
            for task, row in zip(found, rows, strict=True)
            for metric in COLUMNS[task]
        ]
        mean = score_text("accuracy")(sum(row["score"]["mean"] for row in rows) / len(rows))
        total = bytes_text(sum(row["bytes"]["total"] for row in rows))
        lines.append(f"| {rows[0]['contender']} | {' | '.join(cells)} | {mean} | {total} |")
    return "\n".join(lines) + "\n"


def spread(of: dict[str, float], metric: str) -> str:
    if metric == "matthews":
        return f"{of['mean']:.3f} ± {of['sd']:.3f}"
    return f"{100 * of['mean']:.1f} ± {100 * of['sd']:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    found = {}
    for task, settings in TASKS.items():
        paths = {key: args.data / task / name for key, name in settings.items() if key in ("data.train", "data.test")}
        overrides = [f"{key}={value}" for key, value in (settings | paths).items()]
        found[task] = compare(loaded(task, overrides), args.out / task, print)
        if found[task]["failed"]:
            raise SystemExit(f"{task}: {found[task]['failed']}")
        (args.out / "table.md").write_text(table(found))


if __name__ == "__main__":
    main()
