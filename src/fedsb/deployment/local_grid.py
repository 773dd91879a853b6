"""Flower's grid for a process on the SuperLink's machine: a run of its own, over a Unix socket, without waiting.

Flower would start a server process itself, from a bundle of code, and lose sight of it. Here our process starts a run
(the bundle is a name and holds no code), takes the run's task as Flower's executors do, and holds the grid.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import httpx
from flwr.app import Message
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedsb import __version__
from fedsb.deployment.logs import say
from fedsb.utils.errors import RunError

HOST = "superlink"  # a name for HTTP: the connection is a Unix socket
BUNDLE = f"""
[project]
name = "fedsb"
version = "{__version__}"
description = "A run of fedsb: the code is installed where it runs, none of it travels"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsb"

[tool.flwr.app.components]
serverapp = "fedsb.deployment.flower_server:main"
clientapp = "fedsb.deployment.flower_client:main"
"""

Client = TypeVar("Client", bound=ProtobufClient)


@dataclass(kw_only=True)
class _Coming:
    """An answer of which not every piece may be here."""

    name: str
    run: int
    missing: list[str]
    pieces: dict[str, bytes] = field(default_factory=dict)


class LocalGrid(HttpGrid):
    """Flower's grid with a client of ours, which waits for nobody: Flower's stays with an answer that comes slowly, or
    breaks off, until its last piece is there."""

    def __init__(self, client: RuntimeHttpClient, token: str) -> None:
        super().__init__(HOST, insecure=True, token=token)
        self._client = client
        self._coming: dict[str, _Coming] = {}  # by the message that is answered

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are whole by now. Raises httpx.HTTPStatusError and ObjectPullError where one is lost."""
        asked = list(message_ids)
        if new := [name for name in asked if name not in self._coming]:
            pulled = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=new))
            for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                ids = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
                coming = _Coming(name=head.metadata.message_id, run=head.metadata.run_id, missing=ids)
                self._coming[head.metadata.reply_to_message_id] = coming
        try:
            return [self._whole(self._coming.pop(name)) for name in asked if self._fetch(name)]
        except Exception:
            for name in asked:
                self._coming.pop(name, None)
            raise

    def _fetch(self, name: str) -> bool:
        """Whether the answer to this message is whole, with the pieces that have come in since."""
        if (coming := self._coming.get(name)) is None:
            return False
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, coming.run)
        try:
            while coming.missing:
                coming.pieces[coming.missing[0]] = pull(coming.missing[0])
                coming.missing.pop(0)
        except ObjectUnavailableError:
            return False
        return True

    def _whole(self, coming: _Coming) -> Message:
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=coming.run, message_object_id=coming.name)
        )
        message = cast(Message, inflate_object_from_contents(coming.name, coming.pieces))
        message.metadata.__dict__["_message_id"] = coming.name  # as Flower does: a message does not hold its own hash
        return message


@contextmanager
def run_of(local: Path) -> Iterator[LocalGrid]:
    """A run of Flower, which ends when the block does."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    control = _over(ControlHttpClient(f"http://{HOST}", interceptors=[version]), local)
    started = control.StartRun(StartRunRequest(fab=Fab(content=_bundle())))
    token = _token(_over(RuntimeHttpClient(f"http://{HOST}", interceptors=[version]), local), started.run_id)
    proof, retries = RuntimeTokenHttpInterceptor(token=token), make_simple_http_retry_invoker()
    client = RuntimeHttpClient(f"http://{HOST}", interceptors=[version, proof], retry_invoker=retries)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(_over(client, local)))
    heartbeat.start()
    task = client.PullTaskInput(PullTaskInputRequest())
    # Every Message takes its sender from here.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
        task.task_id,
        started.run_id,
        task.context.node_id,
    )
    grid, outcome = LocalGrid(client, token), "failed"
    grid.set_run(run_from_proto(task.run))
    try:
        yield grid
        outcome = "completed"
    finally:
        try:
            retries.max_tries = 1  # the link may have gone before us
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=""))
        except Exception as error:
            say("run not closed", reason=repr(error))
        heartbeat.stop()


def _token(runtime: RuntimeHttpClient, run: int) -> str:
    """What this run's process proves itself with."""
    while True:
        acquired = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if not acquired.token:
            raise RunError("Flower did not give this run its task: is another server process at work here?")
        if acquired.task.run_id == run:  # else of a run whose process died before it took it
            return str(acquired.token)


def _over(client: Client, local: Path) -> Client:
    """The same client over a Unix socket."""
    client._client.close()
    client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(local)), timeout=120.0)
    return client


def _bundle() -> bytes:
    """What Flower asks for: an app's project file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        bundle.writestr("pyproject.toml", BUNDLE)
    return content.getvalue()
