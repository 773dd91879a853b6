"""The state of a site: its processes, what left it, what its ledgers say was spent, and its own rules."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from fedsb.deployment.join_file import KEPT, read_join_file
from fedsb.deployment.monitoring.files import by_age, of_both, seconds_left, spent
from fedsb.privacy.plan import default_delta
from fedsb.reporting.report import document, lines
from fedsb.utils.errors import UserError
from fedsb.utils.files import safe_name
from fedsb.utils.formatting import Json

PROCESSES = ("supervisor", "node", "trainer")
TROUBLES = ("died", "refused", "failed", "crashed", "trouble", "trainer gone", "not wanted", "no heartbeat")
SITE = "site.toml"
BEAT_SECONDS = 7.0  # as flower_client.py has it


def site_state(folder: Path, now: float) -> Json:
    """Raises UserError for a folder that cannot be read. Nothing of the keys in its join file is told."""
    join = read_join_file(folder / KEPT)
    outbox = folder / "outbox.jsonl"
    both, logs = of_both(folder, now, PROCESSES, TROUBLES, outbox)
    runs = [_run(path, join.site) for path in by_age((folder / "runs").glob("*/run.json"))]
    certificates = {"authority": seconds_left(join.ca, now)}
    return {
        "kind": "site",
        **both,
        "site": join.site,
        "federation": {
            "id": join.federation,
            "address": join.address,
            "serial": join.directory.serial,
            "certificates": certificates,
        },
        "reached": _reached(logs["node"], now) if both["running"] else None,
        "rules": _rules(folder / SITE),
        "run": runs[-1] if runs else None,
        "runs": runs,
        "epsilon_all_runs": _together(folder, join.site, runs),
        "outbox": _outbox(lines(outbox)[0]),
    }


def _reached(node: Sequence[Json], now: float) -> Json:
    """Whether the coordinator was there when it was last asked, and since when it is so."""
    events = [line for line in node if line.get("event") in ("active", "trouble", "no heartbeat")]
    active = max((i for i, line in enumerate(events) if line["event"] == "active"), default=-1)
    after = events[active + 1 :]
    lost = [line for line in after if line["event"] == "trouble"]
    if after and not lost and now - after[-1]["at"] < 3 * BEAT_SECONDS:  # busy, and its heartbeat does not arrive
        lost = after
    if lost or active < 0:
        return {"yes": False, "since_seconds": max(0.0, now - lost[0]["at"]) if lost else None}
    return {"yes": True, "since_seconds": max(0.0, now - events[active]["at"])}


def _rules(path: Path) -> Json:
    """As site.toml has them; what is not set there is not limited."""
    try:
        found = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from error
    return {"data": found.get("data"), **found.get("allow", {})}


def _run(path: Path, site: str) -> Json:
    """A run that this site was asked into; `path` is its run.json."""
    folder, facts = path.parent, document(path) or {}
    config: Json = facts.get("config") or {}
    privacy: Json = config.get("privacy") or {}
    delta = None
    if privacy.get("unit") == "example" and (rows := facts.get("rows")):
        delta = default_delta("example", rows.values())[0] if privacy["delta"] == "auto" else float(privacy["delta"])
    used, fault = spent([_ledger(folder, site)], delta)
    done = [int(round.stem.removeprefix("round-")) for round in folder.glob("rounds/round-*.safetensors")]
    return {
        "id": folder.name,
        "name": config.get("name"),
        "method": (config.get("method") or {}).get("name"),
        "rounds": max(done, default=0),
        "rounds_planned": config.get("rounds"),
        "finished": (folder / "adapter" / "adapter_config.json").exists(),
        "epsilon": used,
        "epsilon_fault": fault,
        "delta": delta,
    }


def _ledger(run: Path, site: str) -> Path:
    return run / "privacy" / f"{safe_name(site)}.jsonl"


def _together(folder: Path, site: str, runs: Sequence[Json]) -> Json | None:
    """What all runs on this site's rows come to together; None for fewer than two that policy something."""
    private = [run for run in runs if run["delta"] is not None]
    if len(private) < 2:
        return None
    delta = max(run["delta"] for run in private)
    return {"epsilon": spent((_ledger(folder / "runs" / run["id"], site) for run in private), delta)[0], "delta": delta}


def _outbox(left: Sequence[Json]) -> Json:
    """What left, by what it was."""
    kinds: dict[str, Json] = {}
    for line in left:
        kind = kinds.setdefault(line["what"], {"messages": 0, "bytes": 0})
        kind["messages"] += 1
        kind["bytes"] += line["bytes"]
    return {
        "messages": len(left),
        "bytes": sum(kind["bytes"] for kind in kinds.values()),
        "kinds": kinds,
        "last": {key: left[-1].get(key) for key in ("time", "what", "round", "bytes")} if left else None,
    }
