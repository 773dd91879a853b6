"""Score against epsilon and against bytes: a folder's comparison at epsilon 3, and those in epsilon-1 and epsilon-10.

pip install matplotlib;  python benchmarks/private_plot.py benchmarks/snli_private          writes scores.svg there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

EPSILONS = {1.0: "epsilon-1", 3.0: ".", 10.0: "epsilon-10"}


def main(here: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "fedsb"  # the same file from the same figures
    found = {
        epsilon: {
            row["contender"]: row for row in json.loads((here / folder / "comparison.json").read_text())["contenders"]
        }
        for epsilon, folder in EPSILONS.items()
        if (here / folder / "comparison.json").exists()
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for name in {name: None for rows in found.values() for name in rows}:
        known = {epsilon: rows[name] for epsilon, rows in found.items() if name in rows and rows[name]["score"]}
        draw(left, list(known), list(known.values()), name)
        if 3.0 in known:
            draw(right, [known[3.0]["bytes"]["total"] / 1e6], [known[3.0]], name)
    left.set(xscale="log", xlabel="epsilon", ylabel="accuracy, %")
    left.set_xticks(list(found), [f"{epsilon:g}" for epsilon in found], minor=False)
    left.minorticks_off()
    right.set(xscale="log", xlabel="MB sent in all, epsilon 3")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(here / "scores.svg", metadata={"Date": None})


def draw(axes: Any, x: list[float], rows: list[dict[str, Any]], name: str) -> None:
    mean, sd = ([100 * (row["score"][key] or 0) for row in rows] for key in ("mean", "sd"))
    axes.errorbar(x, mean, yerr=sd, marker="o", capsize=3, label=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
