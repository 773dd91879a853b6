"""faults.json as a page to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAID = 6  # lines of what was said, a row


def write_table(found: Mapping[str, Any], path: Path) -> None:
    lines = ["# Faults", "", "Made by `make faults`; all that was said is in faults.json.", ""]
    whole = found.get("unbroken")
    if whole:
        lines += [f"Unbroken: {whole['seconds_a_round']:.1f} s a round, adapter {whole['adapter'][:16]}.", ""]
    if "kills" in found and whole:
        lines += _kills(found["kills"], whole)
    if "answers" in found:
        lines += _answers(found["answers"])
    if "private" in found:
        lines += _private("A private run (privacy.unit = 'example'), killed again and again", found["private"])
    if "shared" in found:
        lines += _private("Shared noise, killed in every exchange of secure aggregation", found["shared"])
    lines += [f"Full disk: {found['full disk']}.", ""]
    path.write_text("\n".join(lines))


def _kills(kills: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    same = "bit-identical to the unbroken run's" if kills["adapter"] == whole["adapter"] else "ANOTHER ADAPTER"
    lost = f"dropped: {kills['dropped']}" if kills["dropped"] else "no site was dropped in any round"
    lines = [
        "## kill -9, in every phase, in one run",
        "",
        f"Lost: nothing. The final adapter is {same}, and {lost}. Seconds: from the kill until the round was",
        "complete (checkpoint: the round after it; opening: the basis; finish: the run), with the start of a process",
        "and its imports, on two cores with other load. A supervisor is started again at once, as a service manager",
        "does. The kills of the opening come one after the other, and so do those of the finish: the seconds of each",
        "include those after it.",
        "",
        "| phase | killed | in the phase | seconds | said |",
        "|---|---|---|---:|---|",
    ]
    for row in kills["rows"]:
        said = [line for line in row.get("said", ()) if "no heartbeat" not in line][:SAID]
        hit = "yes" if row["hit"] else "missed"
        lines.append(
            f"| {row['phase']} | {row['party']}: {row['process']} | {hit} | {row['seconds']} | {_cell(said)} |"
        )
    return [*lines, ""]


def _answers(answers: Mapping[str, Any]) -> list[str]:
    same = "the same, bit for bit, as" if answers["same_as_left_out"] else "ANOTHER than"
    lines = [
        "## Sites that misbehave, one after another in one run",
        "",
        f"Lost: those sites' updates of those rounds. The final adapter is {same} that of a run in one process which",
        "leaves just these out. Dropped besides: " + (", ".join(answers["unmeant"]) or "nobody") + ".",
        "",
        "| what it sends | site | dropped in round | back in | said |",
        "|---|---|---|---:|---|",
    ]
    for row in answers["rows"]:
        gone = ", ".join(map(str, row.get("dropped_in", ()))) or "none"
        back, said = row.get("back_in", ""), _cell([row.get("reason") or row["said"]])
        lines.append(f"| {row['fault']} | {row['site']} | {gone} | {back} | {said} |")
    return [*lines, ""]


def _private(title: str, private: Mapping[str, Any]) -> list[str]:
    good = all(row["equal"] and row["never_shorter"] for row in private["rows"])
    lines = [
        f"## {title}",
        "",
        "After each kill every site's ledger was compared with the coordinator's copy and with itself before: "
        + ("always equal, never shorter." if good else "NOT ALWAYS EQUAL."),
        f"Epsilon by round: {', '.join(f'{e:.2f}' for e in private['epsilon'])}.",
        "A round that a site had to do again is charged again. "
        f"{len(private['epsilon'])} rounds, and entries at the end: "
        + ", ".join(map(str, private["rows"][-1]["entries"].values()))
        + ".",
        *(f"Round {n}, {site}: {why}" for n, row in private["dropped"].items() for site, why in row.items()),
        "",
        "| killed | in | entries of each ledger | equal | never shorter |",
        "|---|---|---|---|---|",
    ]
    for row in private["rows"]:
        entries = ", ".join(map(str, row["entries"].values()))
        lines.append(f"| {row['killed']} | {row['in']} | {entries} | {row['equal']} | {row['never_shorter']} |")
    return [*lines, ""]


def _cell(lines: list[str]) -> str:
    return "; ".join(line.replace("|", "/").replace("\n", " ") for line in lines)
