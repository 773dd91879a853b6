"""Writes the report of a run directory, one HTML page without external resources, and returns its summary.

`write_report` only reads what the run wrote (manifest.json, rounds.jsonl, traffic.jsonl, result.json) and never
recomputes a score. The charts (charts.py) are inline SVG with the colours of the page's style, for light, dark and
print. Sections without content are left out.

Bytes are those of the tensors; `wire` includes the headers of the messages. One-off are the bytes of the basis, in both
directions.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING

from fedsb.reporting import charts
from fedsb.reporting.prices import BASELINES, baseline_prices, method_of, total_text
from fedsb.reporting.run_directory import extra_metrics, read_json, read_lines
from fedsb.reporting.warnings import run_warnings
from fedsb.utils import formatting
from fedsb.utils.errors import UserError
from fedsb.utils.files import write_atomic
from fedsb.utils.formatting import Json, number

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of a run directory."""

    manifest: Json
    rounds: list[Json]  # in order; of a repeated round, only the last
    traffic: list[Json]
    result: Json | None  # None: the run is not finished
    unreadable: int  # lines that a crash left incomplete

    @staticmethod
    def read(run_dir: Path) -> RunFiles:
        """Reads the files. Raises UserError if manifest.json does not exist or cannot be read."""
        if (manifest := read_json(run_dir / "manifest.json")) is None:
            raise UserError(f"{run_dir} is not a run directory (no manifest.json).")
        rounds, unreadable_rounds = read_lines(run_dir / "rounds.jsonl")
        traffic, unreadable_traffic = read_lines(run_dir / "traffic.jsonl")
        last_of = {int(row["round"]): row for row in rounds}
        return RunFiles(
            manifest=manifest,
            rounds=[last_of[r] for r in sorted(last_of)],
            traffic=traffic,
            result=read_json(run_dir / "result.json"),
            unreadable=unreadable_rounds + unreadable_traffic,
        )

    @property
    def score(self) -> tuple[float | None, int]:
        """Returns the final score (of an unfinished run, that of its last scored round), and its round."""
        if self.result is not None:
            return number(self.result.get("score")), len(self.rounds)
        scored = [(number(row.get("score")), row["round"]) for row in self.rounds]
        return next((pair for pair in reversed(scored) if pair[0] is not None), (None, 0))

    @property
    def epsilon(self) -> float | None:
        """Returns the epsilon that was spent; of an unfinished run, an upper bound."""
        return self._spent("epsilon")

    @property
    def own_epsilon(self) -> float | None:
        """Returns the same by a client's own share of a shared noise."""
        return self._spent("own_epsilon")

    def _spent(self, key: str) -> float | None:
        last = self.rounds[-1] if self.rounds else {}
        return number((self.result or {}).get(key, last.get(key)))


def summary(run_dir: Path) -> Json:
    """Returns the summary of a run as JSON. Unknown values are None.

    `bytes["federation"]` and `bytes["per_client"]` (the mean over the clients with traffic) have `with_head`,
    `without_head` and `wire`, each with `one_off`, `up`, `down` and `total`.
    """
    return _summary(RunFiles.read(run_dir))


def _summary(run: RunFiles) -> Json:
    task, before = run.manifest.get("task") or {}, run.manifest.get("before") or {}
    return {
        "name": run.manifest.get("name"),
        "finished": run.result is not None,
        "rounds": len(run.rounds),
        "rounds_planned": run.manifest.get("rounds"),
        "metric": task.get("metric"),
        "higher_is_better": task.get("higher_is_better", True),
        "score": run.score[0],
        "extra_metrics": extra_metrics(run.result or {}),
        "before": number(before.get("score")),
        "majority": number(before.get("majority")),
        "majority_of_test": number(before.get("majority_of_test")),
        "warnings": run_warnings(run.manifest, run.rounds) if run.rounds else [],
        "bytes": byte_totals(run.traffic),
        "epsilon": run.epsilon,
        "privacy": _privacy(run),
        "data_warnings": (run.manifest.get("data_card") or {}).get("warnings") or [],
    }


def _privacy(run: RunFiles) -> str | None:
    """Returns the epsilon that was spent, as text; None for a run without privacy."""
    privacy = run.manifest.get("privacy")
    if not privacy or run.epsilon is None:
        return None
    epsilon, delta = formatting.epsilon_text(run.epsilon), formatting.delta_text(privacy["delta"])
    own, bound = run.own_epsilon, "" if run.result is not None else "at most "
    also = "" if own is None else f" ({formatting.epsilon_text(own)} if all other clients collude)"
    text = f"epsilon {bound}{epsilon}{also} at delta {delta}, for {privacy['unit']}s, according to the ledgers"
    return text if run.manifest.get("not_private") is None else f"none: {run.manifest['not_private']} ({text})"


def byte_totals(traffic: Iterable[Json]) -> dict[str, dict[str, dict[str, int]]]:
    """Returns one-off, up, down and total bytes. A value of the head counts as the mean value of its message."""
    sums: dict[str, Counter[str]] = {"with_head": Counter(), "without_head": Counter(), "wire": Counter()}
    clients = set()
    for row in traffic:
        clients.add(row["client"])
        part = "one_off" if _is_one_off(row) else row["direction"]
        head = round(row["bytes"] * row.get("head_values", 0) / max(row["values"], 1))
        sums["with_head"][part] += row["bytes"]
        sums["without_head"][part] += row["bytes"] - head
        sums["wire"][part] += row["wire_bytes"]

    def four(counts: Counter[str], sharers: int) -> dict[str, int]:
        parts = {part: round(counts[part] / sharers) for part in ("one_off", "up", "down")}
        return {**parts, "total": sum(parts.values())}

    return {
        scope: {kind: four(counts, sharers) for kind, counts in sums.items()}
        for scope, sharers in (("federation", 1), ("per_client", max(len(clients), 1)))
    }


def _is_one_off(row: Json) -> bool:
    return bool(row.get("kind") == "basis" or row["round"] == 0)


def open_templates(*folders: Path) -> jinja2.Environment:
    """Returns the templates of this package and of `folders`, with the filters that every page needs."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "bytes": formatting.bytes_text,
        "count": formatting.count_text,
        "seconds": formatting.seconds_text,
    }
    templates.filters["setting"] = lambda value: value if isinstance(value, str) else json.dumps(value)
    return templates


def write_report(run_dir: Path) -> Path:
    """Writes report.html to the run directory, atomically, and returns its path."""
    run = RunFiles.read(run_dir)
    metric = str((run.manifest.get("task") or {}).get("metric") or "score")
    score = formatting.score_text(metric)
    templates = open_templates()
    templates.filters |= {
        "score": score,
        "bare": formatting.score_text(metric, unit=False),
        "percent": formatting.percent_text,
    }
    templates.filters["three"] = formatting.three_text
    templates.filters["epsilon"] = formatting.epsilon_text
    templates.filters["extra_metrics"] = formatting.extra_metrics_text
    templates.filters["gap"] = lambda gap: score(abs(gap)).replace("%", "points")
    page = templates.get_template("report.html.j2").render(
        m=run.manifest,
        run=run,
        head=_summary(run),
        metric=metric,
        curves=_curves(run, metric),
        traffic=_traffic_charts(run.traffic),
        prices=_prices(run.manifest.get("prices") or []),
        scores=_client_scores((run.result or {}).get("clients") or [], metric),
        distribution=_distribution(run.manifest),
        dropped=_dropped(run.rounds),
        confusion=_confusion(run),
    )
    path = run_dir / "report.html"
    write_atomic(path, page.encode())
    return path


def _curves(run: RunFiles, metric: str) -> Json:
    before = run.manifest.get("before") or {}
    levels = {"majority class": number(before.get("majority")), "before federation": number(before.get("score"))}
    scores = {row["round"]: number(row["score"]) for row in run.rounds if row.get("score") is not None}
    losses = {row["round"]: number(row.get("loss")) for row in run.rounds}
    return {
        "score": charts.line_chart(
            scores,
            formatting.score_text(metric),
            formatting.score_tick(metric),
            levels=levels,
            within=formatting.score_range(metric),
        ),
        "loss": charts.line_chart(losses, formatting.plain_text, formatting.plain_text),
    }


def _traffic_charts(traffic: Sequence[Json]) -> Json | None:
    """Returns the bars by round, and the running total, which starts with the one-off bytes."""
    by_round: dict[int, Counter[str]] = defaultdict(Counter)
    for row in traffic:
        if not _is_one_off(row):
            by_round[row["round"]][row["direction"]] += row["bytes"]
    if not by_round:
        return None
    total = sum(row["bytes"] for row in traffic if _is_one_off(row))
    running: dict[int, float | None] = {0: total}
    for r in sorted(by_round):
        running[r] = total = total + sum(by_round[r].values())
    line = charts.line_chart(running, formatting.bytes_text, formatting.bytes_tick, from_zero=True)
    return {"bars": charts.bar_chart(by_round), "running": line}


def _prices(prices: Sequence[Json]) -> Json:
    """Returns the prices with their multiple of this run and a bar, and the cheapest FedIT and FLoRA."""
    own = next((row["total_bytes"] for row in prices if row.get("this_run")), 0)
    most = max((row["total_bytes"] for row in prices), default=0) or 1
    rows = [
        {
            **row,
            "total": total_text(row),
            "times": row["total_bytes"] / own if own else None,
            "bar": round(100 * row["total_bytes"] / most, 2),
        }
        for row in prices
    ]
    cheapest = {method_of(row): row for row in reversed(baseline_prices(rows))}
    return {
        "rows": rows,
        "baselines": {BASELINES[method]: cheapest[method] for method in BASELINES if method in cheapest},
    }


def _client_scores(clients: Sequence[Json], metric: str) -> Json | None:
    """Returns the scores by client with mean and spread, separately for clients that never took part."""
    scored = [{**client, "unseen": client.get("unseen") or client.get("rounds") == 0} for client in clients]
    known = [client for client in scored if number(client.get("score")) is not None]
    if not known:
        return None
    axis = charts.Axis.around([client["score"] for client in known], 12, 348, within=formatting.score_range(metric))
    lanes: list[Json] = []
    score = formatting.score_text(metric)
    for unseen in (False, True):
        values = {client["name"]: float(client["score"]) for client in known if bool(client["unseen"]) == unseen}
        if values:
            of = values.values()
            spread = {"lowest": min(of), "median": median(of), "highest": max(of), "deviation": pstdev(of)}
            lane: Json = {"unseen": unseen, "clients": len(of), "dots": charts.swarm(axis, values, score)}
            lanes.append({**lane, **spread, "mean": fmean(of), "mean_x": axis(fmean(of))})
    return {"lanes": lanes, "ticks": axis.ticks(formatting.score_tick(metric)), "clients": scored}


def _distribution(manifest: Json) -> Json | None:
    """Returns the rows by client and label, each with a shade for its share of the client's rows."""
    clients = manifest.get("clients") or []
    if not clients:
        return None
    present = {label for client in clients for label in client.get("labels") or ()}
    task = manifest.get("task") or {}
    names = task.get("label_names") or []
    labels = [*names, *sorted(present - set(names))] if present else []
    shown = dict(zip(names, task.get("class_names") or names, strict=True))
    most = max(client["rows"] for client in clients) or 1
    rows = []
    for client in clients:
        counts = client.get("labels") or {}
        whole = sum(counts.values()) or 1
        cells = [(counts.get(label, 0), round((counts.get(label, 0) / whole) ** 0.5, 3)) for label in labels]
        rows.append({**client, "bar": round(100 * client["rows"] / most, 1), "cells": cells})
    return {
        "labels": [shown.get(label, label) for label in labels],
        "rows": rows,
        "total": sum(client["rows"] for client in clients),
    }


def _confusion(run: RunFiles) -> Json | None:
    """Returns the confusion matrix of the last scored round, with the recall of each class."""
    table = next((row["confusion"] for row in reversed(run.rounds) if row.get("confusion")), None)
    if table is None:
        return None
    task = run.manifest.get("task") or {}
    names = task.get("class_names") or task.get("label_names") or []
    rows = []
    for i, (name, counts) in enumerate(zip(names, table, strict=True)):
        whole = sum(counts)
        cells = [(count, round((count / (whole or 1)) ** 0.5, 3)) for count in counts]
        rows.append({"name": name, "rows": whole, "recall": counts[i] / whole if whole else None, "cells": cells})
    return {"names": names, "rows": rows}


def _dropped(rounds: Iterable[Json]) -> list[tuple[str, str, list[int]]]:
    """Returns (client, reason, rounds) for each reason for which a client's updates were dropped."""
    grouped: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rounds:
        for drop in row.get("dropped") or ():
            grouped[drop["client"], drop["reason"]].append(row["round"])
    return [(client, reason, when) for (client, reason), when in grouped.items()]
