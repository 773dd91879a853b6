"""Flower's grid for a process on the SuperLink's machine, over a Unix socket.

Flower would start a server process itself, from a bundle of code, and not supervise it. Here our process starts a run
with a bundle that contains no code, takes the run's task as Flower's executors do, and opens the grid.
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
from fedsb.deployment.logs import log_event
from fedsb.utils.errors import RunError

HOST = "superlink"  # only a name in HTTP; the connection is a Unix socket
BUNDLE = f"""
[project]
name = "fedsb"
version = "{__version__}"
description = "A run of fedsb. Its code is installed on every machine and is never sent."
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
class _PartialAnswer:
    """An answer of which some pieces may be missing."""

    name: str
    run: int
    missing: list[str]
    pieces: dict[str, bytes] = field(default_factory=dict)


class LocalGrid(HttpGrid):
    """Flower's grid with our own client, which does not block.

    Flower's client waits for the last piece of an answer, even if the answer arrives slowly or breaks off.
    """

    def __init__(self, client: RuntimeHttpClient, token: str) -> None:
        super().__init__(HOST, insecure=True, token=token)
        self._client = client
        self._partial: dict[str, _PartialAnswer] = {}  # by the id of the request

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the answers that are complete. Raises httpx.HTTPStatusError and ObjectPullError for a lost one."""
        requests = list(message_ids)
        if new := [name for name in requests if name not in self._partial]:
            pulled = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=new))
            for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                ids = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
                answer = _PartialAnswer(name=head.metadata.message_id, run=head.metadata.run_id, missing=ids)
                self._partial[head.metadata.reply_to_message_id] = answer
        try:
            return [self._message(self._partial.pop(name)) for name in requests if self._fetch(name)]
        except Exception:
            for name in requests:
                self._partial.pop(name, None)
            raise

    def _fetch(self, name: str) -> bool:
        """Fetches the pieces of an answer that have arrived, and returns whether it is complete."""
        if (answer := self._partial.get(name)) is None:
            return False
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, answer.run)
        try:
            while answer.missing:
                answer.pieces[answer.missing[0]] = pull(answer.missing[0])
                answer.missing.pop(0)
        except ObjectUnavailableError:
            return False
        return True

    def _message(self, answer: _PartialAnswer) -> Message:
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=answer.run, message_object_id=answer.name)
        )
        message = cast(Message, inflate_object_from_contents(answer.name, answer.pieces))
        message.metadata.__dict__["_message_id"] = (
            answer.name
        )  # as Flower does: a message does not contain its own hash
        return message


@contextmanager
def run_of(local: Path) -> Iterator[LocalGrid]:
    """Starts a run of Flower, which ends with the block."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    control = _over(ControlHttpClient(f"http://{HOST}", interceptors=[version]), local)
    started = control.StartRun(StartRunRequest(fab=Fab(content=_bundle())))
    token = _token(_over(RuntimeHttpClient(f"http://{HOST}", interceptors=[version]), local), started.run_id)
    proof, retries = RuntimeTokenHttpInterceptor(token=token), make_simple_http_retry_invoker()
    client = RuntimeHttpClient(f"http://{HOST}", interceptors=[version, proof], retry_invoker=retries)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(_over(client, local)))
    heartbeat.start()
    task = client.PullTaskInput(PullTaskInputRequest())
    # Every Message reads its sender from here.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
        task.task_id,
        started.run_id,
        task.context.node_id,
    )
    grid, status = LocalGrid(client, token), "failed"
    grid.set_run(run_from_proto(task.run))
    try:
        yield grid
        status = "completed"
    finally:
        try:
            retries.max_tries = 1  # the SuperLink may have ended already
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        except Exception as error:
            log_event("run not closed", reason=repr(error))
        heartbeat.stop()


def _token(runtime: RuntimeHttpClient, run: int) -> str:
    """Returns the token that authenticates this run's process."""
    while True:
        acquired = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if not acquired.token:
            raise RunError(
                "Flower did not assign the task of this run. Check that no other server process uses this SuperLink."
            )
        if acquired.task.run_id == run:  # else it belongs to a run whose process died before it took its task
            return str(acquired.token)


def _over(client: Client, local: Path) -> Client:
    """Returns the client with its connection replaced by a Unix socket."""
    client._client.close()
    client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(local)), timeout=120.0)
    return client


def _bundle() -> bytes:
    """Returns the bundle that Flower requires: the project file of an app."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        bundle.writestr("pyproject.toml", BUNDLE)
    return content.getvalue()
