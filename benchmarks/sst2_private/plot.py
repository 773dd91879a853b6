"""Score against epsilon and against bytes, from the comparisons in this folder.

pip install matplotlib;  python benchmarks/sst2_private/plot.py          writes scores.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
EPSILONS = {1.0: HERE / "epsilon-1", 3.0: HERE, 10.0: HERE / "epsilon-10"}


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "fedsb"  # the same file from the same figures
    found = {
        epsilon: {row["contender"]: row for row in json.loads((folder / "comparison.json").read_text())["contenders"]}
        for epsilon, folder in EPSILONS.items()
        if (folder / "comparison.json").exists()
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
    figure.savefig(HERE / "scores.svg", metadata={"Date": None})


def draw(axes: Any, x: list[float], rows: list[dict[str, Any]], name: str) -> None:
    mean, sd = ([100 * (row["score"][key] or 0) for row in rows] for key in ("mean", "sd"))
    axes.errorbar(x, mean, yerr=sd, marker="o", capsize=3, label=name)


if __name__ == "__main__":
    main()
