"""The problems of a coordinator or a site, each with its remedy.

faults     something is wrong here: `status` exits with 2, /health returns 503
silence    no contact for too long: /health returns 503
warnings   nothing is stopped by it
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from fedsb.deployment.join_file import JOIN_FILE
from fedsb.utils.formatting import GLUE, Json, seconds_text

SILENT_SECONDS = 300.0
START_SECONDS = 60.0  # before a site that has not connected yet is a warning
SLACK_SECONDS = 300.0  # after a round's own deadline
SOON_SECONDS = 30 * 86400.0
KILLED = (
    "All processes were killed (a power cut, kill -9, out of memory). Completed rounds are on disk. Repeat the same "
    "command to continue."
)

Messages = Iterator[tuple[str, str]]  # kind, text


def health_of(state: Json) -> Json:
    """Returns {"ok": False, "faults": ["..."], "silence": [], "warnings": []}."""
    own = _of_coordinator if state["kind"] == "coordinator" else _of_site
    found: dict[str, list[str]] = {"faults": [], "silence": [], "warnings": []}
    for kind, text in (*_of_processes(state), *_of_certificates(state), *own(state)):
        found[kind].append(text)
    return {"ok": not found["faults"] and not found["silence"], **found}


def _of_processes(state: Json) -> Messages:
    if not state["running"]:
        if state["processes"]:
            yield "faults", KILLED
            return
        not_started, error = state.get("not_started"), state["last_error"]
        if error and not not_started:
            kind = "warnings" if state["run"] and state["run"].get("state") == "finished" else "faults"
            yield kind, f"The last command failed: {error}"
            return
        if not_started:
            yield "warnings", f"Run {not_started} did not start: {error or 'it was stopped before its first round'}"
        if remedy := _not_running(state):
            yield "faults", remedy
        return
    for child in state["processes"]:
        name, pid, deaths = child["name"], child["pid"], child["deaths"]
        logs = f"logs/{name}.jsonl and logs/{name}.out"
        if not child["alive"]:
            yield "faults", f"{name} (pid {pid}) is dead. Its supervisor restarts it. If this continues, see {logs}."
        if deaths:
            yield "warnings", f"{name} died {_times(deaths)} and was restarted. See {logs}."


def _not_running(state: Json) -> str | None:
    """Returns the command to start after a clean stop; None if the run is finished."""
    folder, run = shlex.quote(state["folder"]), state["run"]
    if state["kind"] == "site":
        join_file = shlex.quote(str(Path(state["folder"]) / JOIN_FILE))
        return f"The site is not running. Start it with `fedsb site join {join_file} --folder {folder}`."
    if run is None:
        return f"No run was started yet. Start one with `fedsb federation serve {folder} my.toml`."
    if run["state"] == "finished":
        return None
    after = (
        f"after round {run['rounds']} of {run['rounds_planned']}" if run["rounds"] else "before its first round ended"
    )
    return f"Run {run['name']} was stopped {after}. Repeat the same `fedsb federation serve {folder}` to continue it."


def _of_certificates(state: Json) -> Messages:
    renew = f"Run `fedsb federation renew {shlex.quote(state['folder'])}`, then serve again."
    for name, left in state["federation"]["certificates"].items():
        remedy = renew if name == "server" else "The coordinator must create a new federation with new join files."
        if left <= 0:
            yield "faults", f"The {name}'s certificate expired {-left / 86400:.0f} days ago. {remedy}"
        elif left < SOON_SECONDS:
            yield "warnings", f"The {name}'s certificate expires in {left / 86400:.0f} days. {remedy}"


def _of_coordinator(state: Json) -> Messages:
    for site in state["sites"]:
        if site["epsilon_fault"]:
            yield "faults", f"The ledger of {site['name']} cannot be used: {site['epsilon_fault']}"
    if not state["running"]:
        return
    if (age := state["last_event_seconds"]) is not None and age > SILENT_SECONDS:
        address = state["federation"]["address"]
        yield "silence", f"No site connected for {_time(age)}. Check that the sites can reach {address}."
    run = state["run"] or {}
    if run.get("state") == "running" and run["last_round_at"]:
        age = state["time"] - run["last_round_at"]
        if age > run["deadline_seconds"] + SLACK_SECONDS:
            yield "silence", f"No round was completed for {_time(age)}. See logs/server.jsonl."
    for line in state["problems"]:
        if line["event"] == "refused" and line["site"] and state["time"] - line["at"] < SILENT_SECONDS:
            yield "warnings", f"A request was refused {_time(state['time'] - line['at'])} ago: {line['reason']}."
    uptime = state["processes"][0]["uptime_seconds"] or 0.0
    for site in state["sites"]:
        if site["state"] == "offline" and (seen := site["last_seen_seconds"]) is not None:
            yield "warnings", f"{site['name']} is offline. Its last contact was {_time(seen)} ago."
        elif site["state"] == "offline" and uptime > START_SECONDS:
            yield "warnings", f"{site['name']} has not connected since the start, {_time(uptime)} ago."


def _of_site(state: Json) -> Messages:
    for run in state["runs"]:
        if run["epsilon_fault"]:
            yield "faults", f"The ledger of run {run['name']} cannot be used: {run['epsilon_fault']}"
    reached = state["reached"]
    if reached and not reached["yes"] and (age := reached["since_seconds"]) is not None:
        address = state["federation"]["address"]
        text = f"The coordinator at {address} has not been reached for {_time(age)}. This site keeps retrying."
        yield ("silence" if age > SILENT_SECONDS else "warnings"), text


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _time(seconds: float) -> str:
    return seconds_text(seconds).replace(GLUE, " ")
