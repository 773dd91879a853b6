"""The seconds and the peak memory of each phase of a run: load, basis, captured share, scores, rounds, export.

On CUDA the memory is what torch has allocated on the device, else the resident memory of this process. Linux can start
a new peak for each phase; elsewhere a phase has the peak of the process until its end.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The costs of a phase. If a phase occurs several times, its seconds add up, and the peak is the largest."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


class Phases:
    """Measures phases on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, Phase] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the block to the phase `name`. Phases must not be nested."""
        start_peak(self.device)
        started = time.monotonic()
        try:
            yield
        finally:
            before = self.found.get(name, Phase())
            self.found[name] = Phase(
                seconds=round(before.seconds + time.monotonic() - started, 3),
                peak_memory_bytes=max(before.peak_memory_bytes, peak_memory_bytes(self.device)),
            )

    def as_dict(self, *, memory: bool = True) -> dict[str, dict[str, float]]:
        """Returns {phase: {"seconds", "peak_memory_bytes"}}; without the memory for private runs."""
        kept = {name: asdict(phase) for name, phase in self.found.items()}
        return kept if memory else {name: {"seconds": phase["seconds"]} for name, phase in kept.items()}


def start_peak(device: torch.device) -> None:
    """Starts a new peak, where the device or the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak of the memory of a CUDA device, else of this process, since the last `start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
