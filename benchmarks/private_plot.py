"""Score and bytes of private comparisons, by epsilon or by the number of sites: writes scores.svg to their folder.

pip install matplotlib
python benchmarks/private_plot.py benchmarks/snli_private              its table, and those in epsilon-1, ...
python benchmarks/private_plot.py benchmarks/shared_noise/sites sites  its contenders "shared, 3 sites", ...

The left plot shows the score by epsilon, or by sites; the right one score against bytes, or bytes of a site by sites.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = 3.0  # the epsilon of the folder itself
MARKS = "os^vD*PX<>hp"
Rows = dict[str, dict[float, dict[str, Any]]]  # by curve and place on the axis


def main(here: Path, axis: str = "epsilon") -> None:
    plt.rcParams["svg.hashsalt"] = "fedsb"  # the same file from the same figures
    curves = by_epsilon(here) if axis == "epsilon" else by_sites(here)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=axis == "epsilon")
    for place, (name, known) in enumerate(curves.items()):
        color = f"C{place}" if place < 10 else "black"
        look = {"marker": MARKS[place % len(MARKS)], "color": color, "linewidth": 1 + (place == 0)}
        draw(left, list(known), list(known.values()), name, look)
        if axis == "epsilon":
            draw(right, [known[HERE]["bytes"]["total"] / 1e6], [known[HERE]], name, look)
        else:
            right.plot(list(known), [row["bytes"]["total"] / n / 1e6 for n, row in known.items()], label=name, **look)
    ticks = sorted({place for known in curves.values() for place in known})
    for axes in (left,) if axis == "epsilon" else (left, right):
        axes.set(xscale="log", xlabel=axis)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    left.set(ylabel="accuracy, %")
    if axis == "epsilon":
        right.set(xscale="log", xlabel=f"MB sent in all, epsilon {HERE:g}")
    else:
        right.set(ylabel="MB sent and received by each site", ylim=(0, None))
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(here / "scores.svg", metadata={"Date": None})


def by_epsilon(here: Path) -> Rows:
    """Returns the rows of a folder's table, and of those in its folders epsilon-1, ..., by contender and epsilon."""
    folders = {float(folder.name.removeprefix("epsilon-")): folder for folder in here.glob("epsilon-*")} | {HERE: here}
    found = {epsilon: contenders(folder) for epsilon, folder in sorted(folders.items())}
    return {
        name: {epsilon: rows[name] for epsilon, rows in found.items() if name in rows and rows[name]["score"]}
        for name in found[HERE]
    }


def by_sites(here: Path) -> Rows:
    """Returns the rows of one table with contenders such as "shared, 3 sites", by the former and the latter."""
    curves: Rows = defaultdict(dict)
    for name, row in contenders(here).items():
        if number := re.fullmatch(r"(.*), (\d+) sites", name):
            curves[number[1]][float(number[2])] = row
    return curves


def contenders(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in json.loads((folder / "comparison.json").read_text())["contenders"]}


def draw(axes: Any, x: list[float], rows: list[dict[str, Any]], name: str, look: dict[str, Any]) -> None:
    mean, sd = ([100 * (row["score"][key] or 0) for row in rows] for key in ("mean", "sd"))
    axes.errorbar(x, mean, yerr=sd, capsize=3, label=name, **look)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
