"""The state of a site: its processes, what it sent, the epsilon that its ledgers record, and its rules."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from fedsb.deployment.join_file import JOIN_FILE, read_join_file
from fedsb.deployment.monitoring.files import by_age, common_state, epsilon_spent, seconds_left
from fedsb.privacy.plan import default_delta
from fedsb.reporting.run_directory import read_json, read_lines
from fedsb.utils.errors import UserError
from fedsb.utils.files import safe_name
from fedsb.utils.formatting import Json

PROCESSES = ("supervisor", "node", "worker")
PROBLEMS = ("died", "refused", "failed", "crashed", "trouble", "worker gone", "not needed", "no heartbeat")
SITE = "site.toml"
HEARTBEAT_SECONDS = 7.0  # as in flower_client.py, which needs flwr


def site_state(folder: Path, now: float) -> Json:
    """Returns the state, without the keys in the join file. Raises UserError if the folder cannot be read."""
    join = read_join_file(folder / JOIN_FILE)
    outbox = folder / "outbox.jsonl"
    common, logs = common_state(folder, now, PROCESSES, PROBLEMS, outbox)
    runs = [_run(path, join.site) for path in by_age((folder / "runs").glob("*/run.json"))]
    certificates = {"authority": seconds_left(join.ca, now)}
    return {
        "kind": "site",
        **common,
        "site": join.site,
        "federation": {
            "id": join.federation,
            "address": join.address,
            "serial": join.directory.serial,
            "certificates": certificates,
        },
        "reached": _reached(logs["node"], now) if common["running"] else None,
        "rules": _rules(folder / SITE),
        "run": runs[-1] if runs else None,
        "runs": runs,
        "epsilon_all_runs": _all_runs(folder, join.site, runs),
        "outbox": _outbox(read_lines(outbox)[0]),
    }


def _reached(node: Sequence[Json], now: float) -> Json:
    """Returns whether the coordinator was reached at the last attempt, and since when."""
    events = [line for line in node if line.get("event") in ("active", "trouble", "no heartbeat")]
    active = max((i for i, line in enumerate(events) if line["event"] == "active"), default=-1)
    after = events[active + 1 :]
    lost = [line for line in after if line["event"] == "trouble"]
    if after and not lost and now - after[-1]["at"] < 3 * HEARTBEAT_SECONDS:  # busy, and no heartbeat arrives
        lost = after
    if lost or active < 0:
        return {"yes": False, "since_seconds": max(0.0, now - lost[0]["at"]) if lost else None}
    return {"yes": True, "since_seconds": max(0.0, now - events[active]["at"])}


def _rules(path: Path) -> Json:
    """Returns the rules in site.toml. A rule that is not set does not limit anything."""
    try:
        found = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from error
    return {"data": found.get("data"), **found.get("allow", {})}


def _run(path: Path, site: str) -> Json:
    """Returns the state of a run that the coordinator offered to this site; `path` is its run.json."""
    folder, facts = path.parent, read_json(path) or {}
    config: Json = facts.get("config") or {}
    privacy: Json = config.get("privacy") or {}
    delta = None
    if privacy.get("unit") == "example" and (rows := facts.get("rows")):
        delta = default_delta("example", rows.values())[0] if privacy["delta"] == "auto" else float(privacy["delta"])
    used, fault = epsilon_spent([_ledger(folder, site)], delta)
    done = [int(round.stem.removeprefix("round-")) for round in folder.glob("rounds/round-*.safetensors")]
    return {
        "id": folder.name,
        "name": config.get("name"),
        "method": (config.get("method") or {}).get("name"),
        "rounds": max(done, default=0),
        "rounds_planned": config.get("rounds"),
        "finished": (folder / "adapter" / "adapter_config.json").exists(),
        "epsilon": used,
        "own_epsilon": epsilon_spent([_ledger(folder, site)], delta, alone=True)[0],
        "epsilon_fault": fault,
        "delta": delta,
    }


def _ledger(run: Path, site: str) -> Path:
    return run / "privacy" / f"{safe_name(site)}.jsonl"


def _all_runs(folder: Path, site: str, runs: Sequence[Json]) -> Json | None:
    """Returns the epsilon of all private runs on this site's rows together; None for fewer than two."""
    private = [run for run in runs if run["delta"] is not None]
    if len(private) < 2:
        return None
    delta = max(run["delta"] for run in private)
    ledgers = [_ledger(folder / "runs" / run["id"], site) for run in private]
    own = epsilon_spent(ledgers, delta, alone=True)[0]
    return {"epsilon": epsilon_spent(ledgers, delta)[0], "own_epsilon": own, "delta": delta}


def _outbox(sent: Sequence[Json]) -> Json:
    """Returns the number and the bytes of the messages that this site sent, by their kind."""
    kinds: dict[str, Json] = {}
    for line in sent:
        kind = kinds.setdefault(line["what"], {"messages": 0, "bytes": 0})
        kind["messages"] += 1
        kind["bytes"] += line["bytes"]
    return {
        "messages": len(sent),
        "bytes": sum(kind["bytes"] for kind in kinds.values()),
        "kinds": kinds,
        "last": {key: sent[-1].get(key) for key in ("time", "what", "round", "bytes")} if sent else None,
    }
