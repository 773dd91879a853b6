"""The process that runs Flower's SuperLink, with two listeners.

    public   TLS, on the address that sites connect to: only the fleet API, through `AuthMiddleware`
    local    a Unix socket in a private folder: all APIs, for the coordinator's own server process

Flower's own command serves both on one port, and with them an API by which anyone can start code. Here that API has no
port. The SuperLink's state is in memory only, because completed rounds are in the run's checkpoints.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedsb.deployment.auth import AuthMiddleware, Limits, TrafficCounter
from fedsb.deployment.child_process import run_child
from fedsb.deployment.logs import log_event
from fedsb.deployment.registry import SERVER, SERVER_KEY, Federation, SiteRegistry
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import write_atomic

if TYPE_CHECKING:
    from fastapi import FastAPI

TRAFFIC = "traffic.json"  # in the coordinator's folder: HTTP bytes by site since the start
POLL_SECONDS = 1.0
KEEP_ALIVE_SECONDS = 75  # longer than any client keeps an idle connection


def main() -> None:
    folder, local, host, port = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    asyncio.run(_serve(folder, local, host, port, Limits()))


async def _serve(folder: Path, local: Path, host: str, port: int, limits: Limits) -> None:
    from flwr.superlink.main import create_app

    flower = create_app()
    flower.state.enable_supernode_auth = True  # nodes cannot register themselves
    registry, traffic = SiteRegistry(folder), TrafficCounter()
    public = Listener(_public(AuthMiddleware(flower, registry, limits, traffic), folder, limits))
    private = Listener(uvicorn.Config(flower, lifespan="on", log_config=None, access_log=False, ws="none"))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, [public, private])
    with bound_socket(host, port) as outside, bound_local_socket(local) as inside:
        log_event("open", address=f"{host}:{outside.getsockname()[1]}")
        watch = asyncio.create_task(_watch(flower, registry, traffic, folder / TRAFFIC))
        try:
            await asyncio.gather(public.serve([outside]), private.serve([inside]))
        finally:
            watch.cancel()
            _write_traffic(traffic, folder / TRAFFIC)
            log_event("closed")


async def _watch(flower: FastAPI, registry: Callable[[], Federation], traffic: TrafficCounter, path: Path) -> None:
    """Registers new sites of the registry with Flower, and writes the traffic to `path`, once a second."""
    from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID

    state, known, written = flower.state.linkstate_factory.state(), set(), 0
    while True:
        try:
            for name, site in registry().members.items():
                if name not in known:
                    key = site.node_key.encode()
                    state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_MIN_INTERVAL, name=name)
                    known.add(name)
            if (total := traffic.requests.total()) != written:
                await asyncio.to_thread(_write_traffic, traffic, path)
                written = total
        except (UserError, RunError) as error:  # a damaged registry or a full disk does not stop the server
            log_event("trouble", reason=str(error))
        await asyncio.sleep(POLL_SECONDS)


def _write_traffic(traffic: TrafficCounter, path: Path) -> None:
    write_atomic(path, (json.dumps(traffic.rows(), indent=2) + "\n").encode())


def _public(application: AuthMiddleware, folder: Path, limits: Limits) -> uvicorn.Config:
    config = uvicorn.Config(
        application,
        ssl_certfile=folder / SERVER,
        ssl_keyfile=str(folder / SERVER_KEY),
        http=guarded_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # these headers can be forged
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return config


class Listener(uvicorn.Server):
    """One of two servers in this process. Signals are handled for both together."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _stop(listeners: list[Listener]) -> None:
    for listener in listeners:
        listener.should_exit = True


def guarded_protocol(limits: Limits) -> type[H11Protocol]:
    """Returns an HTTP protocol that closes idle connections, and those beyond the limit of one address."""
    by_address: dict[str, int] = {}

    class Guarded(H11Protocol):
        _address = ""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._address = (self.client or ("?", 0))[0]
            by_address[self._address] = by_address.get(self._address, 0) + 1
            if by_address[self._address] > limits.connections_per_address:
                reason = f"more than {limits.connections_per_address} connections"
                log_event("refused", level=logging.WARNING, address=self._address, reason=reason)
                transport.abort()
            self.loop.call_later(limits.head_seconds, self._close_if_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            by_address[self._address] -= 1
            if not by_address[self._address]:
                del by_address[self._address]
            super().connection_lost(exc)

        def _close_if_idle(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.abort()

    return Guarded


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    try:
        bound = _bind(host, port)
    except OSError as error:
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise UserError(
            f"Cannot listen on {where}: {error.strerror}. If a different coordinator uses this port, stop it or choose "
            "a different --port. If the address does not belong to this machine, choose a different --listen."
        ) from error
    with bound:
        yield bound


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":  # all addresses, IPv4 included
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


@contextmanager
def bound_local_socket(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(str(path))
        path.chmod(0o600)
        yield bound


if __name__ == "__main__":
    run_child(main)
