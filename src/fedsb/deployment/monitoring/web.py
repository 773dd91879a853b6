"""The state as a small page on this machine alone, with /metrics, /health and /state.json.

It listens on 127.0.0.1 and answers only where it is called by such a name: a page from elsewhere whose own name was
made to point here (DNS rebinding) is refused. It only reads; there is nothing to send to it.
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

from fedsb.deployment.monitoring import formatting as words
from fedsb.deployment.monitoring import metrics
from fedsb.reporting import charts
from fedsb.reporting.report import open_templates
from fedsb.utils import formatting
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.formatting import Json

ADDRESS, PORT = "127.0.0.1", 9444
NAMES = ("localhost", "127.0.0.1", "::1")
IDLE_SECONDS = 10.0  # before a connection that does not ask is closed
REFRESH_SECONDS = 5
HTML, TEXT, JSON = "text/html; charset=utf-8", "text/plain; charset=utf-8", "application/json"

Answer = tuple[HTTPStatus, str, str]  # with the content's type, and the content


def open_web(read: Callable[[], Json], port: int = PORT) -> ThreadingHTTPServer:
    """Not serving yet. Raises UserError where the port is taken."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = IDLE_SECONDS
        server_version, sys_version = "fedsb", ""

        def do_GET(self) -> None:
            nonce = secrets.token_urlsafe(16)  # lets the page's own script run, and no other
            with lock:
                status, kind, text = _answer(urlsplit(self.path).path, self.headers.get_all("Host") or [], read, nonce)
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
            """Silent: it is asked every few seconds."""

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {ADDRESS}:{port}: {error}; take another with --port") from error


def _answer(path: str, hosts: list[str], read: Callable[[], Json], nonce: str) -> Answer:
    if not _is_here(hosts):
        return HTTPStatus.FORBIDDEN, TEXT, f"this page is for this machine alone: ask for it as {NAMES[0]}\n"
    if path not in ("/", "/metrics", "/health", "/state.json"):
        return HTTPStatus.NOT_FOUND, TEXT, "there are /, /metrics, /health and /state.json\n"
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
    """Whether a request's Host is a name of this machine; any port will do, as through an SSH tunnel."""
    try:
        return len(hosts) == 1 and urlsplit(f"//{hosts[0]}").hostname in NAMES
    except ValueError:
        return False


def _page(state: Json, nonce: str) -> str:
    run = state["run"] or {}
    metric, course = run.get("metric") or "", run.get("course") or []
    scores = {row["round"]: formatting.number(row["score"]) for row in course if row["score"] is not None}
    losses = {row["round"]: formatting.number(row["loss"]) for row in course}
    shown = charts.line_chart(scores, formatting.score_text(metric), formatting.score_tick(metric))
    curves = {
        metric.replace("_", " ").capitalize(): shown,
        "Training loss": charts.line_chart(losses, formatting.plain_text, formatting.plain_text),
    }
    template = open_templates(Path(__file__).parent).get_template("status.html.j2")
    return template.render(s=state, words=words, curves=curves, nonce=nonce, every=REFRESH_SECONDS)
