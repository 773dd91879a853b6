"""The state of a site: its processes, what left it, what its ledgers say was spent, and its own rules."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from fedsb.deployment.join_file import KEPT, JoinFile, read_join_file
from fedsb.disk import safe_name
from fedsb.errors import RunError, UserError
from fedsb.privacy.accounting import epsilon
from fedsb.privacy.ledger import Entry, merged, read_ledger
from fedsb.privacy.plan import default_delta
from fedsb.status import health
from fedsb.status.files import Json, document, last_words, modified, processes, rows, tail, troubles

EVENTS = ("died", "refused", "failed", "crashed", "trouble", "trainer gone", "not wanted")
SITE = "site.toml"


def site_state(folder: Path, now: float) -> Json:
    """Raises UserError for a folder that cannot be read."""
    join = read_join_file(folder / KEPT)
    children = processes(folder, now)
    logs = {name: tail(folder / "logs" / f"{name}.jsonl") for name in ("supervisor", "node", "trainer")}
    running = bool(children) and children[0]["alive"]
    runs, fault = _runs(folder, join.site)
    lines = rows(folder / "outbox.jsonl")
    state: Json = {
        "kind": "site",
        "folder": str(folder),
        "time": now,
        "site": join.site,
        "federation": _federation(join, now),
        "processes": children,
        "reached": _reached(logs["node"], now) if running else None,
        "rules": _rules(folder / SITE),
        "run": runs[-1] if runs else None,
        "runs": runs,
        "epsilon_all_runs": _together(folder, join.site, runs),
        "ledger_fault": fault,
        "outbox": _outbox(lines),
        "last_event_seconds": _since(folder, now),
        "troubles": troubles(logs.items(), EVENTS),
        "last_words": None if running else last_words(folder),
    }
    return {**state, "health": health.of_site(state)}


def _federation(join: JoinFile, now: float) -> Json:
    """Nothing of the keys in the file."""
    return {
        "id": join.federation,
        "address": join.address,
        "serial": join.directory.serial,
        "sites": list(join.directory.sites),
        "certificates": {"authority": health.expires_pem(join.ca) - now},
    }


def _reached(node: list[Json], now: float) -> Json:
    """Whether the coordinator was there when it was last asked, and since when it is so."""
    events = [line for line in node if line.get("event") in ("active", "trouble", "no heartbeat")]
    active = [i for i, line in enumerate(events) if line["event"] == "active"]
    after = events[active[-1] + 1 :] if active else events
    lost = [line for line in after if line["event"] == "trouble"]
    if (
        not lost and after and now - after[-1]["at"] < 3 * health.BEAT_SECONDS
    ):  # busy, and its heartbeat does not arrive
        lost = after
    if lost or not active:
        return {"yes": False, "since_seconds": max(0.0, now - lost[0]["at"]) if lost else None}
    return {"yes": True, "since_seconds": max(0.0, now - events[active[-1]]["at"])}


def _rules(path: Path) -> Json:
    """As site.toml has them; what is not set there is not limited."""
    try:
        found = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from error
    return {"data": found.get("data"), **found.get("allow", {})}


def _runs(folder: Path, site: str) -> tuple[list[Json], str | None]:
    """(every run that this site was asked into, the last one last; why a ledger cannot be summed up)."""
    paths = sorted((folder / "runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    found, fault = [], None
    for path in paths:
        facts = document(path) or {}
        config: Json = facts.get("config") or {}
        done = [int(round.stem.removeprefix("round-")) for round in path.parent.glob("rounds/round-*.safetensors")]
        run: Json = {
            "id": path.parent.name,
            "name": config.get("name"),
            "method": (config.get("method") or {}).get("name"),
            "rounds": max(done, default=0),
            "rounds_planned": config.get("rounds"),
            "last_round_at": modified(*path.parent.glob("rounds/round-*.safetensors")),
            "finished": (path.parent / "adapter" / "adapter_config.json").exists(),
            "epsilon": None,
            "delta": _delta(config, facts.get("rows") or {}),
            "epsilon_allowed_by_run": (config.get("privacy") or {}).get("epsilon"),
        }
        try:
            run["epsilon"] = _spent(_entries(path.parent, site), run["delta"])
        except (UserError, RunError) as error:
            fault = str(error)
        found.append(run)
    return found, fault


def _delta(config: Json, by_site: dict[str, int]) -> float | None:
    privacy: Json = config.get("privacy") or {}
    if privacy.get("unit") != "example" or not by_site:
        return None
    return default_delta("example", by_site.values())[0] if privacy["delta"] == "auto" else float(privacy["delta"])


def _entries(run: Path, site: str) -> tuple[Entry, ...]:
    path = run / "privacy" / f"{safe_name(site)}.jsonl"
    return read_ledger(path) if path.exists() else ()


def _spent(entries: tuple[Entry, ...], delta: float | None) -> float | None:
    return epsilon(merged(entries), delta) if entries and delta is not None else None


def _together(folder: Path, site: str, runs: list[Json]) -> Json | None:
    """What all runs on this site's rows come to together; None for fewer than two that promise something."""
    private = [run for run in runs if run["delta"] is not None]
    if len(private) < 2:
        return None
    delta = max(run["delta"] for run in private)
    try:
        entries = [entry for run in private for entry in _entries(folder / "runs" / run["id"], site)]
        return {"epsilon": _spent(tuple(entries), delta), "delta": delta}
    except (UserError, RunError):  # it is said in "ledger_fault"
        return None


def _outbox(lines: list[Json]) -> Json:
    """What left, by what it was."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for line in lines:
        count[line["what"]] += 1
        size[line["what"]] += line["bytes"]
    last: dict[str, Any] | None = None
    if lines:
        last = {key: lines[-1].get(key) for key in ("time", "what", "round", "bytes", "values", "sha256")}
    return {
        "messages": sum(count.values()),
        "bytes": sum(size.values()),
        "kinds": {what: {"messages": count[what], "bytes": size[what]} for what in count},
        "last": last,
    }


def _since(folder: Path, now: float) -> float | None:
    logs = (folder / "logs" / f"{name}.jsonl" for name in ("supervisor", "node", "trainer"))
    youngest = modified(folder / "outbox.jsonl", *logs)
    return None if youngest is None else max(0.0, now - youngest)
