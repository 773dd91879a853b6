"""The state of a coordinator: its processes, its last run, and every site's connection, traffic and epsilon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fedsb.deployment.monitoring.files import by_age, common_state, epsilon_spent, modified, seconds_left
from fedsb.deployment.registry import CA, SERVER, read_federation
from fedsb.reporting.report import RunFiles
from fedsb.reporting.run_directory import read_json
from fedsb.utils.files import safe_name
from fedsb.utils.formatting import Json, number

PROCESSES = ("supervisor", "superlink", "server")
ONLINE_SECONDS = 30.0  # since the last heartbeat, which a site sends every 7 s
REQUEST_EVENTS = ("asked", "answered", "lost")  # of a site, in the server's log
PROBLEMS = ("died", "refused", "lost", "asking failed", "answer not available", "failed", "crashed")
RECENT = 5  # rounds whose median time predicts that of the remaining ones


def coordinator_state(folder: Path, now: float) -> Json:
    """Returns the state. Raises UserError if the folder or a run in it cannot be read."""
    federation = read_federation(folder)
    wire = folder / "traffic.json"  # changes every few seconds while a site is online
    common, logs = common_state(folder, now, PROCESSES, PROBLEMS, wire)
    requested = by_age((folder / "runs").glob("*.json"))  # the settings of every run; the last one counts
    not_started = None  # the run of the last `serve`, if it did not start and an earlier run did
    started = [path for path in requested if (path.with_suffix("") / "manifest.json").exists()]
    if started and not common["running"]:
        not_started = requested[-1].stem if requested[-1] != started[-1] else None
        requested = started
    run, by_site = _run(requested[-1], common, not_started) if requested else (None, {})
    traffic = read_json(wire) or {}
    sites = []
    for name, entry in sorted(federation.sites.items()):
        counted = traffic.get(name, {})
        seen = counted.get("last_seen")
        ago = None if seen is None else max(0.0, now - seen)
        state = "revoked" if entry.revoked else _site_state(name, ago, logs["server"]) if common["running"] else "–"
        sites.append(
            {
                "name": name,
                "state": state,
                "last_seen_seconds": ago,
                **by_site.get(name, _no_rounds()),
                "wire": {"up": counted.get("bytes_in", 0), "down": counted.get("bytes_out", 0)},
            }
        )
    ends = {"server": SERVER, "authority": CA}
    certificates = {name: seconds_left((folder / file).read_text(), now) for name, file in ends.items()}
    return {
        "kind": "coordinator",
        **common,
        "federation": {
            "id": federation.id,
            "address": federation.address,
            "serial": federation.serial,
            "certificates": certificates,
        },
        "run": run,
        "not_started": not_started,
        "sites": sites,
    }


def _site_state(site: str, ago: float | None, log: Sequence[Json]) -> str:
    if ago is None or ago > ONLINE_SECONDS:
        return "offline"
    events = [line["event"] for line in log if line.get("site") == site and line["event"] in REQUEST_EVENTS]
    return "working" if events and events[-1] == "asked" else "ready"


def _run(settings: Path, common: Json, not_started: str | None) -> tuple[Json, dict[str, Json]]:
    """Returns the state of the run with these settings, and the figures of each of its sites."""
    folder = settings.with_suffix("")
    run = {"name": folder.name, "id": None, "rounds": 0, "finished": False}
    by_site: dict[str, Json] = {}
    if (folder / "manifest.json").exists():
        files = RunFiles.read(folder)
        run |= _progress(folder, files)
        by_site = _by_site(folder, files)
    else:
        run["rounds_planned"] = (read_json(settings) or {}).get("rounds")
    if run["finished"]:
        state = "finished"
    elif common["running"]:
        state = "running" if run["id"] else "waiting for the sites"
    elif common["last_error"] is not None and not_started is None:
        state = "failed"
    else:
        state = "stopped" if run["id"] else "not started"
    return {**run, "state": state}, by_site


def _progress(folder: Path, files: RunFiles) -> Json:
    """Returns a run's progress, from its files."""
    manifest, rounds = files.manifest, files.rounds
    last = rounds[-1] if rounds else {}
    planned = int(manifest["config"]["rounds"])
    seconds = [row["seconds"] for row in rounds[-RECENT:]]
    privacy = manifest.get("privacy") or {}
    return {
        "id": manifest["run"],
        "method": manifest["config"]["method"]["name"],
        "rounds": len(rounds),
        "rounds_planned": planned,
        "finished": files.result is not None,
        "loss": number(last.get("loss")),
        "score": files.score[0],
        "metric": (manifest.get("task") or {}).get("metric") or "score",
        "round_seconds": last.get("seconds"),
        "left_seconds": median(seconds) * (planned - len(rounds)) if seconds else None,
        "last_round_at": modified(folder / "rounds.jsonl"),
        "deadline_seconds": manifest["config"]["engine"]["deadline_s"],
        "epsilon": files.epsilon,
        "own_epsilon": files.own_epsilon,
        "epsilon_planned": number(privacy.get("epsilon")),
        "delta": number(privacy.get("delta")),
        "not_private": manifest.get("not_private"),
        "adapter": str(folder / "adapter") if (folder / "adapter" / "adapter_config.json").exists() else None,
        "history": [{key: row[key] for key in ("round", "loss", "score")} for row in rounds],
    }


def _no_rounds() -> Json:
    """Returns the figures of a site that has not taken part in a round."""
    return {"rounds": 0, "dropped": [], "bytes": {"up": 0, "down": 0}, "epsilon": None, "epsilon_fault": None}


def _by_site(folder: Path, files: RunFiles) -> dict[str, Json]:
    """Returns the rounds, drops, bytes and epsilon of every site."""
    sites = {client["name"]: _no_rounds() for client in files.manifest.get("clients") or []}
    for row in files.rounds:
        reasons = {drop["client"]: drop["reason"] for drop in row["dropped"]}
        for name in row["cohort"]:
            site = sites.setdefault(name, _no_rounds())
            if name in reasons:
                site["dropped"].append({"round": row["round"], "reason": reasons[name]})
            else:
                site["rounds"] += 1
    for row in files.traffic:
        sites.setdefault(row["client"], _no_rounds())["bytes"][row["direction"]] += row["bytes"]
    delta = (files.manifest.get("privacy") or {}).get("delta")
    for name, site in sites.items():
        site["epsilon"], site["epsilon_fault"] = epsilon_spent([folder / "privacy" / f"{safe_name(name)}.jsonl"], delta)
    return sites
