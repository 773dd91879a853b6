"""`serve` at the coordinator and `join` at a site: they start and supervise the processes of each side.

    coordinator   superlink (the public port) and, if a program is given, server: `program(channel, folder)`
    site          worker (`open_handle(folder)` keeps the model) and node (communicates with the coordinator)

Ctrl-C or SIGTERM stops either side. Each writes logs/*.jsonl and pids.json to its folder, without secrets.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fedsb.deployment import certificates
from fedsb.deployment.join_file import store_join_file
from fedsb.deployment.logs import ENDED, log_event, open_log
from fedsb.deployment.registry import CA, SERVER, read_federation
from fedsb.deployment.supervisor import Child, Supervisor
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import lock
from fedsb.utils.signals import Interrupts

TOKEN_BYTES = 32


def serve(
    folder: Path,
    program: str | None = None,
    run: Path | Callable[[], Path] | None = None,
    *,
    listen: str | None = None,
    port: int | None = None,
) -> None:
    """Serves a federation and, if a program is given, runs `program(channel, run)` until it ends.

    `program` is "module:function"; if it is killed, it is started again and resumes from its own checkpoint. `run` is
    its second argument, by default `folder`, or a function that makes it, which is called once no other process serves
    this federation. `listen` is the local address, by default all addresses (IPv6 included if a host of the federation
    is one). `port` is the local port if it differs from the port that sites connect to.

    Raises the UserError or RunError of the program, and KeyboardInterrupt on Ctrl-C or SIGTERM.
    """
    _check_flower()
    federation = read_federation(folder)
    ca, server = (folder / CA).read_text(), (folder / SERVER).read_text()
    certificates.check_dates(ca, "The certificate of the federation's authority", "Create a new federation.")
    certificates.check_dates(server, "The server's certificate", f"Renew it with `fedsb federation renew {folder}`.")
    with _alone(folder), _private_folder() as sockets:
        local = str(sockets / "link")
        address = [listen or federation.all_addresses, str(federation.port if port is None else port)]
        children = [
            Child(name="superlink", module="fedsb.deployment.superlink", arguments=[str(folder), local, *address])
        ]
        if program is not None:
            run_folder = run() if callable(run) else run or folder
            arguments = [str(folder), local, program, str(run_folder)]
            children.append(
                Child(
                    name="server",
                    module="fedsb.deployment.flower_server",
                    arguments=arguments,
                    needs="superlink",
                    shown=True,
                )
            )
        _supervise(folder, children)


def join(join_file: Path, folder: Path, handle: str) -> None:
    """Takes part in a federation until it is stopped.

    `folder` is the site's folder, `handle` the "module:function" that returns its handle. Raises UserError if the
    coordinator refuses this site or the join file is not valid, and KeyboardInterrupt on Ctrl-C or SIGTERM.
    """
    _check_flower()
    store_join_file(join_file, folder)
    with _alone(folder), _private_folder() as sockets:
        path, token = str(sockets / "worker"), {"FEDSB_TOKEN": secrets.token_hex(TOKEN_BYTES)}
        worker = Child(
            name="worker",
            module="fedsb.deployment.worker",
            arguments=[str(folder), path, handle],
            secrets=token,
            shown=True,  # prints what it refuses, and why
        )
        node = Child(
            name="node",
            module="fedsb.deployment.flower_client",
            arguments=[str(folder), path],
            secrets=token,
            shown=True,  # prints whether the coordinator is reached
        )
        _supervise(folder, [worker, node])


def _supervise(folder: Path, children: list[Child]) -> None:
    with Interrupts().installed():
        open_log(folder / "logs" / "supervisor.jsonl")
        try:
            Supervisor(folder, children).watch()
        except KeyboardInterrupt:
            log_event(ENDED, how="stopped")
            raise
        except (UserError, RunError) as error:
            log_event(ENDED, how="failed", reason=str(error))
            raise
        log_event(ENDED, how="done")


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Makes a temporary folder for sockets. Its path is short, as sockets require, and only this user can enter it."""
    with tempfile.TemporaryDirectory(prefix="fedsb-") as name:
        yield Path(name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks a folder. Raises UserError if a different process already runs the processes of this folder."""
    with (folder / ".lock").open("w") as file:
        lock(file, f"{folder} is in use by a different fedsb process. Stop that process first.")
        yield


def _check_flower() -> None:
    if find_spec("flwr") is None:
        raise UserError('A federation needs flwr, which is not installed. Install it: pip install "fedsb[flower]"')
