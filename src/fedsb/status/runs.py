"""A run as its folder tells it: rounds, what every site did in it, and what the ledgers say was spent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from fedsb.charts import number
from fedsb.disk import safe_name
from fedsb.errors import RunError, UserError
from fedsb.report import RunFiles
from fedsb.status.files import Json, document, modified

RECENT = 5  # rounds whose middle time is that of those to come


def run_state(folder: Path, asked: Json) -> tuple[Json, dict[str, Json]]:
    """(the run, what each of its sites did). `asked` is what the coordinator was told to run, before it has begun."""
    if not (folder / "manifest.json").exists():
        return {
            "name": folder.name,
            "id": None,
            "rounds": 0,
            "rounds_planned": asked.get("rounds"),
            "finished": False,
        }, {}
    files = RunFiles.read(folder)
    manifest, rounds = files.manifest, files.rounds
    last = rounds[-1] if rounds else {}
    planned = int(manifest["config"]["rounds"])
    seconds = [row["seconds"] for row in rounds[-RECENT:]]
    promised = manifest.get("privacy") or {}
    run = {
        "name": folder.name,
        "id": manifest["run"],
        "method": manifest["config"]["method"]["name"],
        "created": manifest.get("created"),
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
        "course": [{key: row[key] for key in ("round", "loss", "score", "up_bytes", "down_bytes")} for row in rounds],
    }
    return run, _by_site(folder, files)


def _by_site(folder: Path, files: RunFiles) -> dict[str, Json]:
    names = {client["name"] for client in files.manifest.get("clients") or []}
    names |= {name for row in files.rounds for name in row["cohort"]}
    promised = files.manifest.get("privacy") or {}
    sites: dict[str, Json] = {}
    for name in sorted(names):
        dropped = [
            {"round": row["round"], "reason": drop["reason"]}
            for row in files.rounds
            for drop in row["dropped"]
            if drop["client"] == name
        ]
        out = {drop["round"] for drop in dropped}
        own = [row for row in files.traffic if row["client"] == name]
        sites[name] = {
            "rounds": sum(name in row["cohort"] and row["round"] not in out for row in files.rounds),
            "dropped": dropped,
            "bytes": {way: sum(row["bytes"] for row in own if row["direction"] == way) for way in ("up", "down")},
            **spent(folder / "privacy" / f"{safe_name(name)}.jsonl", promised.get("delta")),
        }
    return sites


def spent(ledger: Path, delta: float | None) -> Json:
    """Epsilon by a site's ledger: None without one; where it cannot be read or summed up, also the reason."""
    from fedsb.privacy.accounting import epsilon
    from fedsb.privacy.ledger import merged, read_ledger

    if delta is None or not ledger.exists():
        return {"epsilon": None}
    try:
        return {"epsilon": epsilon(merged(read_ledger(ledger)), delta)}
    except (UserError, RunError) as error:
        return {"epsilon": None, "epsilon_fault": str(error)}


def asked_runs(federation: Path) -> Mapping[str, Json]:
    """What the coordinator was told to run, by name, the last one last."""
    paths = sorted((federation / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {path.stem: document(path) or {} for path in paths}
