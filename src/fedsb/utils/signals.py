"""Ctrl-C and SIGTERM: a write in progress completes first, then the run stops with KeyboardInterrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Signal handlers that raise KeyboardInterrupt, but inside `hold()` only when it ends."""

    def __init__(self) -> None:
        self._held = False
        self._pending = False

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Installs the handlers, and restores the previous ones afterwards."""
        try:
            old = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller handles signals
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Delays a signal until the block has ended."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:  # not reached if the write itself failed: its error is raised instead
            self._pending = False
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = True
        else:
            raise KeyboardInterrupt
