"""Requests to the clients of a run, and their replies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fedsb.protocol.channel import OFFLINE, Channel, NoResponse
from fedsb.protocol.messages import NoKeys, Reply, Request, Stale
from fedsb.utils.errors import RunError

PATIENT_S = 3600.0  # at least: a model is loaded, an adapter written
NOTE_S = 30.0  # before the first note on which clients are waited for; then after twice as long each time

R = TypeVar("R", bound=Reply)


class Exchange:
    """The clients of a channel, for one run.

    Args:
        note: receives lines for the user.
    """

    def __init__(self, channel: Channel, run: str, deadline_s: float, note: Callable[[str], None]) -> None:
        self.channel, self.run, self.deadline_s, self.note = channel, run, deadline_s, note

    def each(
        self, requests: Mapping[str, Request[R]], *, patient: bool = False, what: str | None = None
    ) -> Iterator[tuple[str, R | Stale | NoKeys | NoResponse]]:
        """Yields replies as they arrive.

        The deadline is that of a round. A patient server, which needs every client, waits longer. `what` names the
        waiting step in notes about slow clients.
        """
        if not requests:
            return
        seconds = max(self.deadline_s, PATIENT_S) if patient else self.deadline_s
        name = what or f"The request {next(iter(requests.values())).verb!r}"
        with self._noting(requests, name) as waiting:
            for client, reply in self.channel.exchange(requests, seconds):
                waiting.pop(client, None)
                yield client, reply  # type: ignore[misc]  # a channel checks a reply against its request

    def all(self, request: Request[R], *, among: Sequence[str] | None = None) -> dict[str, R]:
        """Returns all clients' replies, sorted by name. Offline clients are waited for, PATIENT_S at most.

        Raises RunError with the reason of each that has none.
        """
        names, end = self.channel.clients if among is None else among, time.monotonic() + PATIENT_S
        found: dict[str, R | Stale | NoKeys | NoResponse] = {}
        waiting = list(names)
        while waiting and time.monotonic() < end:
            found |= self.each(dict.fromkeys(waiting, request), patient=True)
            waiting = [name for name in waiting if _is_offline(found.get(name))]
            if waiting:
                self.note(f"waiting for {', '.join(waiting)}")
        good = {name: reply for name, reply in sorted(found.items()) if isinstance(reply, request.reply)}
        missing = [f"{name}: {reason_of(found.get(name))}" for name in names if name not in good]
        if missing or not names:
            reasons = "\n  ".join(missing) or "there are no sites"
            raise RunError(
                f"The request {request.verb!r} needs a reply of every site:\n  {reasons}\nResolve it with these sites, "
                "or change the run, and serve again. `fedsb federation revoke` continues without a site, for good."
            )
        return good  # type: ignore[return-value]

    @contextmanager
    def _noting(self, clients: Iterable[str], what: str) -> Iterator[dict[str, None]]:
        """Notes from time to time which clients are still in the returned dict."""
        waiting, done, started = dict.fromkeys(clients), threading.Event(), time.monotonic()

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


def _is_offline(reply: object) -> bool:
    return isinstance(reply, NoResponse) and reply.reason.startswith(OFFLINE)


def reason_of(reply: Reply | NoResponse | None) -> str:
    """Returns the reason why a reply cannot be used."""
    if isinstance(reply, NoResponse):
        return reply.reason
    if isinstance(reply, NoKeys):
        return "it was restarted since the keys were agreed on"
    return "no reply" if reply is None else "it still lacks the shared state of the others"
