"""Ctrl-C and SIGTERM: what is being written is finished first, then the run stops with KeyboardInterrupt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """While installed, a signal raises KeyboardInterrupt, except inside `hold()`: then when that ends."""

    def __init__(self) -> None:
        self._held = False
        self._pending = False

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        try:
            old = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs us there handles signals
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def hold(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:  # not where the write itself failed: that is the news
            self._pending = False
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = True
        else:
            raise KeyboardInterrupt
