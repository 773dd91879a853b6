"""Writes roles.md, one row per role, from the kept runs of the comparison: python benchmarks/shakespeare/roles.py

Scores are nats per token on the last tenth of a role's text. The roles' scores are of seed 0, the means over all seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).parent
CONTENDER = "fed-sb r32"


def main() -> None:
    found = json.loads((HERE / "comparison.json").read_text())
    chosen = next(row for row in found["contenders"] if row["contender"] == CONTENDER)
    kept = json.loads((HERE / "cells.json").read_text())["cells"].values()
    cells = [
        next(cell for cell in kept if (cell["name"], cell["score"]) == (f"{CONTENDER} seed {seed}", score))
        for seed, score in enumerate(chosen["scores"])
    ]
    means = {unseen: spread([mean_of(cell, unseen=unseen) for cell in cells]) for unseen in (False, True)}
    before = spread([cell["before"] for cell in cells])
    lines = [
        f"{CONTENDER}, lr {chosen['lr']:g}: before federation {before}; mean over roles "
        f"{means[False]} of those taking part, {means[True]} of those that never do.",
        "",
        "| role | nats per token (seed 0) | windows scored | rounds | took part |",
        "|---|---|---|---|---|",
    ]
    for role in sorted(cells[0]["clients"], key=lambda role: role["score"]):
        part = "never" if role["unseen"] else "yes" if role["rounds"] else "was never drawn"
        lines.append(f"| {role['name']} | {role['score']:.3f} | {role['rows']} | {role['rounds']} | {part} |")
    text = "\n".join(lines) + "\n"
    (HERE / "roles.md").write_text(text)
    print(text)


def mean_of(cell: dict[str, Any], *, unseen: bool) -> float:
    return fmean(role["score"] for role in cell["clients"] if role["unseen"] == unseen)


def spread(values: list[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


if __name__ == "__main__":
    main()
