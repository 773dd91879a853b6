"""Which requests pass the public port."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from fedsb.deployment.auth import PATHS, AuthMiddleware, Limits, TrafficCounter
from fedsb.deployment.federation import create_federation, revoke
from fedsb.deployment.join_file import read_join_file
from fedsb.deployment.registry import SiteRegistry

PULL, PUSH, OBJECT = (f"/v1/fleet/{call}" for call in ("pull-messages", "push-messages", "push-object"))


class Doorway:
    """A door with a site's key at hand, and Flower replaced by an application that answers with ten bytes."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.wire, self.inside = folder, TrafficCounter(), 0
        self.door = AuthMiddleware(self._flower, SiteRegistry(folder), limits, self.wire)
        self.key = load_pem_private_key(read_join_file(folder / "joins" / "a.join").node_key.encode(), None)

    async def _flower(self, scope: Any, receive: Any, send: Any) -> None:
        self.inside += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"0123456789"})

    def signed(self, key: Any = None, late_s: float = 0.0, size: int = 5) -> dict[str, str]:
        key = key or self.key
        time = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=late_s)).isoformat()
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return {
            "flwr-public-key": base64.b64encode(public).decode(),
            "flwr-timestamp": time,
            "flwr-signature": base64.b64encode(key.sign(time.encode(), ec.ECDSA(SHA256()))).decode(),
            "content-length": str(size),
        }

    def check_tls(self, path: str, headers: dict[str, str], method: str = "POST") -> tuple[int, str]:
        """(status, why not)."""
        events: list[Any] = []

        async def send(event: Any) -> None:
            events.append(event)

        async def receive() -> Any:
            raise AssertionError("the door does not read bodies")

        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": ("10.0.0.9", 1)}
        asyncio.run(self.door(scope, receive, send))
        status = events[0]["status"]
        return status, "" if status == 200 else json.loads(events[1]["body"])["detail"]


@pytest.fixture
def doorway(tmp_path: Path) -> Doorway:
    create_federation(tmp_path, ["a", "b"], ["localhost"])
    return Doorway(tmp_path, Limits(body_bytes=100, answer_bytes=250))


def test_a_site_passes_and_its_bytes_are_counted(doorway: Doorway) -> None:
    headers = doorway.signed()
    assert doorway.check_tls(PULL, headers) == (200, "")
    head = sum(len(name) + len(value) + 4 for name, value in headers.items())
    rows = doorway.wire.rows()
    assert rows["a"].pop("last_seen") == pytest.approx(time.time(), abs=60)
    assert rows == {"a": {"requests": 1, "bytes_in": 5 + head, "bytes_out": 10}}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/../control/start-run",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_everything_but_the_fleet_paths_is_refused(doorway: Doorway, path: str) -> None:
    assert doorway.check_tls(path, doorway.signed())[0] == 404
    assert doorway.inside == 0


def test_only_post(doorway: Doorway) -> None:
    assert all(doorway.check_tls(path, doorway.signed(), method="GET")[0] == 405 for path in PATHS)


def test_who_is_refused(doorway: Doorway) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    borrowed = {**doorway.signed(stranger), "flwr-public-key": doorway.signed()["flwr-public-key"]}
    later = {**doorway.signed(), "flwr-timestamp": datetime.datetime.now(datetime.UTC).isoformat()}
    for headers, why in [
        ({"content-length": "5"}, "not signed"),
        ({**doorway.signed(), "flwr-signature": "?"}, "not signed"),
        ({**doorway.signed(), "flwr-timestamp": "2026-01-01T00:00:00"}, "not signed"),  # of no zone
        (doorway.signed(stranger), "does not belong to a site"),
        (borrowed, "does not match its key"),
        (later, "does not match its key"),
        (doorway.signed(late_s=900), "clock"),
        (doorway.signed(late_s=-900), "clock"),
    ]:
        status, reason = doorway.check_tls(PULL, headers)
        assert status == 401 and why in reason
    assert doorway.inside == 0 and not doorway.wire.rows()


def test_a_revoked_site_is_out_at_once(doorway: Doorway) -> None:
    assert doorway.check_tls(PULL, doorway.signed())[0] == 200
    revoke(doorway.folder, "a")
    assert doorway.check_tls(PULL, doorway.signed()) == (401, "site 'a' was revoked by the coordinator")


def test_sizes(doorway: Doorway) -> None:
    assert doorway.check_tls(PULL, doorway.signed(size=101))[0] == 413
    assert doorway.check_tls(PULL, {**doorway.signed(), "x": "y" * 20_000})[0] == 431
    without = doorway.signed()
    del without["content-length"]
    assert doorway.check_tls(PULL, without)[0] == 411
    assert doorway.check_tls(PULL, {**doorway.signed(), "content-length": "-5"})[0] == 411
    # An answer comes in pieces: 100 + 100 + 100 are more than 250. The next answer starts from nothing.
    assert [doorway.check_tls(OBJECT, doorway.signed(size=100))[0] for _ in range(3)] == [200, 200, 413]
    assert doorway.check_tls(PUSH, doorway.signed())[0] == 200
    assert doorway.check_tls(OBJECT, doorway.signed(size=100))[0] == 200
