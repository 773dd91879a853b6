"""The ledger: what a client has released, one line per release, on disk before the noise is drawn.

    {"ledger": 1, "run": ..., "client": ..., "unit": ..., "relation": ...}
    {"run": ..., "client": ..., "round": 3, "what": "training", "q": ..., "sigma": ..., "clip": ..., "count": ..., ...}

With shared noise `sigma` is that of all clients' shares and `own_sigma` that of this client's alone.

Epsilon is computed from this file alone. A line may stand for noise that was never drawn, if a crash came between;
noise without a line is impossible. A round that is repeated after a crash is charged again. Nothing removes a line:
neither a resume nor a rollback of the state.

A crash while a line is written leaves a part of it at the end. `charge` had not returned then, so nothing was released
and the part is dropped. Anything else that cannot be read is an error. An older copy put in place of a ledger is not
detected: the file is as trustworthy as the client that keeps it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from fedsb.privacy.accounting import RELATION, Accountant, Release, epsilon
from fedsb.privacy.plan import Unit
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import disk_errors, lock, write_atomic

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line: `count` noised sums in a round."""

    run: str
    client: str
    round: int
    what: str
    q: float
    sigma: float
    clip: float  # L2; gives the length of the noise and is not needed for epsilon
    count: int
    time: str  # UTC, ISO 8601
    own_sigma: float | None = None  # of the client's own share, where other clients add the rest of the noise

    def values(self) -> dict[str, Any]:
        """Returns the fields of the line."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def release(self) -> Release:
        return Release(q=self.q, sigma=self.sigma, count=self.count, what=self.what, own_sigma=self.own_sigma)


class Ledger:
    """A client's ledger, locked by this process until it is closed."""

    def __init__(self, path: Path, *, run: str, client: str) -> None:
        """Opens the ledger that `create` made.

        Raises:
            UserError: it does not exist, another process uses it, or it belongs to a different run or client.
            RunError: it cannot be read. It is left unchanged.
        """
        self.path, self.run, self.client = path, run, client
        try:
            self._file = path.open("r+b", buffering=0)
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing, and with it the record of what {client!r} has released. Restore the file."
            ) from error
        try:
            lock(self._file, f"{path} is in use by another process. Wait for it, or stop it.")
            content = self._file.read()
            owner, self._entries, whole = _parse(content, path)
            if owner != (run, client):
                raise UserError(
                    f"{path} is the ledger of {owner[1]!r} in run {owner[0]}, not of {client!r} in {run}. Restore the "
                    "right file."
                )
            with disk_errors(path.parent):
                self._end_at(whole, content)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, *, run: str, client: str, unit: Unit) -> Self:
        """Returns a new, empty ledger. Raises UserError if the file exists: a ledger is never replaced."""
        if path.exists():
            raise UserError(f"{path} already exists and records what {client!r} has released. Open it instead.")
        header = {"ledger": VERSION, "run": run, "client": client, "unit": unit, "relation": RELATION}
        write_atomic(path, _line(header))
        return cls(path, run=run, client=client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def charge(self, release: Release, *, round: int, clip: float) -> None:
        """Records a release, and returns when its line is on disk. Draw the noise only then.

        Raises RunError if the line cannot be written. Draw no noise then.
        """
        if self._file.closed or not os.fstat(self._file.fileno()).st_nlink:
            why = "is closed" if self._file.closed else "was deleted or replaced during the run"
            raise RunError(f"{self.path} {why}. No release can be recorded, so nothing may be released.")
        entry = Entry(
            run=self.run,
            client=self.client,
            round=round,
            what=release.what,
            q=release.q,
            sigma=release.sigma,
            clip=clip,
            count=release.count,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            own_sigma=release.own_sigma,
        )
        try:
            with disk_errors(self.path.parent):
                self._append(_line(entry.values()))
        except BaseException:
            self.close()  # what is on disk now is known only after reading it again
            raise
        self._entries.append(entry)

    @property
    def last_round(self) -> int:
        """The last round with an entry; 0 if there is none."""
        return max((entry.round for entry in self._entries), default=0)

    def copy(self, entries: Iterable[Entry], since: int = 0) -> None:
        """Adds the entries of the client's own ledger that this copy, kept on another machine, lacks.

        `entries` are those of round `since` and later ones.
        """
        # a release that was charged twice in one second has two equal entries
        here = Counter(entry for entry in self._entries if entry.round >= since)
        for entry in entries:
            if here[entry]:
                here[entry] -= 1
                continue
            with disk_errors(self.path.parent):
                self._append(_line(_entry(entry.values(), (self.run, self.client)).values()))
            self._entries.append(entry)

    def releases(self) -> tuple[Release, ...]:
        """Returns all recorded releases, with identical ones merged."""
        return merged(self._entries)

    def epsilon(self, delta: float, accountant: Accountant = "pld", *, alone: bool = False) -> float:
        """Returns epsilon of all recorded releases at delta; `alone` is as in accounting.py."""
        return epsilon(self.releases(), delta, accountant, alone=alone)

    def _end_at(self, whole: int, content: bytes) -> None:
        """Removes an incomplete last line, or adds the newline that a complete one lacks."""
        if whole < len(content):
            self._file.truncate(whole)
            os.fsync(self._file.fileno())
        self._file.seek(0, os.SEEK_END)
        if whole and content[whole - 1 : whole] != b"\n":
            self._append(b"\n")

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())


def read_ledger(path: Path) -> tuple[Entry, ...]:
    """Returns the entries of a ledger, which is not changed. Raises RunError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read the ledger {path}: {error}") from error
    return tuple(_parse(content, path)[1])


def merged(entries: Iterable[Entry]) -> tuple[Release, ...]:
    """Returns the releases, merged by what, q and sigma, in order of first appearance."""
    counts: Counter[tuple[str, float, float, float | None]] = Counter()
    for entry in entries:
        counts[entry.what, entry.q, entry.sigma, entry.own_sigma] += entry.count
    return tuple(
        Release(what=what, q=q, sigma=sigma, own_sigma=own, count=n) for (what, q, sigma, own), n in counts.items()
    )


def _parse(content: bytes, path: Path) -> tuple[tuple[str, str], list[Entry], int]:
    """Returns ((run, client), the entries, the position after the last complete line)."""
    *lines, last = content.split(b"\n")
    with suppress(ValueError):  # a line that lacks only its newline is complete
        json.loads(last)
        lines, last = [*lines, last], b""
    entries: list[Entry] = []
    number = 1
    try:
        header = json.loads(lines[0] if lines else b"")
        owner = header["run"], header["client"]
        if header["ledger"] != VERSION:
            raise ValueError(f"its version is {header['ledger']}, but this fedsb reads {VERSION}")
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007
            entries.append(_entry(json.loads(line), owner))
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"cannot read line {number} of {path} ({str(error).rstrip('.')}). What was released is therefore unknown. "
            "Restore the file from a backup. fedsb never recreates it."
        ) from error
    return owner, entries, len(content) - len(last)


def _entry(values: dict[str, Any], owner: tuple[str, str]) -> Entry:
    entry = Entry(**values)
    if not (isinstance(entry.count, int) and isinstance(entry.round, int) and entry.clip > 0):
        raise ValueError(f"count = {entry.count}, round = {entry.round}, clip = {entry.clip}")
    if (entry.run, entry.client) != owner:
        raise ValueError(f"it belongs to {entry.client!r} in run {entry.run}")
    _ = entry.release  # raises for an invalid q, sigma or count
    return entry


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
