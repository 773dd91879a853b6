"""Asking sites over a channel: requests made alike, answers checked before anybody reads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedsb.protocol.channel import OFFLINE, Channel, NoResponse
from fedsb.protocol.messages import Behind, F, Facts, Note, pack_note, read_answer
from fedsb.protocol.payload import PayloadError
from fedsb.utils.errors import RunError

PATIENT_S = 3600.0  # at least: a model is loaded, an adapter written
NOTE_S = 30.0  # before it is said which sites are waited for; then after twice as long each time


class Asking:
    """The sites of a channel, for one run."""

    def __init__(self, channel: Channel, run: str, deadline_s: float, note: Callable[[str], None]) -> None:
        self.channel, self.run, self.deadline_s, self.note = channel, run, deadline_s, note

    def request(self, kind: type[Facts], parts: Sequence[bytes] = (), **facts: Any) -> bytes:
        return pack_note(Note(kind.verb, {"run": self.run, **facts}, parts))

    def each(
        self, kind: type[F], requests: Mapping[str, bytes], *, patient: bool = False, what: str | None = None
    ) -> Iterator[tuple[str, F | Behind | NoResponse]]:
        """As they come; a site whose answer is not one is lost, with the reason. The deadline is of a round: a patient
        asker, who needs every site, waits longer. `what` waits, in the notes about sites that take long."""
        seconds = max(self.deadline_s, PATIENT_S) if patient else self.deadline_s
        with self._noting(requests, what or f"The request {kind.verb!r}") as waiting:
            for name, answer in self.channel.ask(requests, seconds):
                waiting.pop(name, None)
                try:
                    yield name, answer if isinstance(answer, NoResponse) else read_answer(answer, kind)
                except PayloadError as error:
                    yield name, NoResponse(str(error))

    @contextmanager
    def _noting(self, sites: Iterable[str], what: str) -> Iterator[dict[str, None]]:
        """Notes from time to time which sites are still in the given dict."""
        waiting, done, started = dict.fromkeys(sites), threading.Event(), time.monotonic()

        def watch() -> None:
            pause = NOTE_S
            while not done.wait(pause):
                if names := sorted(waiting):
                    self.note(f"{what} waits for {', '.join(names)} ({time.monotonic() - started:.0f} s)")
                pause *= 2

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield waiting
        finally:
            done.set()

    def all(
        self, kind: type[F], parts: Sequence[bytes] = (), *, among: Sequence[str] | None = None, **facts: Any
    ) -> dict[str, F]:
        """All sites' answers, by name in order; sites that are away are waited for, PATIENT_S at most.

        Raises RunError with the reason of each that has none.
        """
        names = self.channel.sites if among is None else among
        request, end = self.request(kind, parts, **facts), time.monotonic() + PATIENT_S
        found: dict[str, F | Behind | NoResponse] = {}
        waiting = list(names)
        while waiting and time.monotonic() < end:
            found |= self.each(kind, dict.fromkeys(waiting, request), patient=True)
            waiting = [name for name in waiting if _away(found.get(name))]
            if waiting:
                self.note(f"waiting for {', '.join(waiting)}")
        good = {name: answer for name, answer in sorted(found.items()) if isinstance(answer, kind)}
        faults = [f"{name}: {lost(found.get(name)).reason}" for name in names if name not in good]
        if faults or not names:
            reasons = "\n  ".join(faults) or "there are no sites"
            raise RunError(
                f"{kind.verb!r} needs an answer of every site:\n  {reasons}\nSettle it with these sites, or "
                "change the run, and serve again; --revoke goes on without a site, for good"
            )
        return good


def _away(answer: object) -> bool:
    return isinstance(answer, NoResponse) and answer.reason.startswith(OFFLINE)


def lost(answer: Facts | NoResponse | None) -> NoResponse:
    """Why an answer is of no use."""
    if isinstance(answer, NoResponse):
        return answer
    return NoResponse("no answer" if answer is None else "it still lacks what the others hold in common")
