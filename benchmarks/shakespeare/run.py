"""Shakespeare's speaking roles: next-token, a role a client, twenty of 89 a round, three seeds.

    python benchmarks/shakespeare/run.py --data FOLDER --model MODEL     (FOLDER holds by_role.jsonl[.gz])

The score is nats a token on the last tenth of each role's text; ten roles never take part. roles.md has a row a role.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import Cell, find, run_cells, spread, table

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
RATE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    asked = parser.parse_args()
    common = {"data.train": find(asked.data, "by_role"), "model.name": Path(asked.model).resolve(), "train.lr": RATE}
    cells = [Cell(f"test fed-sb r32 seed {seed}", "shakespeare", {**common, "seed": seed}) for seed in SEEDS]
    done = run_cells(cells, HERE / "results.json")
    text = table({"fed-sb r32": RATE}, done, SEEDS, "nats a token")
    before = spread([done[cell.name]["before"] for cell in cells])
    unseen = spread([mean_of(done[cell.name], unseen=True) for cell in cells])
    seen = spread([mean_of(done[cell.name], unseen=False) for cell in cells])
    text += f"\nBefore federation: {before}. Mean over roles: {seen} of those taking part, "
    text += f"{unseen} of the ten that never do.\n"
    print(text)
    (HERE / "table.md").write_text(text)
    roles = sorted(done[cells[0].name]["clients"], key=lambda role: role["score"])
    lines = ["| role | nats a token (seed 0) | windows scored | rounds | took part |", "|---|---|---|---|---|"]
    for role in roles:
        part = "never" if role["unseen"] else "yes" if role["rounds"] else "was never drawn"
        lines.append(f"| {role['name']} | {role['score']:.3f} | {role['rows']} | {role['rounds']} | {part} |")
    (HERE / "roles.md").write_text("\n".join(lines) + "\n")


def mean_of(cell: dict, *, unseen: bool) -> float:
    scores = [role["score"] for role in cell["clients"] if role["unseen"] == unseen]
    return sum(scores) / len(scores)


if __name__ == "__main__":
    main()
