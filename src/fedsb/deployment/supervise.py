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

from fedsb.deployment.child import FAULT, FAULT_BYTES, LOG, RUN_ERROR, USER_ERROR
from fedsb.deployment.logs import say
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import write_atomic

LOOK_SECONDS = 0.2
STOP_SECONDS = 30.0  # to end what is being written
LOST_SECONDS = 3.0  # the same, where what it needs has died
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
    fault: int | None = None  # the pipe that it tells its fault in
    deaths: deque[float] = field(default_factory=deque)
    start_at: float = 0.0


class Supervisor:
    """Watches children by their process; logs and process ids are in its folder."""

    def __init__(self, folder: Path, children: Sequence[Child]) -> None:
        self._folder, self._children = folder, children

    def watch(self) -> None:
        """Returns when a child has ended by itself; raises its UserError or RunError."""
        self._wait_for_leftovers()
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
        except KeyboardInterrupt:
            print("stopping; Ctrl-C again stops at once", file=sys.stderr, flush=True)
            raise
        finally:
            self._stop()

    def _start(self, child: Child) -> None:
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if child.fault is not None:
            os.close(child.fault)
        child.fault, told = os.pipe()
        environment = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self._folder / "flower"),
            LOG: str(logs / f"{child.name}.jsonl"),
            FAULT: str(told),
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
                pass_fds=[told],
            )
        os.close(told)
        say("started", child=child.name, pid=child.process.pid)
        self._write_pids()

    def _died(self, child: Child, code: int) -> None:
        child.process = None
        say("died", child=child.name, code=code)
        if code in (USER_ERROR, RUN_ERROR) and (fault := _read(child.fault)):
            raise (UserError if code == USER_ERROR else RunError)(fault)
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
                _end([other.process], LOST_SECONDS)
                other.process, other.start_at = None, child.start_at

    def _stop(self) -> None:
        """Ends the last process first: what needs another ends before it. A second Ctrl-C kills them at once."""
        for seconds in (STOP_SECONDS, 0.0):
            try:
                for child in reversed(self._children):
                    if child.process is not None and child.process.poll() is None:
                        say("stopping", child=child.name, seconds=seconds)
                        _end([child.process], seconds)
                    child.process = None
                break
            except KeyboardInterrupt:
                continue
        self._pids.unlink(missing_ok=True)

    @property
    def _pids(self) -> Path:
        return self._folder / "pids.json"

    def _write_pids(self) -> None:
        pids = {child.name: child.process.pid for child in self._children if child.process is not None}
        try:
            write_atomic(self._pids, json.dumps({"supervisor": os.getpid(), **pids}).encode())
        except RunError as error:  # for who looks in; a full disk is no reason to stop what runs
            say("trouble", reason=str(error))

    def _wait_for_leftovers(self) -> None:
        """Of a supervisor that was killed: its children end by themselves, and hold ports and locks until then."""
        try:
            pids = [int(pid) for pid in json.loads(self._pids.read_text()).values()]
        except (OSError, ValueError):
            return
        if any(map(_lives, pids)):
            say("waiting", reason="processes of a supervisor that was killed are ending")
        end = time.monotonic() + STOP_SECONDS
        while any(map(_lives, pids)) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user: the number was given again
        return False
    with suppress(OSError):  # one that has ended, and that nobody has asked how
        return pid != os.getpid() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return pid != os.getpid()


def _read(pipe: int | None) -> str:
    """What a process that has ended wrote into it."""
    if pipe is None:
        return ""
    os.set_blocking(pipe, False)  # whoever else may hold its other end
    try:
        return os.read(pipe, FAULT_BYTES).decode(errors="replace")
    except BlockingIOError:
        return ""


def _end(processes: Sequence[subprocess.Popen[bytes]], seconds: float = STOP_SECONDS) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.terminate()
    for process in processes:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
