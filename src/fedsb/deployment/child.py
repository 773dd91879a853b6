"""What every process of a deployment does: log to its file, end with its parent, and tell its parent why it ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsb.deployment.logs import LOGGER, open_log, say
from fedsb.utils.errors import RunError, UserError

LOG, FAULT = "FEDSB_LOG", "FEDSB_FAULT"  # environment: the file to log to, the pipe to tell a fault in
USER_ERROR, RUN_ERROR, CRASHED = 1, 2, 70  # exit codes; of the first two another try is of no use
PARENT_SECONDS = 0.5
FAULT_BYTES = 32 * 2**10  # what a pipe holds at least


def run_child(main: Callable[[], None]) -> None:
    """Runs `main` as a process that a supervisor started."""
    open_log(Path(os.environ[LOG]))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        main()
    except (UserError, RunError) as error:
        say("failed", reason=str(error))
        os.write(int(os.environ[FAULT]), str(error).encode()[:FAULT_BYTES])  # no file: the fault may be a full disk
        sys.exit(USER_ERROR if isinstance(error, UserError) else RUN_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        LOGGER.exception("crashed")
        sys.exit(CRASHED)


def load(reference: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises UserError where there is none."""
    module, _, name = reference.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{reference!r} names no function: {error}; write it as module:function") from error
    if not callable(found):
        raise UserError(f"{reference!r} is not a function")
    return found  # type: ignore[no-any-return]


def _end_with(parent: int) -> None:
    """A supervisor that was killed cannot stop its children: they stop by themselves."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
