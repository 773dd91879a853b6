"""The state for Prometheus, with units in the names. Unknown values are left out.

A name that ends in _total is a counter, all others are gauges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedsb.utils.formatting import Json, number

__all__ = ["CONTENT_TYPE_LATEST", "exposition"]

Labels = dict[str, str]
Fact = tuple[str, str, object]  # name, description, and a value or a list of (labels, value)


def exposition(state: Json) -> str:
    """Returns the state in Prometheus' text format."""
    return generate_latest(_State(state)).decode()


@dataclass(frozen=True)
class _State(Collector):
    state: Json

    def collect(self) -> Iterator[Metric]:
        for name, description, value in (*_common(self.state), *_of_site(self.state), *_of_coordinator(self.state)):
            samples: Sequence[tuple[Labels, object]] = value if isinstance(value, list) else [({}, value)]
            known = [(labels, x) for labels, value in samples if (x := _number(value)) is not None]
            if not known:
                continue
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, description, labels=list(known[0][0]))
            for labels, x in known:
                family.add_metric(list(labels.values()), x)
            yield family


def _common(state: Json) -> Iterator[Fact]:
    run, health, children = state["run"] or {}, state["health"], state["processes"]
    yield "fedsb_healthy", "1 if /health answers with 200.", health["ok"]
    messages = [({"kind": kind}, health[kind]) for kind in ("faults", "silence", "warnings")]
    yield "fedsb_health_messages", "Messages about problems.", messages
    yield "fedsb_process_up", "1 if the process is alive.", _each("process", children, "alive")
    yield "fedsb_process_uptime_seconds", "Time since its start.", _each("process", children, "uptime_seconds")
    yield "fedsb_process_deaths_total", "Times that it died and was restarted.", _each("process", children, "deaths")
    yield "fedsb_last_event_seconds", "Time since the last event.", state["last_event_seconds"]
    left = [({"certificate": name}, seconds) for name, seconds in state["federation"]["certificates"].items()]
    yield "fedsb_certificate_expires_seconds", "Time until the certificate expires.", left
    if run:
        info = {key: str(run.get(key) or "") for key in ("name", "id", "method")}
        info["state"] = run.get("state") or ("finished" if run["finished"] else "")
        yield "fedsb_run_info", "The run, described by labels.", [(info, 1)]
    yield "fedsb_round", "Completed rounds.", run.get("rounds")
    yield "fedsb_rounds_planned", "Rounds of the run.", run.get("rounds_planned")


def _of_site(state: Json) -> Iterator[Fact]:
    if state["kind"] != "site":
        return
    site, run, together = {"site": state["site"]}, state["run"] or {}, state["epsilon_all_runs"] or {}
    kinds = [{"name": what, **kind} for what, kind in state["outbox"]["kinds"].items()]
    yield "fedsb_coordinator_up", "1 if the coordinator was reached.", (state["reached"] or {}).get("yes")
    yield "fedsb_epsilon", "Epsilon spent in this run, by the site's ledger.", [(site, run.get("epsilon"))]
    yield "fedsb_own_epsilon", "Epsilon in this run if all other clients collude.", [(site, run.get("own_epsilon"))]
    yield "fedsb_epsilon_all_runs", "Epsilon spent by all runs on this site's data.", [(site, together.get("epsilon"))]
    yield "fedsb_outbox_messages_total", "Messages that this site sent.", _each("what", kinds, "messages")
    yield "fedsb_outbox_bytes_total", "Bytes that this site sent, before transport.", _each("what", kinds, "bytes")


def _of_coordinator(state: Json) -> Iterator[Fact]:
    if state["kind"] != "coordinator":
        return
    run, sites = state["run"] or {}, state["sites"]
    yield "fedsb_round_duration_seconds", "Duration of the last round.", run.get("round_seconds")
    yield "fedsb_loss", "Mean training loss of the last round.", run.get("loss")
    yield "fedsb_score", "Score on the test rows.", [({"metric": str(run.get("metric") or "")}, run.get("score"))]
    yield "fedsb_epsilon_planned", "Largest epsilon that the run may spend.", run.get("epsilon_planned")
    yield "fedsb_epsilon", "Epsilon spent so far, by the site's ledger.", _each("site", sites, "epsilon")
    yield (
        "fedsb_site_last_seen_seconds",
        "Time since its last message.",
        _each("site", sites, "last_seen_seconds"),
    )
    up = [({"site": site["name"]}, site["state"] in ("ready", "working")) for site in sites]
    yield "fedsb_site_up", "1 if the site is connected.", up
    yield "fedsb_site_rounds_total", "Rounds that used the site's update.", _each("site", sites, "rounds")
    yield "fedsb_site_dropped_total", "Rounds that the site was dropped from.", _each("site", sites, "dropped")
    yield "fedsb_bytes_total", "Bytes of values that the run sent, by its traffic record.", _both_ways(sites, "bytes")
    yield "fedsb_wire_bytes_total", "Bytes of HTTP since the server started, before TLS.", _both_ways(sites, "wire")


def _each(label: str, things: Sequence[Json], key: str) -> list[tuple[Labels, object]]:
    return [({label: thing["name"]}, thing[key]) for thing in things]


def _both_ways(sites: Sequence[Json], key: str) -> list[tuple[Labels, object]]:
    return [({"site": site["name"], "direction": way}, x) for site in sites for way, x in site[key].items()]


def _number(value: object) -> float | None:
    """Returns a number; 1 and 0 for true and false, the length of a list, None for an unknown value."""
    return number(len(value) if isinstance(value, list) else int(value) if isinstance(value, bool) else value)
