"""TREC, SST-2 and SNLI, each by `fedsb compare`, and one table of all three: table.md.

    python benchmarks/glue/run.py --data FOLDER

FOLDER holds trec/, sst2/ and snli/, each with train.jsonl.gz and test.jsonl.gz (TREC) or dev.jsonl.gz. What is finished
is kept in trec/, sst2/ and snli/ here, and a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedsb.charts import bytes_text, score_text
from fedsb.comparison.compare import compare
from fedsb.config import load_config

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
# a task's columns: of two classes F1 is that of the second (positive), of more the plain mean over them
COLUMNS = {
    "trec": {"accuracy": "accuracy", "f1": "macro F1"},
    "sst2": {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews"},
    "snli": {"accuracy": "accuracy", "f1": "macro F1", "matthews": "Matthews"},
}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Contenders by tasks and metrics, the mean of the accuracies, and the bytes of the three runs."""
    titles = [f"{task} {title}" for task in found for title in COLUMNS[task].values()]
    lines = [f"| contender | {' | '.join(titles)} | mean accuracy | bytes |", "|---" * (len(titles) + 3) + "|"]
    for rows in zip(*(of["contenders"] for of in found.values()), strict=True):
        cells = [
            spread(row["score"] if metric == "accuracy" else row["beside"][metric], metric)
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
        found[task] = compare(load_config(HERE / "compare.toml", [f"name={task}", *overrides]), args.out / task, print)
        if found[task]["failed"]:
            raise SystemExit(f"{task}: {found[task]['failed']}")
    (args.out / "table.md").write_text(table(found))


if __name__ == "__main__":
    main()
