"""What can go wrong, in two kinds: the user's input (exit code 1) and a run that failed (exit code 2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """The input is at fault: the message says what happened, with which value, and what to do."""

    may_leave = False  # whether a site tells a coordinator these words, or only that it refused


class RefusalError(UserError):
    """A site's no to a coordinator: its words hold what was asked and the site's rules, and nothing of what it has."""

    may_leave = True


class BadRowError(UserError):
    """A row that cannot be used: the message begins with its file and line."""


class NotAvailableError(UserError):
    """Something that is elsewhere, as weights and rows that were not downloaded; `fedsb check` does without it."""


class ConfigError(UserError):
    """Every fault of a configuration, shown together."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''} in the configuration:"
        super().__init__("\n".join([count, *(f"  - {fault}" for fault in self.faults)]))


class RunError(RuntimeError):
    """A run that cannot go on; what was finished is on disk and the message says how to go on."""

    may_leave = False


class DivergedError(RunError):
    """A loss that is no number any more."""

    may_leave = True


class DiskError(RunError):
    """A disk that refused what was to be written."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`did_you_mean("fed_sb", ["fed-sb", "fedit"])` -> `did you mean 'fed-sb'? There are: fed-sb, fedit`."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? There" if near else "there"
    return f"{hint} are: {', '.join(known) or 'none'}"
