"""The common part of every process of a deployment.

A process logs to its own file, ends when its parent ends, and reports the reason of a failure to its parent.
"""

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

from fedsb.deployment.logs import LOGGER, log_event, open_log
from fedsb.utils.errors import RunError, UserError

LOG, FAULT = "FEDSB_LOG", "FEDSB_FAULT"  # environment: the log file, the pipe that receives the reason of a failure
USER_ERROR, RUN_ERROR, CRASHED = 1, 2, 70  # exit codes; the supervisor does not restart a process after the first two
PARENT_SECONDS = 0.5
FAULT_BYTES = 32 * 2**10  # the smallest capacity of a pipe


def run_child(main: Callable[[], None]) -> None:
    """Runs `main` in a process that a supervisor started."""
    open_log(Path(os.environ[LOG]))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        main()
    except (UserError, RunError) as error:
        log_event("failed", reason=str(error))
        os.write(int(os.environ[FAULT]), str(error).encode()[:FAULT_BYTES])  # not a file: the disk may be full
        sys.exit(USER_ERROR if isinstance(error, UserError) else RUN_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        LOGGER.exception("crashed")
        sys.exit(CRASHED)


def load(reference: str) -> Callable[..., Any]:
    """Returns the function that `module:function` names. Raises UserError if it does not exist."""
    module, _, name = reference.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{reference!r} cannot be imported: {error}. Write module:function.") from error
    if not callable(found):
        raise UserError(f"{reference!r} is not a function. Write module:function.")
    return found  # type: ignore[no-any-return]


def _end_with(parent: int) -> None:
    """Stops this process when its parent has ended. A supervisor that was killed cannot stop its children."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
