"""Flower's grid for a process on the SuperLink's machine: a run of its own, over a Unix socket, without waiting.

Flower would start a server process itself, from a bundle of code, and lose sight of it. Here our process starts a run
(the bundle is a name and holds no code), takes the run's task as Flower's executors do, and holds the grid.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedsb import __version__
from fedsb.deployment.logs import say
from fedsb.errors import RunError

HOST = "superlink"  # a name for HTTP: the connection is a Unix socket
ANSWER_SECONDS = 900.0  # between an answer's first piece and its last
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


class LocalGrid(HttpGrid):
    """Flower's grid with a client of ours; it looks again soon where an answer is still coming in (Flower: 1 s)."""

    def __init__(self, client: RuntimeHttpClient, token: str) -> None:
        super().__init__(HOST, insecure=True, token=token)
        self._client = client

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that have come, whole. Raises httpx.HTTPStatusError and ObjectPullError where one is lost."""
        client, messages = self._runtime_client, []
        pulled = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        for head, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            name, run = head.metadata.message_id, head.metadata.run_id
            pull = make_pull_object_fn_protobuf(client.PullObject, self.node, run)
            ids = [part.object_id for part in iterate_object_tree(tree)]
            contents = pull_objects(ids, pull, max_time=ANSWER_SECONDS, initial_backoff=0.02, backoff_cap=1.0)
            client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name)
            )
            message = cast(Message, inflate_object_from_contents(name, contents))
            message.metadata.__dict__["_message_id"] = name  # as Flower does: a message does not hold its own hash
            messages.append(message)
        return messages


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
            return acquired.token


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
