"""The state of a coordinator: its processes, its last run, and every site as the door and the ledgers know it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fedsb.deployment.federation import CA, SERVER, read_federation
from fedsb.deployment.monitoring.files import by_age, modified, of_both, seconds_left, spent
from fedsb.reporting.report import RunFiles, document
from fedsb.utils.files import safe_name
from fedsb.utils.formatting import Json, number

PROCESSES = ("supervisor", "superlink", "server")
ONLINE_SECONDS = 30.0  # a site says that it is there every 7 s
ASKING = ("asked", "answered", "lost")  # a site, in the server's log
TROUBLES = ("died", "refused", "lost", "asking failed", "answer not there", "failed", "crashed")
RECENT = 5  # rounds whose middle time is that of those to come


def coordinator_state(folder: Path, now: float) -> Json:
    """Raises UserError for a folder, or a run in it, that cannot be read."""
    federation = read_federation(folder)
    wire = folder / "traffic.json"  # sites that are there change it every few seconds
    both, logs = of_both(folder, now, PROCESSES, TROUBLES, wire)
    asked = by_age((folder / "runs").glob("*.json"))  # what was to be run; the last one counts
    refused = None  # a run that `serve` was asked for last, and that did not start, where an earlier one did
    if not both["running"] and (begun := [path for path in asked if (path.with_suffix("") / "manifest.json").exists()]):
        refused = asked[-1].stem if asked[-1] != begun[-1] else None
        asked = begun
    run, part = _run(asked[-1], both, refused) if asked else (None, {})
    told = document(wire) or {}
    sites = []
    for name, entry in sorted(federation.sites.items()):
        at_door = told.get(name, {})
        seen = at_door.get("last_seen")
        ago = None if seen is None else max(0.0, now - seen)
        doing = "revoked" if entry.revoked else _doing(name, ago, logs["server"]) if both["running"] else "–"
        sites.append(
            {
                "name": name,
                "state": doing,
                "last_seen_seconds": ago,
                **part.get(name, _no_part()),
                "wire": {"up": at_door.get("bytes_in", 0), "down": at_door.get("bytes_out", 0)},
            }
        )
    ends = {"server": SERVER, "authority": CA}
    certificates = {name: seconds_left((folder / file).read_text(), now) for name, file in ends.items()}
    return {
        "kind": "coordinator",
        **both,
        "federation": {
            "id": federation.id,
            "address": federation.address,
            "serial": federation.serial,
            "certificates": certificates,
        },
        "run": run,
        "not_started": refused,
        "sites": sites,
    }


def _doing(site: str, ago: float | None, log: Sequence[Json]) -> str:
    if ago is None or ago > ONLINE_SECONDS:
        return "away"
    told = [line["event"] for line in log if line.get("site") == site and line["event"] in ASKING]
    return "working" if told and told[-1] == "asked" else "ready"


def _run(asked: Path, both: Json, refused: str | None) -> tuple[Json, dict[str, Json]]:
    """(the run that was asked for in this file, the part of each of its sites in it)."""
    folder = asked.with_suffix("")
    run = {"name": folder.name, "id": None, "rounds": 0, "finished": False}
    part: dict[str, Json] = {}
    if (folder / "manifest.json").exists():
        files = RunFiles.read(folder)
        run |= _course(folder, files)
        part = _by_site(folder, files)
    else:
        run["rounds_planned"] = (document(asked) or {}).get("rounds")
    if run["finished"]:
        state = "finished"
    elif both["running"]:
        state = "running" if run["id"] else "asking the sites"
    elif both["last_words"] is not None and refused is None:
        state = "failed"
    else:
        state = "stopped" if run["id"] else "not started"
    return {**run, "state": state}, part


def _course(folder: Path, files: RunFiles) -> Json:
    """How far a run has come, by what it wrote."""
    manifest, rounds = files.manifest, files.rounds
    last = rounds[-1] if rounds else {}
    planned = int(manifest["config"]["rounds"])
    seconds = [row["seconds"] for row in rounds[-RECENT:]]
    promised = manifest.get("privacy") or {}
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
        "epsilon": number(last.get("epsilon")),
        "epsilon_planned": number(promised.get("epsilon")),
        "delta": number(promised.get("delta")),
        "not_private": manifest.get("not_private"),
        "adapter": str(folder / "adapter") if (folder / "adapter" / "adapter_config.json").exists() else None,
        "course": [{key: row[key] for key in ("round", "loss", "score")} for row in rounds],
    }


def _no_part() -> Json:
    """Of a site in a run, before it has done anything."""
    return {"rounds": 0, "dropped": [], "bytes": {"up": 0, "down": 0}, "epsilon": None, "epsilon_fault": None}


def _by_site(folder: Path, files: RunFiles) -> dict[str, Json]:
    sites = {client["name"]: _no_part() for client in files.manifest.get("clients") or []}
    for row in files.rounds:
        reasons = {drop["client"]: drop["reason"] for drop in row["dropped"]}
        for name in row["cohort"]:
            site = sites.setdefault(name, _no_part())
            if name in reasons:
                site["dropped"].append({"round": row["round"], "reason": reasons[name]})
            else:
                site["rounds"] += 1
    for row in files.traffic:
        sites.setdefault(row["client"], _no_part())["bytes"][row["direction"]] += row["bytes"]
    delta = (files.manifest.get("privacy") or {}).get("delta")
    for name, site in sites.items():
        site["epsilon"], site["epsilon_fault"] = spent([folder / "privacy" / f"{safe_name(name)}.jsonl"], delta)
    return sites
