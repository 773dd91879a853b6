"""Serves the state as a web page on this machine, with /metrics, /health and /state.json.

The server listens on 127.0.0.1 and answers only requests whose Host is a name of this machine. So a page from a
different site, whose name was made to resolve to this machine (DNS rebinding), is refused. The server is read-only.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedsb.deployment.monitoring import formatting as state_formatting
from fedsb.deployment.monitoring import metrics
from fedsb.reporting import charts
from fedsb.reporting.report import open_templates
from fedsb.utils import formatting
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.formatting import Json

ADDRESS, PORT = "127.0.0.1", 9444
NAMES = ("localhost", "127.0.0.1", "::1")
IDLE_SECONDS = 10.0  # before an idle connection is closed
REFRESH_SECONDS = 5
HTML, TEXT, JSON = "text/html; charset=utf-8", "text/plain; charset=utf-8", "application/json"

Answer = tuple[HTTPStatus, str, str]  # status, content type, content


class StateServer(ThreadingHTTPServer):
    """A server of the state that `read` returns."""

    def __init__(self, read: Callable[[], Json], port: int) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.read, self.lock = read, threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: StateServer
    timeout = IDLE_SECONDS
    server_version, sys_version = "fedsb", ""

    def do_GET(self) -> None:
        nonce = secrets.token_urlsafe(16)  # only the page's own script may run
        hosts = self.headers.get_all("Host") or []
        with self.server.lock:
            status, kind, text = _answer(urlsplit(self.path).path, hosts, self.server.read, nonce)
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(text.encode())),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
            f"'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing, since a page asks every few seconds."""


def open_web(read: Callable[[], Json], port: int = PORT) -> StateServer:
    """Returns a server that listens but does not serve yet. Raises UserError if the port is in use."""
    try:
        return StateServer(read, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"Cannot listen on {ADDRESS}:{port}: {error}. Choose a different port with --port.") from error


def _answer(path: str, hosts: list[str], read: Callable[[], Json], nonce: str) -> Answer:
    if not _is_here(hosts):
        return HTTPStatus.FORBIDDEN, TEXT, f"This page can be opened on its own machine only, as {NAMES[0]}.\n"
    if path not in ("/", "/metrics", "/health", "/state.json"):
        return HTTPStatus.NOT_FOUND, TEXT, "The pages are /, /metrics, /health and /state.json.\n"
    try:
        state = read()
    except (UserError, RunError) as error:
        return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"{error}\n"
    if path == "/metrics":
        return HTTPStatus.OK, metrics.CONTENT_TYPE_LATEST, metrics.exposition(state)
    if path == "/health":
        status = HTTPStatus.OK if state["health"]["ok"] else HTTPStatus.SERVICE_UNAVAILABLE
        return status, JSON, json.dumps(state["health"], indent=1) + "\n"
    if path == "/state.json":
        return HTTPStatus.OK, JSON, json.dumps(state, indent=1) + "\n"
    return HTTPStatus.OK, HTML, _page(state, nonce)


def _is_here(hosts: list[str]) -> bool:
    """Returns whether a request's Host is a name of this machine. Any port is accepted, for SSH tunnels."""
    try:
        return len(hosts) == 1 and urlsplit(f"//{hosts[0]}").hostname in NAMES
    except ValueError:
        return False


def _page(state: Json, nonce: str) -> str:
    run = state["run"] or {}
    metric, history = run.get("metric") or "", run.get("history") or []
    scores = {row["round"]: formatting.number(row["score"]) for row in history if row["score"] is not None}
    losses = {row["round"]: formatting.number(row["loss"]) for row in history}
    shown = charts.line_chart(scores, formatting.score_text(metric), formatting.score_tick(metric))
    curves = {
        metric.replace("_", " ").capitalize(): shown,
        "Training loss": charts.line_chart(losses, formatting.plain_text, formatting.plain_text),
    }
    template = open_templates(Path(__file__).parent).get_template("status.html.j2")
    return template.render(s=state, formatting=state_formatting, curves=curves, nonce=nonce, every=REFRESH_SECONDS)
