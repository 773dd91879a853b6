"""Score against epsilon and bytes: a folder's comparison at epsilon 3, and those in its folders epsilon-1, ...

pip install matplotlib;  python benchmarks/private_plot.py benchmarks/snli_private          writes scores.svg there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = 3.0  # the epsilon of the folder itself
MARKS = "os^vD*PX<>hp"


def main(here: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "fedsb"  # the same file from the same figures
    folders = {float(folder.name.removeprefix("epsilon-")): folder for folder in here.glob("epsilon-*")} | {HERE: here}
    found = {
        epsilon: {row["contender"]: row for row in json.loads((folder / "comparison.json").read_text())["contenders"]}
        for epsilon, folder in sorted(folders.items())
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for place, name in enumerate(found[HERE]):
        known = {epsilon: rows[name] for epsilon, rows in found.items() if name in rows and rows[name]["score"]}
        color = f"C{place}" if place < 10 else "black"
        look = {"marker": MARKS[place % len(MARKS)], "color": color, "linewidth": 1 + (place == 0)}
        draw(left, list(known), list(known.values()), name, look)
        draw(right, [known[HERE]["bytes"]["total"] / 1e6], [known[HERE]], name, look)
    left.set(xscale="log", xlabel="epsilon", ylabel="accuracy, %")
    left.set_xticks(list(found), [f"{epsilon:g}" for epsilon in found], minor=False)
    left.minorticks_off()
    right.set(xscale="log", xlabel=f"MB sent in all, epsilon {HERE:g}")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(here / "scores.svg", metadata={"Date": None})


def draw(axes: Any, x: list[float], rows: list[dict[str, Any]], name: str, look: dict[str, Any]) -> None:
    mean, sd = ([100 * (row["score"][key] or 0) for row in rows] for key in ("mean", "sd"))
    axes.errorbar(x, mean, yerr=sd, capsize=3, label=name, **look)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
