"""The state as a small page on this machine alone, with /metrics, /health and /state.json.

It listens on 127.0.0.1 and answers only where it is called by such a name: a page from elsewhere whose own name was
made to point here (DNS rebinding) is refused. It only reads; there is nothing to send to it.
"""

from __future__ import annotations

import http
import json
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from fedsb import charts
from fedsb.errors import RunError, UserError
from fedsb.report import open_templates
from fedsb.status import metrics, words
from fedsb.status.files import Json

ADDRESS, PORT = "127.0.0.1", 9444
NAMES = ("localhost", "127.0.0.1", "::1")
IDLE_SECONDS = 10.0  # before a connection that does not ask is closed
REFRESH_SECONDS = 5
HTML, TEXT, JSON = "text/html; charset=utf-8", "text/plain; charset=utf-8", "application/json"


def open_web(read: Callable[[], Json], port: int = PORT) -> ThreadingHTTPServer:
    """Not serving yet. Raises UserError where the port is taken."""
    lock = threading.Lock()

    def one_at_a_time() -> Json:
        with lock:
            return read()

    try:
        return ThreadingHTTPServer((ADDRESS, port), _handler(one_at_a_time))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {ADDRESS}:{port}: {error}; take another with --port") from error


def page(state: Json, nonce: str) -> str:
    """`nonce` lets the page's own script run, and no other."""
    course = (state["run"] or {}).get("course") or []
    metric = (state["run"] or {}).get("metric") or ""
    scores = {row["round"]: charts.number(row["score"]) for row in course if row["score"] is not None}
    losses = {row["round"]: charts.number(row["loss"]) for row in course}
    curves = {
        metric.replace("_", " ").capitalize(): charts.line_chart(
            scores, charts.score_text(metric), charts.score_tick(metric)
        ),
        "Training loss": charts.line_chart(losses, charts.plain_text, charts.plain_text),
    }
    template = open_templates().get_template("status.html.j2")
    return template.render(s=state, words=words, curves=curves, nonce=nonce, every=REFRESH_SECONDS)


def _handler(read: Callable[[], Json]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = IDLE_SECONDS
        server_version, sys_version = "fedsb", ""

        def do_GET(self) -> None:
            if (refusal := _refusal(self.headers.get_all("Host") or [])) is not None:
                self._answer(http.HTTPStatus.FORBIDDEN, TEXT, f"{refusal}\n")
                return
            path, nonce = urlsplit(self.path).path, secrets.token_urlsafe(16)
            if path not in ("/", "/metrics", "/health", "/state.json"):
                self._answer(http.HTTPStatus.NOT_FOUND, TEXT, "there are /, /metrics, /health and /state.json\n")
                return
            try:
                state = read()
                status, kind, body = _view(path, state, nonce)
            except (UserError, RunError) as error:
                status, kind, body = http.HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"{error}\n"
            self._answer(status, kind, body, nonce)

        do_HEAD = do_GET

        def _answer(self, status: http.HTTPStatus, kind: str, body: str, nonce: str = "") -> None:
            content = body.encode()
            script = f"script-src 'nonce-{nonce}'; connect-src 'self'; " if nonce else ""
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header(
                "Content-Security-Policy",
                f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; {script}base-uri 'none'; "
                "form-action 'none'; frame-ancestors 'none'",
            )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: it is asked every few seconds."""

    return Handler


def _view(path: str, state: Json, nonce: str) -> tuple[http.HTTPStatus, str, str]:
    if path == "/metrics":
        return http.HTTPStatus.OK, metrics.CONTENT_TYPE, metrics.exposition(state)
    if path == "/health":
        well = http.HTTPStatus.OK if state["health"]["ok"] else http.HTTPStatus.SERVICE_UNAVAILABLE
        return well, JSON, json.dumps(state["health"], indent=1) + "\n"
    if path == "/state.json":
        return http.HTTPStatus.OK, JSON, json.dumps(state, indent=1) + "\n"
    return http.HTTPStatus.OK, HTML, page(state, nonce)


def _refusal(hosts: list[str]) -> str | None:
    """Why a request by this Host is not answered; any port will do, as through an SSH tunnel."""
    try:
        name = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
    except ValueError:
        name = None
    return None if name in NAMES else f"this page is for this machine alone: ask for it as {NAMES[0]}"
