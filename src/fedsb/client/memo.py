"""Results that are the same for all clients of one process, computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")
SIZE = 16  # results of the newest messages


class Memo:
    """The newest results by key."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Returns the result for this key. It is computed if it is not stored."""
        if key not in self._known:
            self._known[key] = compute()
            if len(self._known) > SIZE:
                self._known.popitem(last=False)
        found: T = self._known[key]
        return found
