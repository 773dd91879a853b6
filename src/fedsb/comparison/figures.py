"""The figures of a comparison: means and spreads over seeds, paired differences, bytes, and the Pareto front.

All figures are computed from stored cells. Bytes are those of all clients in a whole run. sd is that of a sample
(n - 1), None for a single seed. A contender's bytes, seconds and memory are means over its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any

from fedsb.comparison.cells import Outcome, portable
from fedsb.comparison.contenders import RESERVED
from fedsb.comparison.search import Tried, at_boundary
from fedsb.config.load import ResolvedConfig
from fedsb.reporting.run_directory import extra_metrics

Json = dict[str, Any]
SHARES = ("accuracy", "exact_match", "pass@1")  # metrics that are a share of the test rows


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The results of a contender: its search, and a cell for each seed (None: failed)."""

    name: str
    set: Mapping[str, Any]
    is_control: bool  # not on the front
    control_of: str | None  # for a control, the contender whose adapter it trains
    rank: int  # of the exported LoRA
    lr: float | None  # the best rate; None if the search failed
    tried: Tried
    seeds: Sequence[Outcome | None]

    @property
    def cells(self) -> list[Outcome]:
        return [cell for cell in self.seeds if cell is not None]


def comparison_of(
    entries: Sequence[Entry], loaded: ResolvedConfig, failed: Mapping[str, str], *, higher_is_better: bool
) -> Json:
    """Returns the content of comparison.json: the table, and the data of the charts."""
    options = loaded.config.compare
    reference = next((entry for entry in entries if entry.name == options.reference), entries[0])
    rows = [row_of(entry, reference, options.target, higher_is_better) for entry in entries]
    scored = {row["contender"]: row for row in rows if row["score"] is not None and not row["is_control"]}
    points = {name: (row["bytes"]["total"], row["score"]["mean"]) for name, row in scored.items()}
    front = pareto_front(points, higher_is_better)
    cells = [cell for entry in entries for cell in entry.cells]
    return {
        "name": loaded.config.name,
        "metric": cells[0]["metric"] if cells else None,
        "higher_is_better": higher_is_better,
        "before": spread([cell["before"] for cell in cells if cell["before"] is not None]),
        "test_rows": max((cell.get("test_rows") or 0 for cell in cells), default=0) or None,
        "majority": spread([cell["majority"] for cell in cells if cell["majority"] is not None]),
        "reference": reference.name,
        "target": options.target,
        "seeds": options.seeds,
        "trials": options.trials,
        "tune_share": options.validation_fraction if options.trials else None,
        "rounds": loaded.config.rounds,
        "settings": common_settings(loaded),
        "contenders": [{**row, "on_front": row["contender"] in front} for row in rows],
        "failed": dict(failed),
        "versions": sorted({f"{cell['fedsb']}, git {cell['git']}" if cell["git"] else cell["fedsb"] for cell in cells}),
    }


def row_of(entry: Entry, reference: Entry, target: float | None, higher_is_better: bool) -> Json:
    """Returns a contender's row. Numbers are None if there is no result."""
    cells = entry.cells
    totals = [cell["bytes"]["federation"] for cell in cells]
    reached = [bytes_to_target(cell, target, higher_is_better) for cell in cells] if target is not None else []
    done = [bytes_ for bytes_ in reached if bytes_ is not None]
    return {
        "contender": entry.name,
        "set": dict(entry.set),
        "is_control": entry.is_control,
        "control_of": entry.control_of,
        "rank": entry.rank,
        "lr": entry.lr,
        "lr_at_boundary": entry.lr in entry.tried and at_boundary(entry.tried, entry.lr) if entry.lr else False,
        "tried": [{"lr": lr, "score": entry.tried[lr]} for lr in sorted(entry.tried)],
        "scores": [None if cell is None else cell["score"] for cell in entry.seeds],
        "score": spread([cell["score"] for cell in cells]),
        "test_error": test_error(cells),
        "extra_metrics": extra_metric_spreads(cells),
        "difference": difference(entry, reference, higher_is_better) if entry != reference else None,
        "bytes": {
            key: mean([total["with_head"][key] for total in totals]) for key in ("one_off", "up", "down", "total")
        }
        | {"total_less_head": mean([total["without_head"]["total"] for total in totals])},
        "bytes_to_target": {"mean": mean(done), "reached": len(done), "of": len(cells)} if target is not None else None,
        "captured_share": mean([cell["captured_share"] for cell in cells if cell["captured_share"] is not None]),
        "seconds": mean([cell["seconds"] for cell in cells]),
        "peak_memory_bytes": mean(
            [cell["peak_memory_bytes"] for cell in cells if cell["peak_memory_bytes"] is not None]
        ),
        "curve": curve(cells),
    }


def common_settings(loaded: ResolvedConfig) -> Json:
    """Returns the settings that all contenders share, with names instead of paths, without [method]."""
    given = {choice.key: choice.value for choice in loaded.choices() if choice.key in loaded.origin}
    return {
        key: value for key, value in portable(given).items() if key not in RESERVED and not key.startswith("method.")
    }


def scores_of(entry: Entry) -> dict[int, float]:
    """Returns the score of each finished seed."""
    return {seed: cell["score"] for seed, cell in enumerate(entry.seeds) if cell is not None}


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean; None without values."""
    return fmean(values) if values else None


def spread(values: Sequence[float]) -> Json | None:
    """Returns the mean and the sd of a sample; None without values."""
    if not values:
        return None
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}


def extra_metric_spreads(cells: Sequence[Outcome]) -> Json:
    """Returns the mean and sd of every extra metric that all cells have, by name."""
    found: list[Json] = [extra_metrics(cell) for cell in cells]
    names = [name for name in (found[0] if found else ()) if all(name in one for one in found)]
    return {name: spread([one[name] for one in found]) for name in names}


def paired(mine: Mapping[int, float], theirs: Mapping[int, float], higher_is_better: bool) -> Json | None:
    """Returns the differences on the seeds that both have, and on how many of them `mine` is better."""
    gaps = {seed: mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())}
    if not gaps:
        return None
    wins = sum(gap > 0 if higher_is_better else gap < 0 for gap in gaps.values())
    return {**(spread(list(gaps.values())) or {}), "wins": wins, "of": len(gaps), "by_seed": gaps}


def difference(entry: Entry, reference: Entry, higher_is_better: bool) -> Json | None:
    """Returns the paired difference, with an upper bound on its sampling error.

    Both are scored on the same rows, so the error of their difference is smaller than that of two independent scores.
    By how much is not known from the scores, so the error is that of independent ones.
    """
    found = paired(scores_of(entry), scores_of(reference), higher_is_better)
    if found is None:
        return None
    errors = [test_error(each.cells) for each in (entry, reference)]
    error = None if None in errors else math.hypot(*(error for error in errors if error is not None))
    return {**found, "test_error": error}


def test_error(cells: Sequence[Outcome]) -> float | None:
    """Returns the standard error of the mean score due to the number of test rows, sqrt(p (1 - p) / n).

    More seeds do not make it smaller, because all of them are scored on the same rows. None for a metric that is not a
    share of rows, and if the number of rows is not known.
    """
    if not cells or cells[0]["metric"] not in SHARES:
        return None
    rows = [cell.get("test_rows") for cell in cells]
    if None in rows or not all(rows):
        return None
    p, n = fmean(cell["score"] for cell in cells), fmean(row for row in rows if row is not None)
    return math.sqrt(p * (1 - p) / n)


def running_bytes(cell: Outcome) -> list[int]:
    """Returns the bytes sent up to each round, including the one-off bytes."""
    one_off = cell["bytes"]["federation"]["with_head"]["one_off"]
    return list(accumulate(cell["bytes_by_round"], initial=one_off))[1:]


def bytes_to_target(cell: Outcome, target: float, higher_is_better: bool) -> int | None:
    """Returns the bytes until a scored round first reaches the target; None if none does."""
    for sent, score in zip(running_bytes(cell), cell["scores_by_round"], strict=True):
        if score is not None and (score >= target if higher_is_better else score <= target):
            return sent
    return None


def curve(cells: Sequence[Outcome]) -> list[list[float]]:
    """Returns (bytes so far, score) at every scored round, both as means over the seeds."""
    if not cells:
        return []
    rounds = zip(
        zip(*(running_bytes(cell) for cell in cells), strict=True),
        zip(*(cell["scores_by_round"] for cell in cells), strict=True),
        strict=True,
    )
    return [[fmean(sent), fmean(scores)] for sent, scores in rounds if None not in scores]


def pareto_front(points: Mapping[str, tuple[float, float]], higher_is_better: bool) -> list[str]:
    """Returns the names of the points (bytes, score) that no other point dominates, fewest bytes first.

    Points are means. The paired differences show whether two scores differ by more than chance.
    """

    def worth(name: str) -> float:
        return points[name][1] if higher_is_better else -points[name][1]

    def dominated(name: str) -> bool:
        return any(
            points[other][0] <= points[name][0]
            and worth(other) >= worth(name)
            and (points[other][0], worth(other)) != (points[name][0], worth(name))
            for other in points
        )

    return sorted((name for name in points if not dominated(name)), key=lambda name: points[name])
