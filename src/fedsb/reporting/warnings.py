"""Finds the problems of a run in its own files, for the terminal, the report, the model card and result.json.

    one_class           the model predicts one class for every test row
    not_above_majority  the score is not above that of always predicting one class
    never_counted       clients whose updates were dropped in every round in which they took part
    loss_rose           the training loss is higher at the end than at the start

All functions are pure functions of the manifest and of rounds.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

ROSE = 1.05  # relative to the loss of the first round; smaller changes are noise of small batches
SHOWN = 5


def run_warnings(manifest: Json, rounds: Sequence[Json]) -> list[dict[str, str]]:
    """Returns {"kind", "text"} for each problem, the most serious first."""
    found = [
        ("never_counted", _never_counted(manifest, rounds)),
        ("one_class", _one_class(manifest, rounds)),
        ("not_above_majority", _not_above_majority(manifest, rounds)),
        ("loss_rose", _loss_rose(rounds)),
    ]
    return [{"kind": kind, "text": text} for kind, text in found if text]


def counted_rounds(rounds: Sequence[Json], client: str) -> int:
    """Returns the number of rounds in which the client's update was aggregated."""
    return sum(client in row["cohort"] and not _was_dropped(row, client) for row in rounds)


def _was_dropped(row: Json, client: str) -> bool:
    return any(drop["client"] == client for drop in row.get("dropped") or ())


def _never_counted(manifest: Json, rounds: Sequence[Json]) -> str:
    clients = [client for client in manifest.get("clients") or [] if not client.get("unseen")]
    sampled = [client for client in clients if any(client["name"] in row["cohort"] for row in rounds)]
    lost = [client for client in sampled if not counted_rounds(rounds, client["name"])]
    if not lost:
        return ""
    rows, total = sum(client["rows"] for client in lost), sum(client["rows"] for client in clients) or 1
    names = ", ".join(client["name"] for client in lost[:SHOWN]) + (", ..." if len(lost) > SHOWN else "")
    reasons = {
        drop["reason"] for row in rounds for drop in row.get("dropped") or () if drop["client"] == lost[0]["name"]
    }
    return (
        f"The updates of {len(lost)} of {len(sampled)} clients ({names}) were dropped in every round. {rows:,} of "
        f"{total:,} training rows ({rows / total:.0%}) did not change the model. Reason for {lost[0]['name']}: "
        f"{min(reasons)}"
    )


def _last_scored(rounds: Sequence[Json]) -> Json | None:
    return next((row for row in reversed(rounds) if row.get("score") is not None), None)


def _one_class(manifest: Json, rounds: Sequence[Json]) -> str:
    row = _last_scored(rounds)
    table = row.get("confusion") if row else None
    if not table:
        return ""
    task = manifest.get("task") or {}
    names = task.get("class_names") or task.get("label_names") or []
    predicted = [sum(line[i] for line in table) for i in range(len(table))]
    true = [sum(line) for line in table]
    classes = [i for i, count in enumerate(predicted) if count]
    if len(classes) != 1:
        return ""
    if sum(count > 0 for count in true) == 1:
        return f"All test rows have the class {names[classes[0]]!r}. The score does not cover the other classes."
    return (
        f"The model predicts the class {names[classes[0]]!r} for all {sum(true):,} test rows. It has not learned to "
        "distinguish the classes. Train longer, change train.lr or train.head_lr, or check the class balance."
    )


def _not_above_majority(manifest: Json, rounds: Sequence[Json]) -> str:
    row, before = _last_scored(rounds), manifest.get("before") or {}
    known = [value for key in ("majority", "majority_of_test") if (value := before.get(key)) is not None]
    if row is None or not known or row["score"] > max(known):
        return ""
    metric = str((manifest.get("task") or {}).get("metric") or "score").replace("_", " ")
    return (
        f"The {metric} of {row['score']:.4f} is not above {max(known):.4f}, which always predicting one class reaches."
    )


def _loss_rose(rounds: Sequence[Json]) -> str:
    losses = [row["loss"] for row in rounds if row.get("loss") is not None]
    if len(losses) < 2 or not losses[-1] > ROSE * losses[0]:
        return ""
    return (
        f"The training loss rose from {losses[0]:.4g} in the first round to {losses[-1]:.4g} in the last one. The "
        "learning rate (train.lr, train.head_lr) is probably too high."
    )
