"""The process that runs the coordinator's program: `run(channel, folder)`, with Flower's grid as its channel.

Flower would start it from a bundle of code, as a grandchild that dies unseen. Here it is a process of ours: it starts a
run (the bundle is a name, it holds no code), takes the run's task as an executor of Flower does, and works.
"""

from __future__ import annotations

import io
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import httpx

from fedsb import __version__
from fedsb.deployment.child import load, run_child
from fedsb.deployment.federation import Register
from fedsb.deployment.grid_channel import GridChannel
from fedsb.deployment.logs import say
from fedsb.errors import RunError
from fedsb.interrupts import Interrupts

if TYPE_CHECKING:
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.superlink.grid import HttpGrid
    from flwr.supercore.protobuf.client import ProtobufClient

START_SECONDS = 60.0
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

Client = TypeVar("Client", bound="ProtobufClient")


def main() -> None:
    folder, local, program, run = Path(sys.argv[1]), Path(sys.argv[2]), load(sys.argv[3]), Path(sys.argv[4])
    _wait_for(local)
    with Interrupts().installed():
        grid, finish = _start_run(local)
        say("run started", run=str(run))
        outcome = "failed"
        try:
            program(GridChannel(grid, Register(folder)), run)
            outcome = "completed"
        finally:
            finish(outcome)
            say("run ended", outcome=outcome)


def _start_run(local: Path) -> tuple[HttpGrid, Finish]:
    """A grid with a run of its own, and what ends it."""
    from flwr.common.serde import run_from_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    control = over_socket(ControlHttpClient(f"http://{HOST}", interceptors=[version]), local)
    started = control.StartRun(StartRunRequest(fab=Fab(content=_bundle())))
    runtime = over_socket(RuntimeHttpClient(f"http://{HOST}", interceptors=[version]), local)
    acquired = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    while acquired.token and acquired.task.run_id != started.run_id:  # of a run whose process died before it took it
        acquired = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    if not acquired.token:
        raise RunError("Flower did not give this run its task: is another server process at work here?")
    token = RuntimeTokenHttpInterceptor(token=acquired.token)
    runtime = over_socket(RuntimeHttpClient(f"http://{HOST}", interceptors=[version, token]), local)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(runtime))
    heartbeat.start()
    task = runtime.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, started.run_id, task.context.node_id
    grid = HttpGrid(HOST, insecure=True, token=acquired.token)
    grid._client = runtime  # its own would dial TCP
    grid.set_run(run_from_proto(task.run))
    return grid, Finish(runtime, heartbeat)


class Finish:
    """Tells Flower how the run ended."""

    def __init__(self, runtime: RuntimeHttpClient, heartbeat: HeartbeatSender) -> None:
        self._runtime, self._heartbeat = runtime, heartbeat

    def __call__(self, outcome: str) -> None:
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        try:
            self._runtime.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=""))
        except httpx.HTTPError as error:  # the link went before us
            say("run not closed", reason=str(error))
        self._heartbeat.stop()


def over_socket(client: Client, local: Path) -> Client:
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


def _wait_for(local: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(local)) == 0:
                return
        if time.monotonic() > end:
            raise RunError(f"the SuperLink did not open within {START_SECONDS:.0f} s: see its log")
        time.sleep(0.1)


if __name__ == "__main__":
    run_child(main)
