"""Recomputes the epsilon of a private run from its ledgers with dp-accounting: python recompute_epsilon.py runs/NAME

Does not import fedsb. Prints every client's epsilon and the run's, which is the worst client's.
"""

import json
import sys
from pathlib import Path

import dp_accounting as dp
from dp_accounting.pld import PLDAccountant


def recompute(run: Path) -> dict[str, float]:
    delta = json.loads((run / "manifest.json").read_text())["privacy"]["delta"]
    spent = {}
    for path in sorted((run / "privacy").glob("*.jsonl")):
        header, *lines = map(json.loads, path.read_text().splitlines())
        accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
        for line in lines:
            event = dp.GaussianDpEvent(line["sigma"])
            accountant.compose(dp.PoissonSampledDpEvent(line["q"], event) if line["q"] < 1 else event, line["count"])
        spent[header["client"]] = accountant.get_epsilon(delta)
    return spent


if __name__ == "__main__":
    found = recompute(Path(sys.argv[1]))
    print(json.dumps({"clients": found, "epsilon": max(found.values())}, indent=1))
