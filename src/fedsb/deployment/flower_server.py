"""The process that runs the coordinator's program, `program(channel, folder)`, over Flower's grid."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from fedsb.channels.flower import GridChannel
from fedsb.deployment.child_process import load, run_child
from fedsb.deployment.local_grid import run_of
from fedsb.deployment.logs import log_event
from fedsb.deployment.registry import SiteRegistry
from fedsb.utils.errors import RunError
from fedsb.utils.signals import Interrupts

START_SECONDS = 60.0


def main() -> None:
    folder, local, program, run = Path(sys.argv[1]), Path(sys.argv[2]), load(sys.argv[3]), Path(sys.argv[4])
    with Interrupts().installed():
        _wait_for(local)
        with run_of(local) as grid:
            log_event("run started", run=str(run))
            registry = SiteRegistry(folder)
            program(GridChannel(grid, lambda: registry().node_keys, log_event), run)
            log_event("run ended")


def _wait_for(local: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(local)) == 0:
                return
        if time.monotonic() > end:
            raise RunError(f"The SuperLink did not start within {START_SECONDS:.0f} s. See logs/superlink.jsonl.")
        time.sleep(0.1)


if __name__ == "__main__":
    run_child(main)
