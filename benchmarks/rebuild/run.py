"""Compares the time of rounds in two versions of fedsb: the one that is installed here, and an older one.

    python benchmarks/rebuild/run.py OLD_SRC [CASE ...]        OLD_SRC: the src folder of the older checkout

The processes of the two versions alternate, so that what disturbs the machine disturbs both. Writes results.json and
table.md: medians in seconds, and the median of the ratios of neighbouring processes. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedsb.utils.environment import git_hash

HERE = Path(__file__).parent
CASES = {  # case -> what is timed
    "minilm-1": "a round of MiniLM, 1 client",
    "minilm-8": "a round of MiniLM, 8 clients",
    "minilm-8-lora": "the same with FedIT, rank 8",
    "llama-1": "a round of a Llama of 14M, 1 client",
    "llama-8": "a round of a Llama of 14M, 8 clients",
    "minilm-1-private": "a private round of MiniLM, 1 client",
    "server-40": "validation and aggregation of 40 updates",
}
PAIRS, REPEATS = 5, 5


def seconds(source: Path, case: str) -> float:
    """Returns the median time of a round in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "measure.py"), case, str(REPEATS)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    old, new = Path(sys.argv[1]), HERE.parents[1] / "src"
    path = HERE / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    found |= {
        "commit": git_hash(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "load_before": os.getloadavg()[0],
    }
    for case in sys.argv[2:] or CASES:
        pairs = [(seconds(old, case), seconds(new, case)) for _ in range(PAIRS)]
        found["cases"][case] = {
            "old": statistics.median(a for a, _ in pairs),
            "new": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(b / a for a, b in pairs),
        }
        print(case, found["cases"][case], flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        (HERE / "table.md").write_text(table(found["cases"]))


def table(cases: Mapping[str, Any]) -> str:
    lines = ["| what | old, s | new, s | new over old |", "|---|---|---|---|"]
    for case, row in cases.items():
        lines.append(f"| {CASES[case]} | {row['old']:.3f} | {row['new']:.3f} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
