"""Errors of two kinds: invalid user input (exit code 1) and a run that failed (exit code 2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Raised for invalid input. The message says what is wrong, with which value, and how to fix it."""

    may_leave = False  # whether a site may send this message to the coordinator


class RefusalError(UserError):
    """Raised if a site refuses a request. The message has the request and the site's rules, but none of its data."""

    may_leave = True


class BadRowError(UserError):
    """Raised for a row that cannot be used. The message begins with its file and line."""


class NotAvailableError(UserError):
    """Raised for weights or rows that are not on this machine. `fedsb check` continues without them."""


class ConfigError(UserError):
    """Raised with all faults of a configuration together."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''} in the configuration:"
        super().__init__("\n".join([count, *(f"  - {fault}" for fault in self.faults)]))


class RunError(RuntimeError):
    """Raised if a run cannot continue. Completed rounds are on disk, and the message says how to continue."""

    may_leave = False


class DivergedError(RunError):
    """Raised if a loss is not finite."""

    may_leave = True


class DiskError(RunError):
    """Raised if a file cannot be written."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns a hint with the nearest option and all options.

    >>> did_you_mean("fed_sb", ["fed-sb", "fedit"])
    "did you mean 'fed-sb'? There are: fed-sb, fedit"
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? There" if near else "there"
    return f"{hint} are: {', '.join(known) or 'none'}"
