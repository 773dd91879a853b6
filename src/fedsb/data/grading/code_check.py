"""Runs programs and their tests in a sandbox: one isolated process per program; code_child.py describes the sandbox.

A run ends after SECONDS, with every process that it started. Its folder is deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsb.utils.errors import RunError, UserError

SECONDS = 10.0  # for one program and its tests
MEMORY_BYTES = 1 << 30
FILES_BYTES = 16 << 20
GRACE_SECONDS = 60.0  # extra time for the supervising process: on a busy machine, isolation alone takes seconds
CHILD = Path(__file__).with_name("code_child.py")


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """The result of a program and its tests."""

    passed: bool
    why: str | None  # the exception, or how the program ended; None if it passed
    ended: bool  # reached its end or an exception; False: it was stopped, or stopped its process
    isolation: str  # "namespaces" or "hooks"


def run_tests(program: str, tests: str, *, seconds: float = SECONDS) -> ProgramResult:
    """Runs the program, then its tests. Raises UserError or RunError if this machine has no sandbox."""
    check_sandbox()
    return _run(program, tests, seconds)


@cache
def check_sandbox() -> str:
    """Returns the isolation of this machine, after checking once that probes pass and fail as they must.

    Raises UserError if the system has no resource limits, RunError if the isolation does not work.
    """
    if os.name != "posix":
        raise UserError("Programs need the resource limits of a POSIX system. Use Linux, or task.score = 'loss'.")
    isolation = ""
    for program, passes in PROBES.items():
        ran = _run(program, "assert done", SECONDS)
        isolation = ran.isolation
        if ran.passed != passes:
            raise RunError(
                f"the sandbox for programs does not work here ({program.splitlines()[-1]!r}: {ran.why or 'passed'}). "
                "Run as a normal user who may read this Python, or set task.score = 'loss'."
            )
    return isolation


PROBES = {
    "import re, math, heapq, collections, typing\ndone = True": True,
    "import os\ndone = True\nos._exit(0)": False,
    "import socket\ndone = True\nsocket.create_connection(('127.0.0.1', 9), 1).close()": False,
    "import os\nopen(os.path.dirname(os.getcwd()) + '/fedsb-probe', 'w').close()\ndone = True": False,
    "import os\ndone = os.fork() >= 0": False,
    "import ctypes\ndone = ctypes.CDLL(None).fork() > 0": False,
}


def _run(program: str, tests: str, seconds: float, *, namespaces: bool = True) -> ProgramResult:
    with TemporaryDirectory(prefix="fedsb-code-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777)  # a superuser's program runs as nobody
        request = {"program": program, "tests": tests, "folder": folder, "seconds": seconds,
                 "memory_bytes": MEMORY_BYTES, "files_bytes": FILES_BYTES, "namespaces": namespaces}  # fmt: skip
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # threads may not be started
            cwd=folder,
            start_new_session=True,
        )
        try:
            out, err = child.communicate(json.dumps(request).encode(), timeout=seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return ProgramResult(passed=False, why=f"took more than {seconds:g} s", ended=False, isolation="")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode != 0:
        raise RunError(f"the sandbox for programs does not start: {err.decode(errors='replace').strip()[-300:]}")
    return ProgramResult(**json.loads(out))
