"""The state in words and rows of text, for the terminal and the page alike."""

from __future__ import annotations

import time
from collections import defaultdict

from fedsb.charts import GLUE, bytes_text, count_text, plain_text, score_text, seconds_text, three_text
from fedsb.status.files import Json

Row = dict[str, str]


def headline(state: Json) -> str:
    """What a run is at, in a few words."""
    run = state["run"]
    if run is None:
        return "no run yet"
    return f"{run['name']}: {run['rounds']} of {run['rounds_planned']} rounds, {stage(state)}"


def stage(state: Json) -> str:
    """Of a run, beside its rounds."""
    run = state["run"] or {}
    if state["kind"] == "site":
        return "finished" if run.get("finished") else "not finished"
    left = run.get("left_seconds")
    return str(run.get("state", "")) + (
        f", about {plain(seconds_text(left))} left" if run.get("state") == "running" and left else ""
    )


def facts(state: Json) -> Row:
    """The run's figures as text, those that are known."""
    run = state["run"] or {}
    found = {}
    if state["kind"] == "coordinator":
        found["method"] = run.get("method") or ""
        found["loss"] = plain_text(run.get("loss"))
        found[str(run.get("metric", "score")).replace("_", " ")] = score_text(run.get("metric") or "")(run.get("score"))
        found["a round"] = seconds_text(run.get("round_seconds"))
        up, down = (sum(site["bytes"][way] for site in state["sites"]) for way in ("up", "down"))
        found["all sites"] = f"{bytes_text(up)} up, {bytes_text(down)} down" if up or down else ""
    found["epsilon"] = epsilon_text(run)
    return {name: plain(text) for name, text in found.items() if text not in ("", "–")}


def epsilon_text(run: Json) -> str:
    return "" if run.get("epsilon") is None else f"{three_text(run['epsilon'])} {epsilon_of(run)}"


def epsilon_of(run: Json) -> str:
    """What belongs to an epsilon."""
    planned = run.get("epsilon_planned")
    return (
        f"of {three_text(planned)} " if planned is not None else ""
    ) + f"at delta {run['delta']:.2g}, by the ledgers"


def site_rows(state: Json) -> list[Row]:
    rows = []
    for site in state["sites"]:
        rows.append(
            {
                "site": site["name"],
                "state": site["state"],
                "last seen": _ago(site["last_seen_seconds"]),
                "rounds": str(site["rounds"]),
                "dropped": str(len(site["dropped"])),
                "up": bytes_text(site["bytes"]["up"]),
                "down": bytes_text(site["bytes"]["down"]),
                "epsilon": three_text(site["epsilon"]),
            }
        )
    return rows


def dropped_lines(state: Json) -> list[str]:
    """One for each site and reason."""
    lines = []
    for site in state["sites"]:
        by_reason: dict[str, list[int]] = defaultdict(list)
        for drop in site["dropped"]:
            by_reason[drop["reason"]].append(drop["round"])
        for reason, rounds in by_reason.items():
            last = ", ".join(map(str, rounds[-5:]))
            few = f"round{'s' * (len(rounds) > 1)} {last}"
            lines.append(
                f"{site['name']}, {few if len(rounds) <= 5 else f'{len(rounds)} rounds, last {last}'}: {reason}"
            )
    return lines


def process_rows(state: Json) -> list[Row]:
    return [
        {
            "process": process["name"],
            "pid": str(process["pid"]),
            "state": "alive" if process["alive"] else "dead",
            "up for": seconds_text(process["uptime_seconds"]),
            "deaths": str(process["deaths"]),
        }
        for process in state["processes"]
    ]


def trouble_lines(state: Json) -> list[str]:
    lines = []
    for line in state["troubles"]:
        often = f" ({line['times']} times)" if line["times"] > 1 else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["at"]))
        lines.append(f"{when}  {line['process']}  {line['event']}: {line['reason']:.300}{often}")
    return lines


def site_facts(state: Json) -> Row:
    """What a site says of itself beside its run."""
    reached, outbox, together = state["reached"], state["outbox"], state["epsilon_all_runs"]
    found = {}
    if reached is not None:
        since = "" if reached["since_seconds"] is None else f" for {seconds_text(reached['since_seconds'])}"
        found["coordinator"] = (
            f"{state['federation']['address']}, {'reached' if reached['yes'] else 'not reached'}{since}"
        )
    else:
        found["coordinator"] = state["federation"]["address"]
    found["left this site"] = f"{count_text(outbox['messages'])} messages, {bytes_text(outbox['bytes'])}"
    if (last := outbox["last"]) is not None:
        of = f" {last['round']}" if last["round"] else ""
        found["last"] = f"{last['what']}{of}, {bytes_text(last['bytes'])}, {last['time'].replace('T', ' ')[:19]} UTC"
    if together is not None:
        found["all runs"] = f"epsilon {three_text(together['epsilon'])} at delta {together['delta']:.2g} on these rows"
    rules = {key: value for key, value in state["rules"].items() if key != "data"}
    found["rows"] = str(state["rules"].get("data") or "?")
    found["rules"] = ", ".join(f"{key} = {value}" for key, value in rules.items()) or "none: whatever is asked is done"
    return {name: plain(text) for name, text in found.items()}


def run_rows(state: Json) -> list[Row]:
    """A site's runs, the last one first."""
    return [
        {
            "run": str(run["name"]),
            "id": run["id"],
            "method": str(run["method"]),
            "rounds": f"{run['rounds']} of {run['rounds_planned']}",
            "state": "finished" if run["finished"] else "",
            "epsilon": three_text(run["epsilon"]),
            "delta": "–" if run["delta"] is None else f"{run['delta']:.2g}",
        }
        for run in reversed(state["runs"])
    ]


def outbox_rows(state: Json) -> list[Row]:
    kinds = state["outbox"]["kinds"].items()
    return [
        {"what": what, "messages": count_text(sums["messages"]), "bytes": bytes_text(sums["bytes"])}
        for what, sums in kinds
    ]


def plain(text: str) -> str:
    """With spaces that may break over a line."""
    return text.replace(GLUE, " ")


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return "now" if seconds < 1.5 else f"{seconds_text(seconds)} ago"
