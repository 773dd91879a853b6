"""The state of a coordinator: its processes, its run, and every site as the door and the ledgers know it."""

from __future__ import annotations

from pathlib import Path

from fedsb.deployment.federation import CA, SERVER, read_federation
from fedsb.status import health
from fedsb.status.files import Json, document, last_words, modified, processes, tail, troubles
from fedsb.status.runs import asked_runs, run_state

PROCESSES = ("supervisor", "superlink", "server")
ONLINE_SECONDS = 30.0  # a site says that it is there every 7 s
ASKING = ("asked", "answered", "lost")  # a site, in the server's log
EVENTS = ("died", "refused", "lost", "asking failed", "answer not there", "failed", "crashed")


def coordinator_state(folder: Path, now: float) -> Json:
    """Raises UserError for a folder, or a run in it, that cannot be read."""
    federation = read_federation(folder)
    children = processes(folder, now)
    serving = bool(children) and children[0]["alive"]
    asked = asked_runs(folder)
    run: Json | None = None
    took: dict[str, Json] = {}
    if asked:
        name = list(asked)[-1]
        run, took = run_state(folder / "runs" / name, asked[name])
        run["state"] = _state(run, serving=serving, failed=last_words(folder) is not None)
    logs = {name: tail(folder / "logs" / f"{name}.jsonl") for name in PROCESSES}
    wire = document(folder / "traffic.json") or {}
    state: Json = {
        "kind": "coordinator",
        "folder": str(folder),
        "time": now,
        "federation": {
            "id": federation.id,
            "address": federation.address,
            "serial": federation.serial,
            "certificates": {
                "server": health.expires(folder / SERVER) - now,
                "authority": health.expires(folder / CA) - now,
            },
            "authority_key_here": (folder / "ca.key").exists(),
            "join_files_here": sorted(path.stem for path in (folder / "joins").glob("*.join")),
        },
        "processes": children,
        "runs": list(asked),
        "run": run,
        "sites": [
            _site(name, entry.revoked, wire.get(name, {}), took.get(name), logs["server"], now, serving=serving)
            for name, entry in sorted(federation.sites.items())
        ],
        "last_event_seconds": _since(folder, now),
        "troubles": troubles(logs.items(), EVENTS),
        "last_words": None if serving else last_words(folder),
    }
    return {**state, "health": health.of_coordinator(state)}


def _state(run: Json, *, serving: bool, failed: bool) -> str:
    if run["finished"]:
        return "finished"
    if serving:
        return "running" if run["id"] else "asking the sites"
    if failed:
        return "failed"
    return "stopped" if run["id"] else "not started"


def _site(
    name: str, revoked: bool, wire: Json, took: Json | None, log: list[Json], now: float, *, serving: bool
) -> Json:
    seen = wire.get("last_seen")
    ago = None if seen is None else max(0.0, now - seen)
    return {
        "name": name,
        "state": _doing(name, revoked, ago, log) if serving or revoked else "–",
        "last_seen": seen,
        "last_seen_seconds": ago,
        "rounds": 0,
        "dropped": [],
        "bytes": {"up": 0, "down": 0},
        "epsilon": None,
        **(took or {}),
        "wire": {"requests": wire.get("requests", 0), "up": wire.get("bytes_in", 0), "down": wire.get("bytes_out", 0)},
    }


def _doing(name: str, revoked: bool, ago: float | None, log: list[Json]) -> str:
    if revoked:
        return "revoked"
    if ago is None or ago > ONLINE_SECONDS:
        return "away"
    told = [line["event"] for line in log if line.get("site") == name and line["event"] in ASKING]
    return "working" if told and told[-1] == "asked" else "ready"


def _since(folder: Path, now: float) -> float | None:
    """Seconds since anything was heard or done; sites that are there change traffic.json every few seconds."""
    youngest = modified(folder / "traffic.json", *(folder / "logs" / f"{name}.jsonl" for name in PROCESSES))
    return None if youngest is None else max(0.0, now - youngest)
