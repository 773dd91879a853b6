"""What both ends keep on their disks while processes write to it: logs, process ids, ledgers."""

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
from fedsb.reporting.report import document
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.formatting import Json

TAIL_BYTES = 2**18  # of a log: some thousand lines
CLOCK_SECONDS = 5.0  # by which the kernel's two clocks may differ
TROUBLES = 8  # that are shown

Logs = Mapping[str, Sequence[Json]]


def of_both(folder: Path, now: float, names: Sequence[str], events: Sequence[str], heard: Path) -> tuple[Json, Logs]:
    """(what the states of both ends have, the last lines of each process's log).

    `events` in the logs are troubles; `heard` is written whenever the other end was heard of, or told something.
    """
    paths = {name: folder / "logs" / f"{name}.jsonl" for name in names}
    logs = {name: tail(path) for name, path in paths.items()}
    children = _processes(folder, now, logs["supervisor"])
    running = bool(children) and bool(children[0]["alive"])
    youngest = modified(heard, *paths.values())
    state = {
        "folder": str(folder),
        "time": now,
        "running": running,
        "processes": children,
        "last_event_seconds": None if youngest is None else max(0.0, now - youngest),
        "troubles": _troubles(logs, events),
        "last_words": None if running else _last_words(logs["supervisor"]),
    }
    return state, logs


def tail(path: Path) -> list[Json]:
    """The last lines of a log, each with its time as seconds since 1970 ("at"); a torn line is left out."""
    lines: list[Json] = []
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in file.read().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                found = json.loads(line)
                lines.append({**found, "at": datetime.datetime.fromisoformat(found["time"]).timestamp()})
    return lines


def modified(*paths: Path) -> float | None:
    """When the youngest of these files was written; None where there is none of them."""
    times = []
    for path in paths:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=None)


def by_age(paths: Iterable[Path]) -> list[Path]:
    """The youngest last."""
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def seconds_left(certificate: str, now: float) -> float:
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc.timestamp() - now


def spent(ledgers: Iterable[Path], delta: float | None) -> tuple[float | None, str | None]:
    """(epsilon by these ledgers together, None without any or without a policy; why they cannot be summed up)."""
    there = [path for path in ledgers if path.exists()]
    if delta is None or not there:
        return None, None
    try:
        return epsilon(merged(entry for path in there for entry in read_ledger(path)), delta), None
    except (UserError, RunError) as error:
        return None, str(error)


def _processes(folder: Path, now: float, log: Sequence[Json]) -> list[Json]:
    """What pids.json names, the supervisor first, and whether each is alive. Empty where all was stopped in order."""
    pids, written = document(folder / "pids.json"), modified(folder / "pids.json")
    if pids is None or written is None:
        return []
    begun = {name: _begun(int(pid)) for name, pid in pids.items()}
    since = (begun["supervisor"] or 0.0) - CLOCK_SECONDS
    died = Counter(line.get("child") for line in log if line.get("event") == "died" and line["at"] >= since)
    children = []
    for name, start in begun.items():
        # Another process may have got the number since: after a restart of the machine, or in a new container.
        alive = start is not None and start <= written + CLOCK_SECONDS
        uptime = max(0.0, now - start) if alive and start else None
        children.append(
            {"name": name, "pid": pids[name], "alive": alive, "uptime_seconds": uptime, "deaths": died[name]}
        )
    return children


def _begun(pid: int) -> float | None:
    """When a process was started, in seconds since 1970, 0 where the system does not tell (no Linux).

    None where there is no process of that number.
    """
    try:
        if not Path("/proc/stat").exists():
            os.kill(pid, 0)
            return 0.0
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:  # it is another user's
        return 0.0
    if fields[0] in "ZX":
        return None
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _last_words(supervisor: Sequence[Json]) -> str | None:
    """Returns the reason for which the last `serve` or `join` failed; None if it was stopped, or ended well."""
    last = next((line for line in reversed(supervisor) if line.get("event") in ("started", ENDED)), {})
    return str(last.get("reason")) if last.get("how") == "failed" else None


def _troubles(logs: Logs, events: Sequence[str]) -> list[Json]:
    """The last lines of these kinds, the youngest first: who, what, why, how often."""
    found: dict[tuple[str, str, str], Json] = {}
    for name, lines in logs.items():
        for line in lines:
            if line.get("event") in events or line.get("level") in ("warning", "error", "critical"):
                key = name, str(line.get("event")), _why(line)
                times = found[key]["times"] + 1 if key in found else 1
                found[key] = {
                    "at": line["at"],
                    "process": name,
                    "event": key[1],
                    "site": line.get("site"),
                    "reason": key[2],
                    "times": times,
                }
    return sorted(found.values(), key=lambda line: -line["at"])[:TROUBLES]


def _why(line: Json) -> str:
    words = [f"{key} {line[key]}" for key in ("site", "child", "code", "path", "address") if line.get(key)]
    words += [str(line[key]) for key in ("reason", "answer") if line.get(key)]
    return ", ".join([*words, *str(line.get("traceback", "")).strip().splitlines()[-1:]])
