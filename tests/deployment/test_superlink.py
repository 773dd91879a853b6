"""The listener's mechanism, and the grid that fetches answers piece by piece."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from flwr.app import Message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.task_identity import TaskIdentity

from fedsb.channels.flower_wire import pack, unpack
from fedsb.deployment.auth import Limits
from fedsb.deployment.federation import create_federation
from fedsb.deployment.local_grid import LocalGrid
from fedsb.deployment.registry import read_federation
from fedsb.deployment.superlink import Listener, bound_socket, guarded_protocol
from fedsb.utils.errors import UserError


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def _closed(reader: asyncio.StreamReader, within_s: float) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), within_s) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_connections_that_do_not_ask_or_are_too_many_are_closed() -> None:
    limits = Limits(head_seconds=0.5, connections_per_address=2)

    async def scene(bound: socket.socket) -> None:
        config = uvicorn.Config(_hello, http=guarded_protocol(limits), lifespan="off", log_config=None, ws="none")
        listener = Listener(config)
        serving = asyncio.create_task(listener.serve([bound]))
        port = bound.getsockname()[1]
        while not listener.started:
            await asyncio.sleep(0.01)
        asks, a_writer = await asyncio.open_connection("127.0.0.1", port)
        a_writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await asks.readline()).startswith(b"HTTP/1.1 200")
        silent, s_writer = await asyncio.open_connection("127.0.0.1", port)
        s_writer.write(b"GET / HTTP/1.1\r\nhost: ")  # and no more
        third, _ = await asyncio.open_connection("127.0.0.1", port)
        assert await _closed(third, 0.3)
        assert await _closed(silent, 3.0)
        fourth, f_writer = await asyncio.open_connection("127.0.0.1", port)
        f_writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await fourth.readline()).startswith(b"HTTP/1.1 200")
        for writer in (a_writer, s_writer, f_writer):
            writer.close()
        listener.should_exit = True
        await serving

    with bound_socket("127.0.0.1", 0) as bound:
        asyncio.run(scene(bound))


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_all_addresses_of_a_federation_with_an_ipv6_host_are_reached(tmp_path: Path, address: str) -> None:
    create_federation(tmp_path / "fed", ["a"], ["::1"])
    with bound_socket(read_federation(tmp_path / "fed").all_addresses, 0) as bound:
        bound.listen()
        socket.create_connection((address, bound.getsockname()[1]), timeout=10).close()


def test_a_federation_of_names_and_ipv4_addresses_does_not_listen_on_ipv6(tmp_path: Path) -> None:
    create_federation(tmp_path / "fed", ["a"], ["fed.example.org", "10.0.0.5"])
    assert read_federation(tmp_path / "fed").all_addresses == "0.0.0.0"


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        with (
            pytest.raises(UserError, match="If a different coordinator uses this port"),
            bound_socket("127.0.0.1", taken.getsockname()[1]),
        ):
            pass


class FakeClient:
    """A SuperLink that has an answer, of which pieces come in one by one."""

    def __init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        asked = Message(pack(b"question"), 7, "query")
        asked.metadata.__dict__["_message_id"] = "asked"
        reply = Message(pack(bytes(12_000_000)), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.pieces = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        self.head, self.tree, self.tree_sent = message_to_proto(reply), get_object_tree(reply), 0
        self.here: set[str] = set()
        self.lost = False
        self.pulled: list[str] = []

    def PullMessages(self, request: Any) -> Any:
        self.tree_sent += 1
        return SimpleNamespace(messages_list=[self.head], message_object_trees=[self.tree])

    def PullObject(self, request: Any) -> PullObjectResponse:
        if self.lost:
            return PullObjectResponse(object_found=False)
        here = request.object_id in self.here
        if here:
            self.pulled.append(request.object_id)
        content = self.pieces[request.object_id] if here else b""
        return PullObjectResponse(object_found=True, object_available=here, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        pass


def test_an_answer_is_whole_when_its_last_piece_is_here_and_none_is_fetched_twice() -> None:
    client = FakeClient()
    grid = LocalGrid(client, "token")  # type: ignore[arg-type]
    whole: list[Message] = []
    for name in client.pieces:
        assert whole == []
        client.here.add(name)
        whole = grid.pull_messages(["asked"])
    assert unpack(whole[0].content) == bytes(12_000_000)
    assert sorted(client.pulled) == sorted(client.pieces) and client.tree_sent == 1


def test_an_answer_that_breaks_off_is_lost() -> None:
    client = FakeClient()
    grid = LocalGrid(client, "token")  # type: ignore[arg-type]
    assert grid.pull_messages(["asked"]) == []
    client.lost = True
    with pytest.raises(ObjectPullError):
        grid.pull_messages(["asked"])
    assert not grid._partial
