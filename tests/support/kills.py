"""Sites and coordinators that are killed at a chosen point, and noise that a repeated round draws again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from fedsb.privacy import policy as setup
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.noise import SeededNoise
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import Request, read_request
from fedsb.protocol.payload import unpack
from fedsb.utils.errors import RunError
from fedsb.utils.rng import keyed_generator
from support.sites import Calls, Federation


class Killed(BaseException):
    """The process ends here: no handler of errors runs."""


class RoundNoise(SeededNoise):
    """Noise that depends on the client and the round alone, whatever was drawn before, as after a restart."""

    def __init__(self, client: str) -> None:
        super().__init__(0, client)
        self._client = client

    def begin(self, round: int) -> None:
        self._generator = keyed_generator(0, "noise", self._client, round)


def seed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every client RoundNoise, which begins again when its ledger is charged for a round."""
    charge = DPMechanism.charge

    def begin(self: DPMechanism, round: int) -> None:
        charge(self, round)
        assert isinstance(self.noise, RoundNoise)
        self.noise.begin(round)

    monkeypatch.setattr(setup, "noise_for", RoundNoise)
    monkeypatch.setattr(DPMechanism, "charge", begin)


def step_of(request: Request[Any]) -> tuple[str, int]:
    """(the phase, or the verb; the round, counted from 1, or 0) of a request."""
    if request.verb == "secagg":
        return str(request.phase), request.round + 1  # type: ignore[attr-defined]
    return request.verb, unpack(request.payload).round + 1 if request.verb == "train" else 0


class Mortal:
    """The handle of a site that is killed once, at a step, and started again with its folder and nothing else.

    Args:
        moment: "before" it reads the request; "inside", where the test raises Killed; "after" it has made the answer,
            which does not arrive; "idle", when the answer has arrived.
    """

    def __init__(self, sites: Federation, name: str, step: tuple[str, int], moment: str) -> None:
        self.sites, self.name, self.step, self.moment = sites, name, step, moment
        self.handler, self.alive = sites.channel.handles[name], True
        sites.channel.handles[name] = self

    def __call__(self, data: bytes) -> bytes:
        due = self.alive and step_of(read_request(data)) == self.step
        if due and self.moment == "before":
            self.kill()
        try:
            answer = self.handler(data)
        except Killed:
            self.kill()
        if due and self.moment == "idle":
            self.restart()
        elif due and self.moment == "after":
            self.kill()
        return answer

    def kill(self) -> None:
        self.restart()
        raise RunError("killed")

    def restart(self) -> None:
        self.handler.close()  # type: ignore[attr-defined]  # its locks, which end with a process
        self.handler, self.alive = self.sites.restarted(self.name), False


def cut_after(monkeypatch: pytest.MonkeyPatch, answers: int) -> list[tuple[str, int]]:
    """Kills the coordinator after this number of answers since the run's first agreement of keys.

    Returns the steps of the requests that were answered.
    """
    ask, seen = Calls.ask, list[tuple[str, int]]()

    def counted(
        self: Calls, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        for name, answer in ask(self, requests, timeout_s):
            yield name, answer
            step = step_of(read_request(requests[name]))
            if step[0] not in ("describe", "prepare", "start"):
                seen.append(step)
                if len(seen) == answers:
                    raise KeyboardInterrupt

    monkeypatch.setattr(Calls, "ask", counted)
    return seen


def offline(sites: Federation, name: str, away: Callable[[tuple[str, int]], bool]) -> None:
    """The site does not answer at these steps; it keeps running."""
    honest = sites.channel.handles[name]

    def handle(data: bytes) -> bytes:
        if away(step_of(read_request(data))):
            raise RunError("away")
        return honest(data)

    sites.channel.handles[name] = handle
