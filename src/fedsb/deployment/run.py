"""`serve` at the coordinator and `join` at a site: the processes of each end, kept alive until it ends or is stopped.

    coordinator   superlink (the public door) and, with a program, server: `run(channel, folder)`
    site          trainer (`open_handle(folder)` keeps the model) and node (talks to the coordinator)

Either is stopped by Ctrl-C or SIGTERM. Each writes logs/*.jsonl, pids.json and nothing secret in its folder.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fedsb.deployment import certificates
from fedsb.deployment.federation import CA, SERVER, read_federation
from fedsb.deployment.join_file import keep_join_file
from fedsb.deployment.logs import ENDED, open_log, say
from fedsb.deployment.supervise import Child, Supervisor
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
    """Opens the door to the sites and, with a program, runs `program(channel, run)` until it ends.

    `program` is "module:function", `run` the folder it is given (the coordinator's where none is said), or what makes
    that folder, which is called when no other process serves this federation. `port` is the one
    to listen on where it is not the one that sites dial (behind a forwarding router). `listen` is the local address;
    by default all of them, those of IPv6 if one of the federation's hosts is an IPv6 address. A program that is killed
    is run again: it takes up its own checkpoint. Raises its UserError or RunError; KeyboardInterrupt when stopped.
    """
    _check_flower()
    federation = read_federation(folder)
    remedy = f"renew it, `fedsb serve {folder} --renew`"
    certificates.check_dates((folder / CA).read_text(), "the federation's authority", "make a new federation")
    certificates.check_dates((folder / SERVER).read_text(), "the server's certificate", remedy)
    with _alone(folder), _private_folder() as sockets:
        local = str(sockets / "link")
        address = [listen or federation.all_addresses, str(federation.port if port is None else port)]
        children = [
            Child(name="superlink", module="fedsb.deployment.superlink", arguments=[str(folder), local, *address])
        ]
        if program is not None:
            where = run() if callable(run) else run or folder
            arguments = [str(folder), local, program, str(where)]
            children.append(
                Child(
                    name="server",
                    module="fedsb.deployment.flower_server",
                    arguments=arguments,
                    needs="superlink",
                    shown=True,
                )
            )
        _keep(folder, children)


def join(join_file: Path, folder: Path, handle: str) -> None:
    """Takes part in a federation until stopped: `handle` is "module:open_handle", `folder` this site's own.

    Raises UserError where the coordinator refuses this site, or the join file is not good; KeyboardInterrupt when
    stopped.
    """
    _check_flower()
    keep_join_file(join_file, folder)
    with _alone(folder), _private_folder() as sockets:
        path, token = str(sockets / "trainer"), {"FEDSB_TOKEN": secrets.token_hex(TOKEN_BYTES)}
        trainer = Child(
            name="trainer",
            module="fedsb.deployment.trainer",
            arguments=[str(folder), path, handle],
            secrets=token,
            shown=True,  # what it refuses, and why
        )
        node = Child(
            name="node",
            module="fedsb.deployment.flower_client",
            arguments=[str(folder), path],
            secrets=token,
            shown=True,  # whether it is at the coordinator
        )
        _keep(folder, [trainer, node])


def _keep(folder: Path, children: list[Child]) -> None:
    with Interrupts().installed():
        open_log(folder / "logs" / "supervisor.jsonl")
        try:
            Supervisor(folder, children).watch()
        except KeyboardInterrupt:
            say(ENDED, how="stopped")
            raise
        except (UserError, RunError) as error:
            say(ENDED, how="failed", reason=str(error))
            raise
        say(ENDED, how="done")


@contextmanager
def _private_folder() -> Iterator[Path]:
    """For sockets: a short path, which theirs must be, that only this user can enter."""
    with tempfile.TemporaryDirectory(prefix="fedsb-") as name:
        yield Path(name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises UserError where another process keeps this folder's processes."""
    with (folder / ".lock").open("w") as file:
        lock(file, f"{folder} is in use by another process. Stop that process first.")
        yield


def _check_flower() -> None:
    if find_spec("flwr") is None:
        raise UserError('flwr is not installed, and a real federation needs it: pip install "fedsb[flower]"')
