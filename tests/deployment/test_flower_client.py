"""How a site goes on where the coordinator cannot be reached."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.node_pb2 import Node as Node_

from fedsb.deployment import flower_client
from fedsb.deployment.flower_client import FlowerNode, pause_after
from fedsb.utils.errors import DiskError, UserError

ASKED = httpx.Request("POST", "https://localhost:1/v1/fleet/activate-node")


class EndedError(UserError):
    """Ends `serve`, as a refusal does."""


class Node(FlowerNode):
    """A node whose coordinator does what `course` says: "down", "up" (it activates), "idle", "lost", "elsewhere"."""

    def __init__(self, course: list[str]) -> None:
        self.course, self._address = course, "localhost:1"

    def _next(self, *good: str) -> None:
        if not self.course:
            raise EndedError
        if (step := self.course.pop(0)) == "elsewhere":
            raise httpx.HTTPStatusError(step, request=ASKED, response=httpx.Response(412, request=ASKED))
        if step not in good:
            raise httpx.ConnectError(step)

    def _activate(self) -> None:
        self._next("up")

    def _answer_next(self, answer: Any) -> bool:
        self._next("idle")
        return False

    def _send_heartbeats(self) -> None:
        """None."""


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`course(steps)`: (the pauses in seconds, what was logged) of a node that goes through them."""

    def run(steps: list[str], ends: str | None = None) -> tuple[list[float], list[str]]:
        clock, pauses, said = [1000.0], list[float](), list[str]()

        def sleep(seconds: float) -> None:
            clock[0] += seconds
            pauses.append(seconds)

        monkeypatch.setattr(flower_client.time, "sleep", sleep)
        monkeypatch.setattr(flower_client.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(flower_client, "log_event", lambda event, **facts: said.append(event))
        with pytest.raises(UserError if ends else EndedError, match=ends):
            Node(steps).serve(lambda request: request)
        return pauses, said

    return run


def test_pauses_grow_to_a_few_seconds_and_differ() -> None:
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (5, 5.0), (10_000, 5.0)):
        tried = [pause_after(failures) for _ in range(50)]
        assert longest / 2 <= min(tried) < max(tried) <= longest


def test_a_long_outage_is_tried_every_few_seconds_and_said_once_a_minute(course: Any) -> None:
    pauses, said = course(["down"] * 400)
    assert len(pauses) == 400 and max(pauses) <= 5.0 and sum(pauses) > 400 * 2.5 * 0.95
    assert said.count("trouble") <= 2 + sum(pauses) / 60


def test_a_coordinator_that_is_back_is_met_at_once_again(course: Any) -> None:
    pauses, said = course([*["down"] * 10, "up", "idle", "down", "up", "idle"])
    assert pauses[-2] <= 1.0 and said == ["trouble", "trouble"]  # the first failure after an answer


def test_a_coordinator_that_takes_a_site_in_and_then_fails_is_not_hammered(course: Any) -> None:
    pauses, _ = course(["up", "lost"] * 20)
    assert min(pauses[5:]) >= 2.5


def test_a_coordinator_that_is_not_reached_is_named_once_with_what_to_check(
    course: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    course([*["down"] * 20, "up", "idle", *["down"] * 3, "up"])
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("cannot reach the coordinator at localhost:1 (ConnectError: down)")
    for check in ("the coordinator is serving", "the address in the join file is right", "firewall"):
        assert check in first
    assert [line.split(";")[0] for line in others] == [
        "connected to the coordinator at localhost:1",
        "lost the coordinator (ConnectError)",
        "connected to the coordinator at localhost:1",
    ]


@pytest.mark.parametrize(
    "error", [DiskError("the disk is full"), UserError("refused"), httpx.ReadTimeout("late"), ValueError("bad answer")]
)
def test_no_error_ends_the_heartbeat(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first heartbeat finds a coordinator that does not know this node, and the activation fails: it goes on."""
    node, said, left = object.__new__(FlowerNode), [], [3]

    class Client:
        def SendNodeHeartbeat(self, beat: object) -> SimpleNamespace:
            return SimpleNamespace(success=False)

    def activate() -> None:
        raise error

    def sleep(seconds: float) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise EndedError

    node._client, node._node = Client(), Node_(node_id=7)  # type: ignore[assignment]
    monkeypatch.setattr(node, "_activate", activate)
    monkeypatch.setattr(flower_client.time, "sleep", sleep)
    monkeypatch.setattr(flower_client, "log_event", lambda event, **facts: said.append((event, facts["reason"])))
    with pytest.raises(EndedError):
        node._send_heartbeats()
    assert said == [("no heartbeat", f"{type(error).__name__}: {error}")] * 3
    assert capsys.readouterr().out.count("no heartbeat reached the coordinator") == 1


def test_a_second_node_with_the_same_keys_ends_with_words(course: Any) -> None:
    pauses, _ = course(["elsewhere"] * 100, ends="A node with this site's keys is already connected")
    assert 90 < sum(pauses) < 100


def test_an_outage_between_is_no_second_node(course: Any) -> None:
    pauses, _ = course(["elsewhere", *["down"] * 60, "elsewhere", "up"])
    assert sum(pauses) > 90


def test_a_node_that_was_killed_waits_until_its_former_self_is_forgotten(
    course: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    course([*["elsewhere"] * 10, "up", "idle", "lost", "up"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0] for line in said] == [
        "connected to the coordinator at localhost:1",
        "lost the coordinator (ConnectError)",
        "connected to the coordinator at localhost:1",
    ]
