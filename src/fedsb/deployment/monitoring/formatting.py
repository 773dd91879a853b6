"""Formats the state as text, for both the terminal and the page."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

from fedsb.utils.formatting import (
    Json,
    Show,
    bytes_text,
    count_text,
    delta_text,
    epsilon_text,
    plain_text,
    score_text,
    seconds_text,
)

Row = dict[str, str]


def owner(state: Json) -> str:
    """Returns which site or federation the state is of."""
    federation = state["federation"]
    if state["kind"] == "site":
        return f"Site {state['site']} of federation {federation['id']}"
    return f"Federation {federation['id']} at {federation['address']}"


def headline(state: Json) -> str:
    """Returns the progress of the run in one line."""
    run = state["run"]
    return f"{run['name']}: {run['rounds']} of {run['rounds_planned']} rounds, {stage(run)}" if run else "No run yet"


def stage(run: Json) -> str:
    """Returns the state of a run, with the time left."""
    if "state" not in run:  # a site's
        return "finished" if run["finished"] else "not finished"
    left = run.get("left_seconds") if run["state"] == "running" else None
    return f"{run['state']}, about {seconds_text(left)} left" if left else str(run["state"])


def epsilon_note(run: Json) -> str:
    """Returns the planned epsilon and the delta of a run."""
    planned = run.get("epsilon_planned")
    of = "" if planned is None else f"of {epsilon_text(planned)} "
    return f"{of}at delta {run['delta']:.2g}"


def sections(state: Json) -> list[tuple[str, Row | list[Row] | list[str]]]:
    """Returns the sections that have content: a title, and facts by name, rows of a table, or lines."""
    found: list[tuple[str, Row | list[Row] | list[str]]]
    if state["kind"] == "coordinator":
        sites = _table(
            ({**site, **site["bytes"]} for site in state["sites"]),
            "name state last_seen_seconds rounds dropped up down epsilon",
        )
        found = [("Run", _facts(_of_run(state))), ("Sites", sites), ("Dropped updates", _dropped(state))]
    else:
        runs = _table(reversed(state["runs"]), "name id method rounds rounds_planned finished epsilon delta")
        sent = _table(
            ({"message": what, **kind} for what, kind in state["outbox"]["kinds"].items()), "message messages bytes"
        )
        found = [("Site", _facts(_of_site(state))), ("Runs", runs), ("Messages sent", sent)]
    processes = _table(state["processes"], "name pid alive uptime_seconds deaths")
    found += [("Processes", processes), ("Recent problems", _problems(state))]
    return [(title, content) for title, content in found if content]


def _facts(found: Iterator[tuple[str, str]]) -> Row:
    return {name: text for name, text in found if text not in ("", "–")}


def _of_run(state: Json) -> Iterator[tuple[str, str]]:
    """Yields the figures that are not in the headline."""
    run = state["run"] or {}
    yield "method", run.get("method") or ""
    yield "loss", plain_text(run.get("loss"))
    yield run.get("metric", "score").replace("_", " "), score_text(run.get("metric") or "")(run.get("score"))
    yield "time per round", seconds_text(run.get("round_seconds"))
    up, down = (sum(site["bytes"][way] for site in state["sites"]) for way in ("up", "down"))
    yield "bytes sent", f"{bytes_text(up)} up, {bytes_text(down)} down, all sites" if up or down else ""
    yield from _epsilon(run)


def _epsilon(run: Json) -> Iterator[tuple[str, str]]:
    if run.get("epsilon") is not None:
        yield "epsilon spent", f"{epsilon_text(run['epsilon'])} {epsilon_note(run)}"
    if run.get("own_epsilon") is not None:
        yield "epsilon, own share", f"{epsilon_text(run['own_epsilon'])} if all other clients collude"


def _of_site(state: Json) -> Iterator[tuple[str, str]]:
    """Yields the figures of a site that do not belong to one of its runs."""
    reached, outbox, all_runs = state["reached"], state["outbox"], state["epsilon_all_runs"]
    yield from _epsilon(state["run"] or {})
    contact = ""
    if reached is not None:
        since = "" if reached["since_seconds"] is None else f" for {seconds_text(reached['since_seconds'])}"
        contact = f", {'connected' if reached['yes'] else 'not reached'}{since}"
    yield "coordinator", state["federation"]["address"] + contact
    yield "sent", f"{count_text(outbox['messages'])} messages, {bytes_text(outbox['bytes'])}"
    if (last := outbox["last"]) is not None:
        of = f" {last['round']}" if last["round"] else ""
        yield (
            "last message",
            f"{last['what']}{of}, {bytes_text(last['bytes'])}, {last['time'].replace('T', ' ')[:19]} UTC",
        )
    if all_runs is not None:
        own = all_runs["own_epsilon"]
        also = "" if own is None else f" ({epsilon_text(own)} by own shares of noise)"
        text = f"{epsilon_text(all_runs['epsilon'])}{also} at delta {delta_text(all_runs['delta'])}"
        yield "epsilon spent, all runs", text
    rules = [f"{key} = {value}" for key, value in state["rules"].items() if key != "data"]
    yield "data", str(state["rules"].get("data") or "?")
    yield "rules", ", ".join(rules) or "none: every request is accepted"


def _dropped(state: Json) -> list[str]:
    """Returns one line for each site and reason."""
    by_reason: dict[tuple[str, str], list[int]] = defaultdict(list)
    for site in state["sites"]:
        for drop in site["dropped"]:
            by_reason[site["name"], drop["reason"]].append(drop["round"])
    return [
        f"{name}, round {last}{f' and {len(before)} earlier' if before else ''}: {reason}"
        for (name, reason), (*before, last) in by_reason.items()
    ]


def _table(things: Iterable[Json], keys: str) -> list[Row]:
    """Returns a row per thing, with these keys of the state as its cells."""
    headings = {key: key.removesuffix("_seconds").replace("_", " ") for key in keys.split()}
    return [{name: FORMS.get(key, _plain)(thing[key]) for key, name in headings.items()} for thing in things]


def _plain(value: object) -> str:
    """Returns a value as text; the length of a list."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2g}"
    return "–" if value is None else str(len(value) if isinstance(value, list) else value)


def _problems(state: Json) -> list[str]:
    lines = []
    for line in state["problems"]:
        often = f" ({line['times']} times)" if line["times"] > 1 else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["at"]))
        lines.append(f"{when}  {line['process']}  {line['event']}: {line['reason']:.300}{often}")
    return lines


def _ago(seconds: object) -> str:
    return "–" if seconds is None else f"{seconds_text(seconds)} ago"


FORMS: dict[str, Show] = {  # of a table's cells
    "last_seen_seconds": _ago,
    "uptime_seconds": seconds_text,
    "bytes": bytes_text,
    "up": bytes_text,
    "down": bytes_text,
    "epsilon": epsilon_text,
}
