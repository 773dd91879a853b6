"""Authenticates the requests that arrive at the coordinator's public port.

Flower serves three APIs on one port: fleet (for sites), and control and runtime (for the operator, without any
authentication: anyone who reaches them can start a run with their own Python code). `AuthMiddleware` is an ASGI
application in front of Flower's. The SuperLink's public listener serves only this middleware. It is not a proxy that
parses HTTP a second time, so there cannot be two different readings of one request.

A request passes if it is a POST to one of PATHS, its length is within limits, and it was signed within the last minutes
by the node key of a registered site. All of this is checked before the body is read. PATHS does not contain the paths
by which a node would fetch code (get-fab, get-run) or register itself.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedsb.channels.flower_wire import MAX_ANSWER_BYTES
from fedsb.deployment.logs import log_event
from fedsb.deployment.registry import Federation

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

ACTIVATE = "/v1/fleet/activate-node"
PATHS = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "pull-object",
        "confirm-message-received",
        "push-messages",
        "push-object",
    )
)
KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER = "flwr-public-key", "flwr-timestamp", "flwr-signature"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on the requests and connections of one client of the public port."""

    body_bytes: int = 8 * 2**20  # of one request; Flower sends arrays in pieces of 5 MiB
    answer_bytes: int = MAX_ANSWER_BYTES + 2**20  # of all pieces of one answer
    header_bytes: int = 16 * 2**10
    connections: int = 512
    connections_per_address: int = 128  # several sites can share one address
    head_seconds: float = 20.0  # to send the headers of the first request
    clock_seconds: float = 300.0  # difference between a site's clock and ours


@dataclass(kw_only=True)
class TrafficCounter:
    """Counts the HTTP bytes of each site, headers and bodies, before TLS (which adds less than 1% to large ones)."""

    bytes_in: Counter[str] = field(default_factory=Counter)
    bytes_out: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    last_seen: dict[str, float] = field(default_factory=dict)  # seconds since 1970

    def rows(self) -> dict[str, dict[str, float]]:
        return {
            site: {
                "requests": n,
                "bytes_in": self.bytes_in[site],
                "bytes_out": self.bytes_out[site],
                "last_seen": self.last_seen[site],
            }
            for site, n in sorted(self.requests.items())
        }


class RefusedError(Exception):
    """A refused request: its HTTP status and the reason that is sent back."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class AuthMiddleware:
    """An ASGI application that passes the requests of registered sites to Flower's application."""

    def __init__(
        self, inner: Application, registry: Callable[[], Federation], limits: Limits, traffic: TrafficCounter
    ) -> None:
        self._inner, self._registry, self._limits, self._traffic = inner, registry, limits, traffic
        self._pushed: Counter[str] = Counter()  # bytes of the answer that a site is sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        site = ""
        try:
            self._check_path(scope)
            site = self._site(headers)
            size = self._check_size(scope["path"], site, headers)
        except RefusedError as refusal:
            _log_refused(scope, site, refusal)
            await _refuse(send, refusal)
            return
        self._traffic.last_seen[site] = time.time()
        self._traffic.requests[site] += 1
        self._traffic.bytes_in[site] += size + _header_bytes(scope["headers"])

        async def counted(event: Event) -> None:
            headers = event.get("headers", ())
            if event.get("status") == 412 and scope["path"] == ACTIVATE:
                reason = "a node with this site's keys is already connected; check whether two machines have its keys"
                _log_refused(scope, site, RefusedError(412, reason))
            self._traffic.bytes_out[site] += len(event.get("body", b"")) + _header_bytes(headers)
            await send(event)

        await self._inner(scope, receive, counted)

    def _check_path(self, scope: Scope) -> None:
        if scope["path"] not in PATHS:
            raise RefusedError(404, "not found")
        if scope["method"] != "POST":
            raise RefusedError(405, "only POST is allowed")
        # The web server limits headers that arrive in several pieces only.
        if (size := _header_bytes(scope["headers"])) > self._limits.header_bytes:
            raise RefusedError(431, f"{size} bytes of headers; at most {self._limits.header_bytes} are allowed")

    def _site(self, headers: Mapping[str, str]) -> str:
        """Returns the name of the site whose node key signed this request."""
        try:
            key = base64.b64decode(headers[KEY_HEADER], validate=True)
            signature = base64.b64decode(headers[SIGNATURE_HEADER], validate=True)
            time = headers[TIME_HEADER]
            signed_at = datetime.datetime.fromisoformat(time)
            clock_difference = abs((datetime.datetime.now(datetime.UTC) - signed_at).total_seconds())
        except (KeyError, ValueError, TypeError, binascii.Error):
            raise RefusedError(401, "the request is not signed by a site's node key") from None
        federation = self._registry()
        name = next((name for name, site in federation.sites.items() if site.node_key.encode() == key), None)
        if name is None:
            raise RefusedError(401, "this key does not belong to a site of this federation; ask for a join file")
        if federation.sites[name].revoked:
            raise RefusedError(401, f"site {name!r} was revoked by the coordinator")
        if clock_difference > self._limits.clock_seconds:
            raise RefusedError(
                401, f"the clocks of the site and the coordinator differ by {clock_difference:.0f} s; set the clock"
            )
        public = load_pem_public_key(key)
        try:
            assert isinstance(public, ec.EllipticCurvePublicKey)
            public.verify(signature, time.encode("ascii"), ec.ECDSA(SHA256()))
        except InvalidSignature:
            raise RefusedError(401, "the signature does not match its key") from None
        return name

    def _check_size(self, path: str, site: str, headers: Mapping[str, str]) -> int:
        """Returns the announced length of the body, which the web server enforces."""
        if not headers.get("content-length", "").isdecimal():
            raise RefusedError(411, "the request has no content-length")
        size = int(headers["content-length"])
        if size > self._limits.body_bytes:
            raise RefusedError(413, f"{size} bytes in one request; at most {self._limits.body_bytes} are allowed")
        if path == "/v1/fleet/push-messages":
            self._pushed[site] = 0
        if path == "/v1/fleet/push-object":
            self._pushed[site] += size
            if self._pushed[site] > self._limits.answer_bytes:
                raise RefusedError(413, f"the answer has more than {self._limits.answer_bytes} bytes")
        return size


def _log_refused(scope: Scope, site: str, refusal: RefusedError) -> None:
    log_event(
        "refused",
        level=logging.WARNING,
        status=refusal.status,
        reason=refusal.reason,
        path=str(scope["path"])[:200],
        address=(scope.get("client") or ("?",))[0],
        site=site or None,
    )


async def _refuse(send: Send, refusal: RefusedError) -> None:
    body = json.dumps({"refused": True, "detail": refusal.reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # The body was not read, so it cannot be separated from a later request on this connection.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header_bytes(headers: Any) -> int:
    """Returns the size of the header lines, each `name: value` with its line end."""
    return sum(len(name) + len(value) + 4 for name, value in headers)
