"""Keeps processes alive: starts them, starts again what died, stops them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedsb.deployment.child import FAULT, LOG, RUN_ERROR, USER_ERROR
from fedsb.deployment.logs import say
from fedsb.disk import write_atomic
from fedsb.errors import RunError, UserError

LOOK_SECONDS = 0.2
STOP_SECONDS = 30.0  # to end what is being written
DEATHS, DEATHS_SECONDS = 6, 300.0  # a process that dies as often in as short a time is given up
QUIET = {  # Flower: no telemetry, no look for updates, nothing installed at run time
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@dataclass(kw_only=True)
class Child:
    """A process to keep alive, until it ends by itself with 0."""

    name: str
    module: str
    arguments: Sequence[str]
    secrets: Mapping[str, str] = field(default_factory=dict)  # environment: a command line is for all to see
    needs: str | None = None  # a child without which this one must start anew
    shown: bool = False  # whether what it prints is for the user, else it goes to logs/NAME.out
    process: subprocess.Popen[bytes] | None = None
    deaths: deque[float] = field(default_factory=deque)
    start_at: float = 0.0


class Supervisor:
    """Watches children by their process; logs and process ids are in its folder."""

    def __init__(self, folder: Path, children: Sequence[Child]) -> None:
        self._folder, self._children = folder, children

    def watch(self) -> None:
        """Returns when a child has ended by itself; raises its UserError or RunError."""
        try:
            while True:
                for child in self._children:
                    if child.process is None and time.monotonic() >= child.start_at:
                        self._start(child)
                    elif child.process is not None and (code := child.process.poll()) is not None:
                        if code == 0:
                            return
                        self._died(child, code)
                time.sleep(LOOK_SECONDS)
        finally:
            self._stop()

    def _start(self, child: Child) -> None:
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._fault(child).unlink(missing_ok=True)
        environment = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self._folder / "flower"),
            LOG: str(logs / f"{child.name}.jsonl"),
            FAULT: str(self._fault(child)),
            **child.secrets,
        }
        with (logs / f"{child.name}.out").open("ab") as out:
            child.process = subprocess.Popen(
                [sys.executable, "-m", child.module, *child.arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if child.shown else out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for the supervisor, which then stops them in order
            )
        say("started", child=child.name, pid=child.process.pid)
        self._write_pids()

    def _died(self, child: Child, code: int) -> None:
        child.process = None
        say("died", child=child.name, code=code)
        if code in (USER_ERROR, RUN_ERROR) and self._fault(child).exists():
            raise (UserError if code == USER_ERROR else RunError)(self._fault(child).read_text())
        now = time.monotonic()
        child.deaths.append(now)
        while now - child.deaths[0] > DEATHS_SECONDS:
            child.deaths.popleft()
        if len(child.deaths) >= DEATHS:
            raise RunError(
                f"{child.name} died {DEATHS} times in {DEATHS_SECONDS:.0f} s, last with exit code {code}: "
                f"see {self._folder / 'logs' / child.name}.out and .jsonl, then start again"
            )
        child.start_at = now + 0.5 * 2 ** (len(child.deaths) - 1)
        for other in self._children:
            if other.needs == child.name and other.process is not None:
                _end([other.process])
                other.process, other.start_at = None, child.start_at

    def _stop(self) -> None:
        """The last first: what needs another ends before it."""
        for child in reversed(self._children):
            if child.process is not None and child.process.poll() is None:
                say("stopping", child=child.name)
                _end([child.process])
            child.process = None
        self._pids.unlink(missing_ok=True)

    @property
    def _pids(self) -> Path:
        return self._folder / "pids.json"

    def _write_pids(self) -> None:
        pids = {child.name: child.process.pid for child in self._children if child.process is not None}
        write_atomic(self._pids, json.dumps({"supervisor": os.getpid(), **pids}).encode())

    def _fault(self, child: Child) -> Path:
        return self._folder / "logs" / f"{child.name}.fault"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.terminate()
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
