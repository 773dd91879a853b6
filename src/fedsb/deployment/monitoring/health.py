"""What is well and what is not, in words, each with what to do.

faults     something here is wrong: `fedsb status` exits with 2, /health says 503
silence    nothing has been heard for too long: /health says 503
warnings   worth a look; nothing is stopped by it
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from fedsb.deployment.join_file import KEPT
from fedsb.utils.formatting import GLUE, Json, seconds_text

SILENT_SECONDS = 300.0
START_SECONDS = 60.0  # before a site that has not come yet is worth a word
SLACK_SECONDS = 300.0  # beyond a round's own deadline
SOON_SECONDS = 30 * 86400.0
KILLED = "all was killed without a word (a power cut, kill -9, no memory); what was finished is on disk: start it again"

Found = Iterator[tuple[str, str]]  # the kind, and the text


def health_of(state: Json) -> Json:
    """{"ok": False, "faults": ["..."], "silence": [], "warnings": []}"""
    of_end = _of_coordinator if state["kind"] == "coordinator" else _of_site
    found: dict[str, list[str]] = {"faults": [], "silence": [], "warnings": []}
    for kind, text in (*_of_processes(state), *_of_certificates(state), *of_end(state)):
        found[kind].append(text)
    return {"ok": not found["faults"] and not found["silence"], **found}


def _of_processes(state: Json) -> Found:
    if not state["running"]:
        if state["processes"]:
            yield "faults", KILLED
            return
        refused = state.get("not_started")
        if state["last_words"] and not refused:
            kind = "warnings" if state["run"] and state["run"].get("state") == "finished" else "faults"
            yield kind, f"ended: {state['last_words']}"
            return
        if refused:
            yield (
                "warnings",
                f"{refused} did not start: {state['last_words'] or 'it was stopped before its first round'}",
            )
        if unused_settings := _idle(state):
            yield "faults", unused_settings
        return
    for child in state["processes"]:
        name, pid, deaths = child["name"], child["pid"], child["deaths"]
        see = f"see logs/{name}.jsonl and .out"
        if not child["alive"]:
            yield "faults", f"{name} (pid {pid}) is dead: its supervisor starts it again; {see} if this stays"
        if deaths:
            yield "warnings", f"{name} died (times: {deaths}) and was started again; {see}"


def _idle(state: Json) -> str | None:
    """What to start where all was stopped in order."""
    folder, run = shlex.quote(state["folder"]), state["run"]
    if state["kind"] == "site":
        return f"not running: fedsb join {shlex.quote(str(Path(state['folder']) / KEPT))} --folder {folder}"
    if run is None:
        return f"nothing was ever served: fedsb serve {folder} my.toml"
    if run["state"] == "finished":
        return None
    when = (
        f"after round {run['rounds']} of {run['rounds_planned']}" if run["rounds"] else "before the first round ended"
    )
    return f"{run['name']} was stopped {when}: start the same `fedsb serve {folder}` again"


def _of_certificates(state: Json) -> Found:
    renew = f"fedsb serve {shlex.quote(state['folder'])} --renew, then serve again"
    for name, left in state["federation"]["certificates"].items():
        remedy = renew if name == "server" else "the coordinator makes a new federation, which takes new join files"
        if left <= 0:
            yield "faults", f"the {name}'s certificate expired {-left / 86400:.0f} days ago: {remedy}"
        elif left < SOON_SECONDS:
            yield "warnings", f"the {name}'s certificate expires in {left / 86400:.0f} days: {remedy}"


def _of_coordinator(state: Json) -> Found:
    for site in state["sites"]:
        if site["epsilon_fault"]:
            yield "faults", f"the ledger of {site['name']}: {site['epsilon_fault']}"
    if not state["running"]:
        return
    if (age := state["last_event_seconds"]) is not None and age > SILENT_SECONDS:
        yield "silence", f"no site was heard of for {_time(age)}: can they reach {state['federation']['address']}?"
    run = state["run"] or {}
    if run.get("state") == "running" and run["last_round_at"]:
        age = state["time"] - run["last_round_at"]
        if age > run["deadline_seconds"] + SLACK_SECONDS:
            yield "silence", f"no round was finished for {_time(age)}: see logs/server.jsonl"
    for line in state["troubles"]:
        if line["event"] == "refused" and line["site"] and state["time"] - line["at"] < SILENT_SECONDS:
            yield "warnings", f"turned away at the door {_time(state['time'] - line['at'])} ago: {line['reason']}"
    uptime = state["processes"][0]["uptime_seconds"] or 0.0
    for site in state["sites"]:
        if site["state"] == "away" and (seen := site["last_seen_seconds"]) is not None:
            yield "warnings", f"{site['name']} is away: it was last heard of {_time(seen)} ago"
        elif site["state"] == "away" and uptime > START_SECONDS:
            yield "warnings", f"{site['name']} was not heard of since the start, {_time(uptime)} ago"


def _of_site(state: Json) -> Found:
    for run in state["runs"]:
        if run["epsilon_fault"]:
            yield "faults", f"a ledger: {run['epsilon_fault']}"
    reached = state["reached"]
    if reached and not reached["yes"] and (age := reached["since_seconds"]) is not None:
        address = state["federation"]["address"]
        text = f"the coordinator at {address} has not been reached for {_time(age)}; this site goes on trying"
        yield ("silence" if age > SILENT_SECONDS else "warnings"), text


def _time(seconds: float) -> str:
    return seconds_text(seconds).replace(GLUE, " ")
