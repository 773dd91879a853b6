"""The state as Prometheus reads it: text format 0.0.4, units in names, nothing that is not known.

A name that ends in _total is a counter, any other a gauge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsb.utils.formatting import Json, number

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = dict[str, str]
Metric = tuple[str, str, object]  # name, meaning, and a value or samples, which have labels


def exposition(state: Json) -> str:
    lines: list[str] = []
    for name, meaning, value in (*_of_both(state), *_of_site(state), *_of_coordinator(state)):
        samples: Sequence[tuple[Labels, object]] = value if isinstance(value, list) else [({}, value)]
        known = [(labels, x) for labels, value in samples if (x := _number(value)) is not None]
        if known:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_braces(labels)} {int(x) if x.is_integer() else x!r}" for labels, x in known]
    return "\n".join(lines) + "\n"


def _of_both(state: Json) -> Iterator[Metric]:
    run, health, children = state["run"] or {}, state["health"], state["processes"]
    yield "fedsb_healthy", "1 where /health says 200.", health["ok"]
    messages = [({"kind": kind}, health[kind]) for kind in ("faults", "silence", "warnings")]
    yield "fedsb_health_messages", "Messages about what is not well.", messages
    yield "fedsb_process_up", "1 where the process is alive.", _each("process", children, "alive")
    yield "fedsb_process_uptime_seconds", "Since its start.", _each("process", children, "uptime_seconds")
    yield (
        "fedsb_process_deaths_total",
        "Times that it died and was started again.",
        _each("process", children, "deaths"),
    )
    yield "fedsb_last_event_seconds", "Since anything was heard or done.", state["last_event_seconds"]
    left = [({"certificate": name}, seconds) for name, seconds in state["federation"]["certificates"].items()]
    yield "fedsb_certificate_expires_seconds", "Until the certificate ends.", left
    if run:
        info = {key: str(run.get(key) or "") for key in ("name", "id", "method")}
        info["state"] = run.get("state") or ("finished" if run["finished"] else "")
        yield "fedsb_run_info", "The run, in its labels.", [(info, 1)]
    yield "fedsb_round", "Rounds that are finished.", run.get("rounds")
    yield "fedsb_rounds_planned", "Rounds of the run.", run.get("rounds_planned")


def _of_site(state: Json) -> Iterator[Metric]:
    if state["kind"] != "site":
        return
    of, run, together = {"site": state["site"]}, state["run"] or {}, state["epsilon_all_runs"] or {}
    kinds = [{"name": what, **kind} for what, kind in state["outbox"]["kinds"].items()]
    yield "fedsb_coordinator_up", "1 where the coordinator was reached.", (state["reached"] or {}).get("yes")
    yield "fedsb_epsilon", "Spent so far in this run, by the site's ledger.", [(of, run.get("epsilon"))]
    yield "fedsb_epsilon_all_runs", "Spent by all runs on this site's rows.", [(of, together.get("epsilon"))]
    yield "fedsb_outbox_messages_total", "Messages that left this site.", _each("what", kinds, "messages")
    yield "fedsb_outbox_bytes_total", "Bytes that left this site, before the wire.", _each("what", kinds, "bytes")


def _of_coordinator(state: Json) -> Iterator[Metric]:
    if state["kind"] != "coordinator":
        return
    run, sites = state["run"] or {}, state["sites"]
    yield "fedsb_round_duration_seconds", "Of the last round.", run.get("round_seconds")
    yield "fedsb_loss", "Mean training loss of the last round.", run.get("loss")
    yield "fedsb_score", "On the test rows.", [({"metric": str(run.get("metric") or "")}, run.get("score"))]
    yield "fedsb_epsilon_planned", "What the run promises not to pass.", run.get("epsilon_planned")
    yield "fedsb_epsilon", "Spent so far, by the site's ledger.", _each("site", sites, "epsilon")
    yield "fedsb_site_last_seen_seconds", "Since the site was heard of.", _each("site", sites, "last_seen_seconds")
    there = [({"site": site["name"]}, site["state"] in ("ready", "working")) for site in sites]
    yield "fedsb_site_up", "1 where the site is there.", there
    yield "fedsb_site_rounds_total", "Rounds that the site's update went into.", _each("site", sites, "rounds")
    yield "fedsb_site_dropped_total", "Rounds that the site was dropped from.", _each("site", sites, "dropped")
    yield "fedsb_bytes_total", "Of values that the run sent, as its ledger counts them.", _both_ways(sites, "bytes")
    yield "fedsb_wire_bytes_total", "Of HTTP at the door, since it was opened; before TLS.", _both_ways(sites, "wire")


def _each(label: str, things: Sequence[Json], key: str) -> list[tuple[Labels, object]]:
    return [({label: thing["name"]}, thing[key]) for thing in things]


def _both_ways(sites: Sequence[Json], key: str) -> list[tuple[Labels, object]]:
    return [({"site": site["name"], "direction": way}, x) for site in sites for way, x in site[key].items()]


def _number(value: object) -> float | None:
    """1 for what is true; of a list, how many."""
    return number(len(value) if isinstance(value, list) else int(value) if isinstance(value, bool) else value)


def _braces(labels: Labels) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""
