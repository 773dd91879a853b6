"""Whether a program passes its tests: it is run, in a process that is shut in (code_child.py says how), once a program.

A run ends after SECONDS, whatever it does, and everything that it started with it; its folder is taken away.
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
GRACE_SECONDS = 60.0  # that the process which watches gets on top: on a busy machine walls alone take seconds
CHILD = Path(__file__).with_name("code_child.py")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a program and its tests went."""

    passed: bool
    why: str | None  # not: the exception, or how it ended
    ended: bool  # by itself, by reaching the end or an exception; else it was stopped, or stopped its process
    walls: str  # "namespaces" or "hooks"


def run_tests(program: str, tests: str, *, seconds: float = SECONDS) -> Ran:
    """Runs the program, then its tests beside it. Raises UserError or RunError where this machine cannot."""
    check_sandbox()
    return _run(program, tests, seconds)


@cache
def check_sandbox() -> str:
    """The walls that there are, tried once: what must pass passes, what must not does not.

    Raises UserError where the system has no limits of resources, RunError where the walls do not hold.
    """
    if os.name != "posix":
        raise UserError("programs are run under the limits of a POSIX system: use Linux, or task.score = 'loss'")
    walls = ""
    for program, passes in PROBES.items():
        ran = _run(program, "assert done", SECONDS)
        walls = ran.walls
        if ran.passed != passes:
            raise RunError(
                f"the sandbox for programs does not hold here ({program.splitlines()[-1]!r}: {ran.why or 'passed'}): "
                "run as a plain user who may read this Python, or take task.score = 'loss'"
            )
    return walls


PROBES = {
    "import re, math, heapq, collections, typing\ndone = True": True,
    "import os\ndone = True\nos._exit(0)": False,
    "import socket\ndone = True\nsocket.create_connection(('127.0.0.1', 9), 1).close()": False,
    "import os\nopen(os.path.dirname(os.getcwd()) + '/fedsb-probe', 'w').close()\ndone = True": False,
    "import os\ndone = os.fork() >= 0": False,
    "import ctypes\ndone = ctypes.CDLL(None).fork() > 0": False,
}


def _run(program: str, tests: str, seconds: float, *, namespaces: bool = True) -> Ran:
    with TemporaryDirectory(prefix="fedsb-code-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777)  # a superuser's program runs as nobody
        asked = {"program": program, "tests": tests, "folder": folder, "seconds": seconds,
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
            out, err = child.communicate(json.dumps(asked).encode(), timeout=seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return Ran(passed=False, why=f"took more than {seconds:g} s", ended=False, walls="")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode != 0:
        raise RunError(f"the sandbox for programs does not start: {err.decode(errors='replace').strip()[-300:]}")
    return Ran(**json.loads(out))
