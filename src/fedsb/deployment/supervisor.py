"""Starts a set of processes, restarts those that die, and stops all of them at the end."""

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

from fedsb.deployment.child_process import FAULT, FAULT_BYTES, LOG, RUN_ERROR, USER_ERROR
from fedsb.deployment.logs import log_event
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import write_atomic

POLL_SECONDS = 0.2
STOP_SECONDS = 30.0  # for a process to finish its writes
DEPENDENCY_LOST_SECONDS = 3.0  # the same, after the death of a process that it depends on
MAX_DEATHS, DEATHS_SECONDS = 6, 300.0  # a process that dies this often within this time is not restarted again
FLOWER_ENVIRONMENT = {  # no telemetry, no check for updates, no installation at run time
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@dataclass(kw_only=True)
class Child:
    """A process to keep running until it exits with 0."""

    name: str
    module: str
    arguments: Sequence[str]
    secrets: Mapping[str, str] = field(default_factory=dict)  # environment; command lines are public
    needs: str | None = None  # the child whose death also restarts this one
    shown: bool = False  # whether its stdout is the user's terminal; else it goes to logs/NAME.out
    process: subprocess.Popen[bytes] | None = None
    fault: int | None = None  # the pipe that receives the reason of its failure
    deaths: deque[float] = field(default_factory=deque)
    start_at: float = 0.0


class Supervisor:
    """Runs child processes. Their logs and process ids are in `folder`."""

    def __init__(self, folder: Path, children: Sequence[Child]) -> None:
        self._folder, self._children = folder, children

    def watch(self) -> None:
        """Returns when a child has exited with 0. Raises the UserError or RunError that a child reported."""
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
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            print("Stopping. Press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)
            raise
        finally:
            self._stop()

    def _start(self, child: Child) -> None:
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if child.fault is not None:
            os.close(child.fault)
        child.fault, write_end = os.pipe()
        environment = {
            **os.environ,
            **FLOWER_ENVIRONMENT,
            "FLWR_HOME": str(self._folder / "flower"),
            LOG: str(logs / f"{child.name}.jsonl"),
            FAULT: str(write_end),
            **child.secrets,
        }
        with (logs / f"{child.name}.out").open("ab") as out:
            child.process = subprocess.Popen(
                [sys.executable, "-m", child.module, *child.arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if child.shown else out,
                stderr=out,
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which stops its children in order
                pass_fds=[write_end],
            )
        os.close(write_end)
        log_event("started", child=child.name, pid=child.process.pid)
        self._write_pids()

    def _died(self, child: Child, code: int) -> None:
        child.process = None
        log_event("died", child=child.name, code=code)
        if code in (USER_ERROR, RUN_ERROR) and (fault := _read(child.fault)):
            raise (UserError if code == USER_ERROR else RunError)(fault)
        now = time.monotonic()
        child.deaths.append(now)
        while now - child.deaths[0] > DEATHS_SECONDS:
            child.deaths.popleft()
        if len(child.deaths) >= MAX_DEATHS:
            raise RunError(
                f"{child.name} died {MAX_DEATHS} times in {DEATHS_SECONDS:.0f} s, the last time with exit code {code}. "
                f"See {self._folder / 'logs' / child.name}.out and .jsonl, then start it again."
            )
        child.start_at = now + 0.5 * 2 ** (len(child.deaths) - 1)
        for other in self._children:
            if other.needs == child.name and other.process is not None:
                _end([other.process], DEPENDENCY_LOST_SECONDS)
                other.process, other.start_at = None, child.start_at

    def _stop(self) -> None:
        """Stops the processes in reverse order, so that each ends before those that it depends on.

        A second Ctrl-C kills them at once.
        """
        for seconds in (STOP_SECONDS, 0.0):
            try:
                for child in reversed(self._children):
                    if child.process is not None and child.process.poll() is None:
                        log_event("stopping", child=child.name, seconds=seconds)
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
        except RunError as error:  # only `status` reads this file, so a full disk does not stop the processes
            log_event("trouble", reason=str(error))

    def _wait_for_leftovers(self) -> None:
        """Waits for the children of a supervisor that was killed. They keep ports and locks until they end."""
        try:
            pids = [int(pid) for pid in json.loads(self._pids.read_text()).values()]
        except (OSError, ValueError):
            return
        if any(map(_is_alive, pids)):
            log_event("waiting", reason="processes of a supervisor that was killed are ending")
        end = time.monotonic() + STOP_SECONDS
        while any(map(_is_alive, pids)) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the number was reused by a process of a different user
        return False
    with suppress(OSError):  # not a zombie
        return pid != os.getpid() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return pid != os.getpid()


def _read(pipe: int | None) -> str:
    """Returns what a process that has ended wrote into its pipe."""
    if pipe is None:
        return ""
    os.set_blocking(pipe, False)  # other processes may have its write end open
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
