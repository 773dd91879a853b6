"""Reads the files that coordinators and sites have in common, while processes write them."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509

from fedsb.deployment.logs import ENDED
from fedsb.privacy.accounting import epsilon
from fedsb.privacy.ledger import merged, read_ledger
from fedsb.reporting.run_directory import read_json
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.formatting import Json

TAIL_BYTES = 2**18  # of a log: about a thousand lines
CLOCK_SECONDS = 5.0  # largest difference between the kernel's two clocks
MAX_PROBLEMS = 8

Logs = Mapping[str, Sequence[Json]]


def common_state(
    folder: Path, now: float, names: Sequence[str], problems: Sequence[str], contact: Path
) -> tuple[Json, Logs]:
    """Returns the common part of both states, and the last lines of each process's log.

    Args:
        folder: of the coordinator or the site.
        now: seconds since 1970.
        names: of the processes.
        problems: the log events that are shown as problems.
        contact: a file that is written whenever the other side was in contact.
    """
    paths = {name: folder / "logs" / f"{name}.jsonl" for name in names}
    logs = {name: tail(path) for name, path in paths.items()}
    children = _processes(folder, now, logs["supervisor"])
    running = bool(children) and bool(children[0]["alive"])
    newest = modified(contact, *paths.values())
    state = {
        "folder": str(folder),
        "time": now,
        "running": running,
        "processes": children,
        "last_event_seconds": None if newest is None else max(0.0, now - newest),
        "problems": _problems(logs, problems),
        "last_error": None if running else _last_error(logs["supervisor"]),
    }
    return state, logs


def tail(path: Path) -> list[Json]:
    """Returns the last lines of a log, each with its time in seconds since 1970 ("at"). Leaves out incomplete lines."""
    lines: list[Json] = []
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in file.read().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                found = json.loads(line)
                lines.append({**found, "at": datetime.datetime.fromisoformat(found["time"]).timestamp()})
    return lines


def modified(*paths: Path) -> float | None:
    """Returns when the newest of these files was written; None if none of them exists."""
    times = []
    for path in paths:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=None)


def by_age(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths by the time of their last change, the newest last."""
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def seconds_left(certificate: str, now: float) -> float:
    """Returns the seconds until a certificate expires."""
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc.timestamp() - now


def epsilon_spent(
    ledgers: Iterable[Path], delta: float | None, *, alone: bool = False
) -> tuple[float | None, str | None]:
    """Returns the epsilon of these ledgers together, and the reason if it cannot be computed.

    Both are None without a ledger and without a delta. `alone`: by the site's own share of the noise; None if it has
    always added all of it.
    """
    existing = [path for path in ledgers if path.exists()]
    if delta is None or not existing:
        return None, None
    try:
        releases = merged(entry for path in existing for entry in read_ledger(path))
        if alone and all(release.own_sigma is None for release in releases):
            return None, None
        return epsilon(releases, delta, alone=alone), None
    except (UserError, RunError) as error:
        return None, str(error)


def _processes(folder: Path, now: float, log: Sequence[Json]) -> list[Json]:
    """Returns the processes of pids.json, the supervisor first, and whether each is alive; none after a clean stop."""
    pids, written = read_json(folder / "pids.json"), modified(folder / "pids.json")
    if pids is None or written is None:
        return []
    started = {name: _start_time(int(pid)) for name, pid in pids.items()}
    since = (started["supervisor"] or 0.0) - CLOCK_SECONDS
    died = Counter(line.get("child") for line in log if line.get("event") == "died" and line["at"] >= since)
    children = []
    for name, start in started.items():
        # The number may have been reused, after a restart of the machine or in a new container.
        alive = start is not None and start <= written + CLOCK_SECONDS
        uptime = max(0.0, now - start) if alive and start else None
        children.append(
            {"name": name, "pid": pids[name], "alive": alive, "uptime_seconds": uptime, "deaths": died[name]}
        )
    return children


def _start_time(pid: int) -> float | None:
    """Returns when a process was started, in seconds since 1970; 0 if unknown; None if it does not exist."""
    try:
        if not Path("/proc/stat").exists():
            os.kill(pid, 0)
            return 0.0
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:  # a process of a different user
        return 0.0
    if fields[0] in "ZX":
        return None
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _last_error(supervisor: Sequence[Json]) -> str | None:
    """Returns why the last `serve` or `join` failed; None if it was stopped or completed."""
    last = next((line for line in reversed(supervisor) if line.get("event") in ("started", ENDED)), {})
    return str(last.get("reason")) if last.get("how") == "failed" else None


def _problems(logs: Logs, events: Sequence[str]) -> list[Json]:
    """Returns the last problems in the logs, the newest first. Equal ones are counted."""
    found: dict[tuple[str, str, str], Json] = {}
    for name, lines in logs.items():
        for line in lines:
            if line.get("event") in events or line.get("level") in ("warning", "error", "critical"):
                key = name, str(line.get("event")), _reason(line)
                times = found[key]["times"] + 1 if key in found else 1
                found[key] = {
                    "at": line["at"],
                    "process": name,
                    "event": key[1],
                    "site": line.get("site"),
                    "reason": key[2],
                    "times": times,
                }
    return sorted(found.values(), key=lambda line: -line["at"])[:MAX_PROBLEMS]


def _reason(line: Json) -> str:
    words = [f"{key} {line[key]}" for key in ("site", "child", "code", "path", "address") if line.get(key)]
    words += [str(line[key]) for key in ("reason", "answer") if line.get(key)]
    return ", ".join([*words, *str(line.get("traceback", "")).strip().splitlines()[-1:]])
