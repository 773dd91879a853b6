"""What is on a disk while processes write to it: logs, JSON files, process ids."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsb.errors import UserError

Json = dict[str, Any]
TAIL_BYTES = 2**18  # of a log: some thousand lines
CLOCK_SECONDS = 5.0  # by which the kernel's two clocks may differ


def document(path: Path) -> Json | None:
    """A JSON object; None where there is no such file. Raises UserError for one that cannot be read."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


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


def processes(folder: Path, now: float) -> list[Json]:
    """What pids.json names, the supervisor first, and whether each is alive. Empty where all was stopped in order."""
    pids = document(folder / "pids.json")
    written = modified(folder / "pids.json")
    if pids is None or written is None:
        return []
    begun = {name: _begun(int(pid)) for name, pid in pids.items()}
    # Another process may have got the number since: after a restart of the machine, or in a new container.
    alive = {name: start is not None and start <= written + CLOCK_SECONDS for name, start in begun.items()}
    since = begun["supervisor"] or 0.0
    events = [line for line in tail(folder / "logs" / "supervisor.jsonl") if line["at"] >= since - CLOCK_SECONDS]
    died = Counter(line.get("child") for line in events if line.get("event") == "died")
    return [
        {
            "name": name,
            "pid": pid,
            "alive": alive[name],
            "uptime_seconds": max(0.0, now - start) if alive[name] and (start := begun[name]) else None,
            "deaths": died[name],
        }
        for name, pid in pids.items()
    ]


def last_words(folder: Path) -> str | None:
    """Why a process ended for good, where it said so."""
    for path in sorted((folder / "logs").glob("*.fault")):
        if text := path.read_text().strip():
            return text
    return None


def troubles(logs: Iterable[tuple[str, Sequence[Json]]], events: Sequence[str], count: int = 8) -> list[Json]:
    """The last lines of these kinds, the youngest first: who, what, why, how often."""
    found: dict[tuple[str, str, str], Json] = {}
    for name, lines in logs:
        for line in lines:
            if line.get("event") in events or line.get("level") in ("warning", "error", "critical"):
                key = name, str(line.get("event")), _why(line)
                times = found[key]["times"] + 1 if key in found else 1
                found[key] = {"at": line["at"], "process": name, "event": key[1], "reason": key[2], "times": times}
    return sorted(found.values(), key=lambda line: -line["at"])[:count]


def _why(line: Json) -> str:
    told = ("site", "child", "code", "path", "address")
    words = [f"{key} {line[key]}" for key in told if line.get(key)]
    words += [str(line[key]) for key in ("reason", "answer") if line.get(key)]
    return ", ".join([*words, *str(line.get("traceback", "")).strip().splitlines()[-1:]])


def _begun(pid: int) -> float | None:
    """When a process was started, seconds since 1970; None where there is none of that number."""
    if not Path("/proc/stat").exists():
        return _there(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in "ZX":
        return None
    return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _there(pid: int) -> float | None:
    """Where the system does not tell a process's start (no Linux): 0, or None where there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0.0


def rows(path: Path) -> list[Json]:
    """All lines of a ledger; a torn one is left out."""
    found: list[Json] = []
    with suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                found.append(json.loads(line))
    return found
