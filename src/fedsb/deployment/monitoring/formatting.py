"""The state in words and rows of text, for the terminal and the page alike."""

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


def whose(state: Json) -> str:
    federation = state["federation"]
    if state["kind"] == "site":
        return f"Site {state['site']} of federation {federation['id']}"
    return f"Federation {federation['id']}, which sites reach at {federation['address']}"


def headline(state: Json) -> str:
    """What a run is at, in a few words."""
    run = state["run"]
    return f"{run['name']}: {run['rounds']} of {run['rounds_planned']} rounds, {stage(run)}" if run else "no run yet"


def stage(run: Json) -> str:
    """Of a run, beside its rounds."""
    if "state" not in run:  # a site's
        return "finished" if run["finished"] else "not finished"
    left = run.get("left_seconds") if run["state"] == "running" else None
    return f"{run['state']}, about {seconds_text(left)} left" if left else str(run["state"])


def epsilon_of(run: Json) -> str:
    """What belongs to an epsilon."""
    planned = run.get("epsilon_planned")
    of = "" if planned is None else f"of {epsilon_text(planned)} "
    return f"{of}at delta {run['delta']:.2g}, by the ledgers"


def sections(state: Json) -> list[tuple[str, Row | list[Row] | list[str]]]:
    """All of it but what stands above: (title, facts by name, or rows of a table, or lines). None is empty."""
    found: list[tuple[str, Row | list[Row] | list[str]]]
    if state["kind"] == "coordinator":
        sites = _table(
            ({**site, **site["bytes"]} for site in state["sites"]),
            "name state last_seen_seconds rounds dropped up down epsilon",
        )
        found = [("Run", _facts(_of_run(state))), ("Sites", sites), ("Dropped", _dropped(state))]
    else:
        runs = _table(reversed(state["runs"]), "name id method rounds rounds_planned finished epsilon delta")
        left = _table(
            ({"what": what, **kind} for what, kind in state["outbox"]["kinds"].items()), "what messages bytes"
        )
        found = [("This site", _facts(_of_site(state))), ("Runs", runs), ("What left", left)]
    processes = _table(state["processes"], "name pid alive uptime_seconds deaths")
    found += [("Processes", processes), ("Lately", _troubles(state))]
    return [(title, content) for title, content in found if content]


def _facts(found: Iterator[tuple[str, str]]) -> Row:
    return {name: text for name, text in found if text not in ("", "–")}


def _of_run(state: Json) -> Iterator[tuple[str, str]]:
    """Figures that are not in the headline."""
    run = state["run"] or {}
    yield "method", run.get("method") or ""
    yield "loss", plain_text(run.get("loss"))
    yield run.get("metric", "score").replace("_", " "), score_text(run.get("metric") or "")(run.get("score"))
    yield "a round", seconds_text(run.get("round_seconds"))
    up, down = (sum(site["bytes"][way] for site in state["sites"]) for way in ("up", "down"))
    yield "all sites", f"{bytes_text(up)} up, {bytes_text(down)} down" if up or down else ""
    yield from _epsilon(run)


def _epsilon(run: Json) -> Iterator[tuple[str, str]]:
    if run.get("epsilon") is not None:
        yield "epsilon", f"{epsilon_text(run['epsilon'])} {epsilon_of(run)}"


def _of_site(state: Json) -> Iterator[tuple[str, str]]:
    """What a site says of itself beside its runs."""
    reached, outbox, together = state["reached"], state["outbox"], state["epsilon_all_runs"]
    yield from _epsilon(state["run"] or {})
    there = ""
    if reached is not None:
        since = "" if reached["since_seconds"] is None else f" for {seconds_text(reached['since_seconds'])}"
        there = f", {'reached' if reached['yes'] else 'not reached'}{since}"
    yield "coordinator", state["federation"]["address"] + there
    yield "left this site", f"{count_text(outbox['messages'])} messages, {bytes_text(outbox['bytes'])}"
    if (last := outbox["last"]) is not None:
        of = f" {last['round']}" if last["round"] else ""
        yield "last", f"{last['what']}{of}, {bytes_text(last['bytes'])}, {last['time'].replace('T', ' ')[:19]} UTC"
    if together is not None:
        yield (
            "all runs",
            f"epsilon {epsilon_text(together['epsilon'])} at delta {delta_text(together['delta'])} on these rows",
        )
    rules = [f"{key} = {value}" for key, value in state["rules"].items() if key != "data"]
    yield "rows", str(state["rules"].get("data") or "?")
    yield "rules", ", ".join(rules) or "none: whatever is asked is done"


def _dropped(state: Json) -> list[str]:
    """One for each site and reason."""
    by_reason: dict[tuple[str, str], list[int]] = defaultdict(list)
    for site in state["sites"]:
        for drop in site["dropped"]:
            by_reason[site["name"], drop["reason"]].append(drop["round"])
    return [
        f"{name}, round {last}{f' and {len(before)} before' if before else ''}: {reason}"
        for (name, reason), (*before, last) in by_reason.items()
    ]


def _table(things: Iterable[Json], keys: str) -> list[Row]:
    """A row for each, its cells by their keys in the state."""
    headings = {key: key.removesuffix("_seconds").replace("_", " ") for key in keys.split()}
    return [{name: FORMS.get(key, _plain)(thing[key]) for key, name in headings.items()} for thing in things]


def _plain(value: object) -> str:
    """Of a list, how many."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2g}"
    return "–" if value is None else str(len(value) if isinstance(value, list) else value)


def _troubles(state: Json) -> list[str]:
    lines = []
    for line in state["troubles"]:
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
