"""When the channel asks, asks again and gives up: with a grid that forgets messages as Flower's does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedsb.channels import flower as grid_channel
from fedsb.channels.flower import GridChannel
from fedsb.channels.flower_wire import pack, unpack
from fedsb.deployment.federation import create_federation, revoke
from fedsb.deployment.logs import log_event
from fedsb.deployment.registry import SiteRegistry, read_federation
from fedsb.protocol.channel import NoResponse
from fedsb.utils.errors import UserError

Node = Callable[[bytes], bytes | NoResponse | Error | None]


class FakeGrid:
    """Nodes are functions; None is a message that nobody answers. A message is handed out once."""

    def __init__(self, folder: Path, nodes: dict[str, Node]) -> None:
        keys = {name: site.node_key.encode() for name, site in read_federation(folder).sites.items()}
        self.online = dict.fromkeys(nodes, "10:00")
        self._nodes, self._keys, self._ids = nodes, keys, {name: number for number, name in enumerate(nodes, 1)}
        self._replies: dict[str, Message] = {}
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=self._ids[name], public_key=self._keys[name], last_activated_at=since)
            for name, since in self.online.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        with self._lock:
            (message,) = messages
            (name,) = (name for name, number in self._ids.items() if number == message.metadata.dst_node_id)
            self.asked.append(name)
            identifier = f"{name}-{len(self.asked)}"
        request = unpack(message.content)
        assert isinstance(request, bytes)
        answer = self._nodes[name](request)
        if answer is not None:
            message.metadata.__dict__["_message_id"] = identifier
            content = answer if isinstance(answer, Error) else pack(answer)
            self._replies[identifier] = Message(content, reply_to=message)
        return [identifier]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(grid_channel, "NODES_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_federation(tmp_path, ["a", "b"], ["localhost"])
    return tmp_path


def node_keys_of(folder: Path) -> Callable[[], dict[str, bytes | None]]:
    registry = SiteRegistry(folder)
    return lambda: registry().node_keys


def channel(folder: Path, offline_s: float = 5.0, **nodes: Node) -> tuple[GridChannel, FakeGrid]:
    grid = FakeGrid(folder, nodes)
    return GridChannel(grid, node_keys_of(folder), log_event, offline_s), grid  # type: ignore[arg-type]


def test_answers_and_refusals(folder: Path) -> None:
    ends, grid = channel(folder, a=lambda request: request * 2, b=lambda request: NoResponse("refused: no"))
    assert ends.sites == ["a", "b"]
    assert dict(ends.ask({"a": b"x", "b": b"y"})) == {"a": b"xx", "b": NoResponse("refused: no")}
    assert sorted(grid.asked) == ["a", "b"]


def test_a_site_that_is_none(folder: Path) -> None:
    ends, _ = channel(folder, a=lambda request: request)
    with pytest.raises(UserError, match="This federation has no site 'c'"):
        ends.ask({"c": b""})


def test_late(folder: Path) -> None:
    ends, _ = channel(folder, a=lambda request: request, b=lambda request: None)
    answers = dict(ends.ask({"a": b"x", "b": b"y"}, timeout_s=0.5))
    assert answers == {"a": b"x", "b": NoResponse("late: no answer within 0.5 s")}


def test_gone(folder: Path) -> None:
    ends, grid = channel(folder, 0.3, a=lambda request: request, b=lambda request: request)
    del grid.online["b"]
    assert dict(ends.ask({"a": b"x", "b": b"y"})) == {"a": b"x", "b": NoResponse("gone: offline for 0.3 s")}
    assert grid.asked == ["a"]


def test_revoked_while_it_works(folder: Path) -> None:
    ends, _ = channel(folder, a=lambda request: None)
    threading.Timer(0.2, revoke, (folder, "a")).start()
    assert dict(ends.ask({"a": b"x"})) == {"a": NoResponse("gone: the site was revoked")}
    assert ends.sites == ["b"]


def test_a_site_that_was_revoked_before_it_is_asked_is_lost_and_the_others_answer(folder: Path) -> None:
    ends, _ = channel(folder, a=lambda request: request, b=lambda request: request)
    revoke(folder, "a")
    assert dict(ends.ask({"a": b"x", "b": b"x"})) == {"a": NoResponse("gone: the site was revoked"), "b": b"x"}


def test_a_site_that_came_back_is_asked_again(folder: Path) -> None:
    answers = iter([None, b"at last"])
    ends, grid = channel(folder, a=lambda request: next(answers))
    threading.Timer(0.2, grid.online.update, ({"a": "10:05"},)).start()
    assert dict(ends.ask({"a": b"x"})) == {"a": b"at last"}
    assert grid.asked == ["a", "a"]


def test_a_site_that_comes_online_late_is_asked_then(folder: Path) -> None:
    ends, grid = channel(folder, a=lambda request: request)
    del grid.online["a"]
    threading.Timer(0.2, grid.online.update, ({"a": "10:05"},)).start()
    assert dict(ends.ask({"a": b"x"}, timeout_s=5)) == {"a": b"x"}
    del grid.online["a"]
    assert dict(ends.ask({"a": b"x"}, timeout_s=0.1)) == {"a": NoResponse("gone: offline within 0.1 s")}


def test_an_answer_that_flower_lost_is_asked_for_again_but_not_for_ever(folder: Path) -> None:
    lost = Error(code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason="objects are unavailable")
    answers = iter([lost, b"at last"])
    ends, grid = channel(folder, a=lambda request: next(answers), b=lambda request: lost)
    answered = dict(ends.ask({"a": b"x", "b": b"y"}))
    assert answered == {"a": b"at last", "b": NoResponse("failed: the answer could not be fetched in 3 attempts")}
    assert (grid.asked.count("a"), grid.asked.count("b")) == (2, 3)


def test_a_line_that_comes_and_goes_is_no_lost_answer(folder: Path) -> None:
    away = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat")
    answers = iter([away] * (2 * grid_channel.MAX_FETCHES) + [b"at last"])
    ends, _ = channel(folder, a=lambda request: next(answers))
    assert dict(ends.ask({"a": b"x"}, timeout_s=10)) == {"a": b"at last"}


def test_a_site_that_went_away_since_it_was_looked_for_is_asked_when_it_is_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_channel, "NODES_SECONDS", 60.0)  # what is known of who is there is old
    answers = iter([Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat"), b"at last"])
    ends, grid = channel(folder, a=lambda request: next(answers), b=lambda request: request)
    assert dict(ends.ask({"b": b"y"})) == {"b": b"y"}
    del grid.online["a"]
    assert dict(ends.ask({"a": b"x"}, timeout_s=0.5)) == {"a": NoResponse("gone: offline within 0.5 s")}
    assert grid.asked.count("a") == 1


def test_an_answer_that_comes_too_late_is_taken_out_of_memory(folder: Path) -> None:
    ends, grid = channel(folder, a=lambda request: None, b=lambda request: request)
    assert isinstance(dict(ends.ask({"a": b"x"}, timeout_s=0.2))["a"], NoResponse)
    time.sleep(0.3)
    assert ends._expired == {"a-1"}
    grid._nodes["a"] = grid._nodes["b"]
    grid.push_messages([Message(pack(b"z"), 1, "query")])  # the answer to a-1, as it were
    grid._replies["a-1"] = grid._replies.pop("a-2")
    assert dict(ends.ask({"b": b"y"})) == {"b": b"y"}
    time.sleep(0.2)
    assert ends._expired == set() and not grid._replies


def test_what_is_not_an_answer_of_fedsb_is_lost() -> None:
    assert unpack(RecordDict()) == NoResponse("failed: the message is not an answer of fedsb")
    assert unpack(pack(b"")) == b""
    assert unpack(pack(NoResponse("why"))) == NoResponse("why")


def test_a_link_that_is_gone_is_no_sites_fault(tmp_path: Path) -> None:
    create_federation(tmp_path / "fed", ["a", "b"], ["localhost"])
    grid = FakeGrid(tmp_path / "fed", {"a": lambda request: request, "b": lambda request: request})

    def gone(message_ids: Iterable[str]) -> list[Message]:
        raise httpx.ConnectError("connection refused")

    grid.pull_messages = gone  # type: ignore[method-assign]
    channel = GridChannel(grid, node_keys_of(tmp_path / "fed"), log_event)  # type: ignore[arg-type]
    with pytest.raises(httpx.ConnectError):
        list(channel.ask({"a": b"1", "b": b"2"}))
