"""What is well and what is not, in words, each with what to do.

faults     something here is wrong: `fedsb status` exits with 2, /health says 503
silence    nothing has been heard for too long: /health says 503
warnings   worth a look; nothing is stopped by it
"""

from __future__ import annotations

import shlex
from pathlib import Path

from cryptography import x509

from fedsb.charts import GLUE, seconds_text
from fedsb.deployment.join_file import KEPT
from fedsb.status.files import Json

SILENT_SECONDS = 300.0
START_SECONDS = 60.0  # before a site that has not come yet is worth a word
SLACK_SECONDS = 300.0  # beyond a round's own deadline
BEAT_SECONDS = 7.0  # as flower_client.py has it
SOON_SECONDS = 30 * 86400.0
DOWN = "{name} (pid {pid}) is dead: its supervisor starts it again; see logs/{name}.out and .jsonl if this stays"
KILLED = "all was killed without a word (a power cut, kill -9, no memory); what was finished is on disk: start it again"


def of_coordinator(state: Json) -> Json:
    run, children = state["run"], state["processes"]
    folder = shlex.quote(state["folder"])
    faults, silence, warnings = _processes(state), list[str](), list[str]()
    if run is None and not children:
        faults.append(f"nothing was ever served: fedsb serve {folder} my.toml")
    elif not children and run["state"] != "finished" and not faults:
        faults.append(f"stopped after round {run['rounds']} of {run['rounds_planned']}: fedsb serve {folder} again")
    renew = f"fedsb serve {folder} --renew, then serve again"
    _certificate("the server's certificate", state["federation"]["certificates"]["server"], renew, faults, warnings)
    anew = "make a new federation, which takes new join files"
    _certificate("the authority", state["federation"]["certificates"]["authority"], anew, faults, warnings)
    for site in state["sites"]:
        if "epsilon_fault" in site:
            faults.append(f"the ledger of {site['name']}: {site['epsilon_fault']}")
    if _alive(children):
        if (age := state["last_event_seconds"]) is not None and age > SILENT_SECONDS:
            silence.append(f"no site was heard of for {_time(age)}: can they reach {state['federation']['address']}?")
        done, deadline = (run or {}).get("last_round_at"), (run or {}).get("deadline_seconds")
        if done and deadline and state["time"] - done > deadline + SLACK_SECONDS and run["state"] == "running":
            silence.append(f"no round was finished for {_time(state['time'] - done)}: see logs/server.jsonl")
        warnings += [*_deaths(children), *_absent(state, children[0]["uptime_seconds"])]
    return _all(faults, silence, warnings)


def of_site(state: Json) -> Json:
    children, reached = state["processes"], state["reached"]
    faults, silence, warnings = _processes(state), list[str](), list[str]()
    if not children and not faults:
        folder = Path(state["folder"])
        here, join = shlex.quote(str(folder)), shlex.quote(str(folder / KEPT))
        faults.append(f"not running: fedsb join {join} --folder {here}")
    ask = "ask the coordinator for a new join file"
    _certificate("the federation's authority", state["federation"]["certificates"]["authority"], ask, faults, warnings)
    if state["ledger_fault"]:
        faults.append(f"a ledger: {state['ledger_fault']}")
    warnings += _deaths(children)
    if _alive(children) and reached["since_seconds"] is not None and not reached["yes"]:
        age = reached["since_seconds"]
        text = f"the coordinator at {state['federation']['address']} has not been reached for {_time(age)}"
        (silence if age > SILENT_SECONDS else warnings).append(f"{text}; this site goes on trying")
    return _all(faults, silence, warnings)


def expires(certificate: Path) -> float:
    """When a certificate ends, seconds since 1970."""
    return expires_pem(certificate.read_text())


def expires_pem(certificate: str) -> float:
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc.timestamp()


def _processes(state: Json) -> list[str]:
    children = state["processes"]
    if not children:
        return [f"ended: {state['last_words']}"] if state["last_words"] else []
    if not _alive(children):
        return [KILLED]
    return [DOWN.format(**child) for child in children if not child["alive"]]


def _alive(children: list[Json]) -> bool:
    return bool(children) and bool(children[0]["alive"])


def _deaths(children: list[Json]) -> list[str]:
    again = "and was started again; see logs/{name}.jsonl and .out"
    return [
        f"{child['name']} died (times: {child['deaths']}) {again.format(**child)}"
        for child in children
        if child["deaths"]
    ]


def _absent(state: Json, uptime: float | None) -> list[str]:
    absent = []
    for site in state["sites"]:
        seen = site["last_seen_seconds"]
        if site["state"] == "away" and seen is not None:
            absent.append(f"{site['name']} is away: it was last heard of {_time(seen)} ago")
        elif site["state"] == "away" and (uptime or 0.0) > START_SECONDS:
            absent.append(f"{site['name']} was not heard of since the start, {_time(uptime or 0.0)} ago")
    return absent


def _certificate(what: str, left: float, remedy: str, faults: list[str], warnings: list[str]) -> None:
    if left <= 0:
        faults.append(f"{what} expired {-left / 86400:.0f} days ago: {remedy}")
    elif left < SOON_SECONDS:
        warnings.append(f"{what} expires in {left / 86400:.0f} days: {remedy}")


def _all(faults: list[str], silence: list[str], warnings: list[str]) -> Json:
    return {"ok": not faults and not silence, "faults": faults, "silence": silence, "warnings": warnings}


def _time(seconds: float) -> str:
    return seconds_text(seconds).replace(GLUE, " ")
