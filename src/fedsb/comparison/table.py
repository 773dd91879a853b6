"""Formats a comparison as tables of text, for the terminal, table.md and the page."""

from __future__ import annotations

from typing import Any

from fedsb.utils.formatting import GLUE, PERCENT, bytes_text, score_text, seconds_text

Json = dict[str, Any]
COSTS = {"one-off": "one_off", "up": "up", "down": "down", "total": "total", "without head": "total_less_head"}


def score_table(found: Json) -> list[dict[str, str]]:
    """Returns a row per contender: rate, score, difference from the reference, time and memory."""
    name = (found["metric"] or "score").replace("_", " ")
    rows = []
    for row in found["contenders"]:
        cells = {"contender": row["contender"], "rank": str(row["rank"]), "lr": _rate(row), name: _score(row, found)}
        if any(other["test_error"] is not None for other in found["contenders"]):
            cells["test error"] = _test_error(row["test_error"], found)
        if len(found["contenders"]) > 1:
            cells[f"difference from {found['reference']}"] = _difference(row, found)
        cells |= {"time": seconds_text(row["seconds"]), "memory": bytes_text(row["peak_memory_bytes"])}
        rows.append(cells)
    return rows


def byte_table(found: Json) -> list[dict[str, str]]:
    """Returns a row per contender: bytes of all clients in a whole run, and whether it is on the Pareto front."""
    show = score_text(found["metric"] or "")
    rows = []
    for row in found["contenders"]:
        cells = {"contender": row["contender"]}
        cells |= {title: bytes_text(row["bytes"][key]) for title, key in COSTS.items()}
        if found["target"] is not None:
            cells[f"bytes to reach {show(found['target'])}"] = _to_target(row)
        cells["on front"] = "control" if row["is_control"] else "yes" if row["on_front"] else "no"
        rows.append(cells)
    return rows


def notes(found: Json) -> list[str]:
    """Returns the notes that explain the tables."""
    metric = (found["metric"] or "score").replace("_", " ")
    many = f"mean ± standard deviation over {found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    lower = "" if found["higher_is_better"] else " (lower is better)"
    lines = [f"{metric.capitalize()}{lower} of the last round, {many}{_context(found)}."]
    if any(row["test_error"] is not None for row in found["contenders"]):
        lines.append(
            f"Test error: the standard error due to {found['test_rows']:,} test rows. More seeds do not reduce it. "
            "A difference below twice its test error can be chance, even if all seeds agree. It treats the two scores "
            "as independent, so it is an upper bound."
        )
    lines += [
        f"{row['contender']} is a control that trains the adapter of {row['control_of']} (rank {row['rank']})."
        for row in found["contenders"]
        if row["control_of"] is not None
    ]
    if found["trials"]:
        lines.append(
            f"lr: the best of {found['trials']} rates tried per contender on seed 0, scored on {found['tune_share']:g} "
            "of every client's training rows, which those trials did not train on."
        )
    if any(row["lr_at_boundary"] for row in found["contenders"]):
        lines.append("* The best rate is the highest or the lowest tried. More trials may find a better one.")
    lines.append(
        "Bytes: of the tensors, all clients and all rounds. Without head: without the task head that every method "
        "sends. On front: no other contender reaches the same score with fewer bytes."
    )
    if privacy := found.get("privacy"):
        lines.append(privacy["says"])
    if len(found["versions"]) > 1:
        lines.append(f"The runs are from several versions of fedsb: {'; '.join(found['versions'])}.")
    lines += [f"Failed: {name}: {' '.join(why.split())}" for name, why in found["failed"].items()]
    return lines


def markdown(found: Json) -> str:
    """Returns table.md: one table with all columns, and the notes."""
    rows = [a | b for a, b in zip(score_table(found), byte_table(found), strict=True)]
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], *(row.values() for row in rows))]
    text = "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], "", "  \n".join(notes(found))]) + "\n"
    return text.replace(GLUE, " ").replace("\n* ", "\n\\* ")  # a note, not a list


def spread_text(metric: str, of: Json | None) -> str:
    """Returns "92.9 ± 0.8 %" for {"mean": 0.929, "sd": 0.008}; a dash for None."""
    show = score_text(metric, unit=False)
    if of is None or of["sd"] is None:
        return show(of["mean"] if of else None)
    if metric in PERCENT:
        return f"{100 * of['mean']:.1f} ± {100 * of['sd']:.1f} %".replace(" ", GLUE)
    return f"{show(of['mean'])} ± {show(of['sd'])}".replace(" ", GLUE)


def difference_text(metric: str, of: Json | None) -> str:
    """Returns "+0.5 ± 0.3 points" for a share, "+0.047 ± 0.012" for other metrics."""
    if of is None:
        return "–"
    times, digits, unit = (100, 1, " points") if metric in PERCENT else (1, 3, "")
    sd = "" if of["sd"] is None else f" ± {times * of['sd']:.{digits}f}"
    return f"{times * of['mean']:+.{digits}f}{sd}{unit}".replace(" ", GLUE).replace("-", "−")


def _rate(row: Json) -> str:
    return "–" if row["lr"] is None else f"{row['lr']:g}{'*' if row['lr_at_boundary'] else ''}"


def _score(row: Json, found: Json) -> str:
    done = [score for score in row["scores"] if score is not None]
    missing = f", {len(done)} of {found['seeds']} seeds" if 0 < len(done) < found["seeds"] else ""
    return spread_text(found["metric"] or "", row["score"]) + missing


def _difference(row: Json, found: Json) -> str:
    if row["contender"] == found["reference"]:
        return "reference"
    gap = row["difference"]
    text = difference_text(found["metric"] or "", gap)
    if gap is None:
        return text
    error = "" if gap["test_error"] is None else f", test error {_test_error(gap['test_error'], found)}"
    return f"{text}, better in {gap['wins']} of {gap['of']}{error}"


def _test_error(error: float | None, found: Json) -> str:
    if error is None:
        return "–"
    return f"{100 * error:.1f} points".replace(" ", GLUE) if found["metric"] in PERCENT else f"{error:.3f}"


def _to_target(row: Json) -> str:
    reach = row["bytes_to_target"]
    if not reach["reached"]:
        return "not reached" if reach["of"] else "–"
    return f"{bytes_text(reach['mean'])} ({reach['reached']} of {reach['of']})"


def _context(found: Json) -> str:
    show = score_text(found["metric"] or "")
    parts = [("before federation", found["before"]), ("the majority class", found["majority"])]
    return "".join(f"; {name} {show(of['mean'])}" for name, of in parts if of is not None)
