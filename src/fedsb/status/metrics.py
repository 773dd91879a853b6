"""The state as Prometheus reads it: text format 0.0.4, units in names, nothing that is not known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fedsb.charts import number
from fedsb.status.files import Json

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = dict[str, str]


def exposition(state: Json) -> str:
    lines: list[str] = []
    for name, kind, meaning, samples in _metrics(state):
        known = [(labels, x) for labels, value in samples if (x := number(value)) is not None]
        if known:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_braces(labels)} {int(x) if x.is_integer() else x!r}" for labels, x in known]
    return "\n".join(lines) + "\n"


Samples = list[tuple[Labels, object]]
Metric = tuple[str, Literal["gauge", "counter"], str, Samples]


def _metrics(state: Json) -> Iterator[Metric]:
    run, children = state["run"] or {}, state["processes"]
    health = state["health"]
    yield "fedsb_healthy", "gauge", "1 where /health says 200.", [({}, int(health["ok"]))]
    counts: Samples = [({"kind": kind}, len(health[kind])) for kind in ("faults", "silence", "warnings")]
    yield "fedsb_health_messages", "gauge", "Messages about what is not well.", counts
    up: Samples = [({"process": child["name"]}, int(child["alive"])) for child in children]
    yield "fedsb_process_up", "gauge", "1 where the process is alive.", up
    uptime: Samples = [({"process": child["name"]}, child["uptime_seconds"]) for child in children]
    yield "fedsb_process_uptime_seconds", "gauge", "Since the process was started.", uptime
    deaths: Samples = [({"process": child["name"]}, child["deaths"]) for child in children]
    yield "fedsb_process_deaths_total", "counter", "Times that the process died and was started again.", deaths
    yield "fedsb_last_event_seconds", "gauge", "Since anything was heard or done.", [({}, state["last_event_seconds"])]
    left = state["federation"]["certificates"]
    certificates: Samples = [({"certificate": name}, seconds) for name, seconds in left.items()]
    yield "fedsb_certificate_expires_seconds", "gauge", "Until the certificate ends.", certificates
    if run:
        info = {key: str(run.get(key) or "") for key in ("name", "id", "method")}
        stage = str(run.get("state") or ("finished" if run["finished"] else ""))
        yield "fedsb_run_info", "gauge", "The run, in its labels.", [({**info, "state": stage}, 1)]
    yield "fedsb_round", "gauge", "Rounds that are finished.", [({}, run.get("rounds"))]
    yield "fedsb_rounds_planned", "gauge", "Rounds of the run.", [({}, run.get("rounds_planned"))]
    yield from _of_coordinator(state, run) if state["kind"] == "coordinator" else _of_site(state, run)


def _of_coordinator(state: Json, run: Json) -> Iterator[Metric]:
    sites = [({"site": site["name"]}, site) for site in state["sites"]]
    yield "fedsb_round_duration_seconds", "gauge", "Of the last round.", [({}, run.get("round_seconds"))]
    yield "fedsb_loss", "gauge", "Mean training loss of the last round.", [({}, run.get("loss"))]
    yield "fedsb_score", "gauge", "On the test rows.", [({"metric": str(run.get("metric") or "")}, run.get("score"))]
    yield "fedsb_epsilon_planned", "gauge", "What the run promises not to pass.", [({}, run.get("epsilon_planned"))]
    spent: Samples = [(label, site["epsilon"]) for label, site in sites]
    yield "fedsb_epsilon", "gauge", "Spent so far, by the site's ledger.", spent
    seen: Samples = [(label, site["last_seen_seconds"]) for label, site in sites]
    yield "fedsb_site_last_seen_seconds", "gauge", "Since the site was heard of.", seen
    there: Samples = [(label, int(site["state"] in ("ready", "working"))) for label, site in sites]
    yield "fedsb_site_up", "gauge", "1 where the site is there.", there
    took: Samples = [(label, site["rounds"]) for label, site in sites]
    yield "fedsb_site_rounds_total", "counter", "Rounds that the site's update went into.", took
    dropped: Samples = [(label, len(site["dropped"])) for label, site in sites]
    yield "fedsb_site_dropped_total", "counter", "Rounds that the site was dropped from.", dropped
    for name, key, meaning in (
        ("fedsb_bytes_total", "bytes", "Of values that the run sent, as its ledger counts them."),
        ("fedsb_wire_bytes_total", "wire", "Of HTTP at the door, since it was opened; before TLS."),
    ):
        ways: Samples = [
            ({**label, "direction": way}, site[key][way]) for label, site in sites for way in ("up", "down")
        ]
        yield name, "counter", meaning, ways


def _of_site(state: Json, run: Json) -> Iterator[Metric]:
    label = {"site": state["site"]}
    reached = state["reached"]
    if reached is not None:
        yield "fedsb_coordinator_up", "gauge", "1 where the coordinator was reached.", [({}, int(reached["yes"]))]
    yield "fedsb_epsilon", "gauge", "Spent so far in this run, by the site's ledger.", [(label, run.get("epsilon"))]
    together = state["epsilon_all_runs"] or {}
    spent: Samples = [(label, together.get("epsilon"))]
    yield "fedsb_epsilon_all_runs", "gauge", "Spent by all runs on this site's rows.", spent
    kinds = state["outbox"]["kinds"].items()
    messages: Samples = [({"what": what}, sums["messages"]) for what, sums in kinds]
    yield "fedsb_outbox_messages_total", "counter", "Messages that left this site.", messages
    size: Samples = [({"what": what}, sums["bytes"]) for what, sums in kinds]
    yield "fedsb_outbox_bytes_total", "counter", "Bytes that left this site, before the wire.", size


def _braces(labels: Labels) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""
