"""A coordinator and its sites as real processes on loopback, with TLS and keys; what each death does to a request.

The tests of this file go through the life of one federation, in order; some of them take long, and can be left out.
"""

from __future__ import annotations

import base64
import datetime
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from echo import step

from fedsb.deployment import certificates
from fedsb.deployment.certificates import tls_client
from fedsb.deployment.federation import add_site, create_federation, revoke
from fedsb.deployment.join_file import read_join_file

RUN = (
    "import sys; from pathlib import Path; from fedsb.deployment import join, serve; from fedsb.utils.errors import *\n"
)
SERVE = RUN + "serve(Path(sys.argv[1]), 'echo:run_script', listen='127.0.0.1')"
JOIN = RUN + (
    "try:\n    join(Path(sys.argv[1]), Path(sys.argv[2]), 'echo:open_echo')\n"
    "except UserError as error:\n    sys.exit(f'user error: {error}')"
)


class Federation:
    """The processes of a federation, and the next step of its program."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder, self.steps = folder, folder / "co", 0
        self.processes: dict[str, subprocess.Popen[str]] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        create_federation(self.folder, ["a", "b"], ["localhost"], self.port)

    def start(self, name: str, join_file: Path | None = None) -> subprocess.Popen[str]:
        arguments = [SERVE, str(self.folder)]
        if name != "co":
            join_file = join_file or self.folder / "joins" / f"{name}.join"
            arguments = [JOIN, str(join_file), str(self.root / name)]
        here = filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *here])}
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-c", *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        return self.processes[name]

    def step(self, **todo: object) -> Any:
        self.steps += 1
        return step(self.folder, self.steps - 1, **todo)

    def pid(self, name: str, child: str) -> int:
        return int(json.loads((self.root / name / "pids.json").read_text())[child])

    def kill(self, name: str, *children: str) -> None:
        for child in children:
            os.kill(self.pid(name, child), signal.SIGKILL)

    def handled(self, name: str, what: str) -> int:
        return (self.root / name / "handled.txt").read_text().count(what)

    def wait_until_handled(self, name: str, what: str, times: int = 1) -> None:
        end = time.monotonic() + 90
        while time.monotonic() < end:
            if (self.root / name / "handled.txt").exists() and self.handled(name, what) >= times:
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} was not asked for {what} within 90 s")

    def post(self, path: str, headers: dict[str, str] | None = None, content: bytes = b"") -> httpx.Response:
        with httpx.Client(verify=tls_client((self.folder / "ca.pem").read_text())) as client:
            return client.post(f"https://localhost:{self.port}{path}", headers=headers, content=content)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation(tmp_path_factory.mktemp("federation"))
    for name in ("co", "a", "b"):
        federation.start(name)
    yield federation
    federation.stop()


def same(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "same")


def test_round_trips(federation: Federation) -> None:
    for size in (1, 1, 0, 50_000_000):
        outcome = federation.step(head="", bytes=size)()
        assert outcome["answers"] == same("a", "b") and outcome["sites"] == ["a", "b"]
        print(f"{size} bytes there and back: {outcome['seconds']} s")
    time.sleep(1.5)
    traffic = json.loads((federation.folder / "traffic.json").read_text())
    for site in ("a", "b"):
        assert all(50_000_000 < traffic[site][way] < 51_000_000 for way in ("bytes_in", "bytes_out"))


def test_refusals_of_a_site_come_back(federation: Federation) -> None:
    assert federation.step(head="bad", bytes=3)()["answers"]["a"] == "refused: this site does not do that"
    assert federation.step(head="bug", bytes=3)()["answers"]["a"].startswith("failed: ValueError at the site")


def test_what_a_stranger_finds_at_the_public_port(federation: Federation) -> None:
    for path in ("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/health"):
        assert federation.post(path, {"content-type": "application/protobuf"}).status_code == 404
    assert federation.post("/v1/fleet/pull-messages").status_code == 401
    assert federation.post("/v1/fleet/pull-messages", {"x": "y" * 40_000}).status_code in (400, 431)
    with pytest.raises(httpx.HTTPError), httpx.Client() as plain:
        plain.post(f"http://localhost:{federation.port}/v1/control/list-runs")
    log = (federation.folder / "logs" / "superlink.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "refused" for line in log) >= 6


def test_what_is_oversized_is_refused(federation: Federation) -> None:
    key = load_pem_private_key(read_join_file(federation.folder / "joins" / "a.join").node_key.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": now,
        "flwr-signature": base64.b64encode(key.sign(now.encode(), ec.ECDSA(SHA256()))).decode(),
    }
    context = tls_client((federation.folder / "ca.pem").read_text())
    connection = http.client.HTTPSConnection("localhost", federation.port, context=context)
    connection.putrequest("POST", "/v1/fleet/push-object")
    for name, value in {**signed, "content-length": str(10**9)}.items():
        connection.putheader(name, value)
    connection.endheaders()  # and is told before it has sent any of it
    refused = connection.getresponse()
    assert refused.status == 413 and "in one request" in json.loads(refused.read())["detail"]


def test_a_node_that_is_killed_while_its_worker_works(federation: Federation) -> None:
    outcome = federation.step(head="slow node", bytes=20)
    federation.wait_until_handled("a", "slow node")
    federation.kill("a", "node")
    assert outcome()["answers"] == same("a", "b")
    assert federation.handled("a", "slow node") == 1  # asked twice, carried out once


@pytest.mark.long
def test_a_worker_that_is_killed_is_asked_again(federation: Federation) -> None:
    outcome = federation.step(head="slow worker", bytes=20)
    federation.wait_until_handled("b", "slow worker")
    federation.kill("b", "worker")
    assert outcome()["answers"] == same("a", "b")
    assert (federation.handled("a", "slow worker"), federation.handled("b", "slow worker")) == (1, 2)


@pytest.mark.long
def test_a_site_that_is_killed_whole_and_started_again(federation: Federation) -> None:
    outcome = federation.step(head="slow site", bytes=20)
    federation.wait_until_handled("a", "slow site")
    federation.kill("a", "supervisor", "node", "worker")
    federation.processes["a"].wait()
    federation.start("a")
    assert outcome()["answers"] == same("a", "b")
    assert (federation.handled("a", "slow site"), federation.handled("b", "slow site")) == (2, 1)


def test_a_server_that_is_killed_goes_on_where_it_was(federation: Federation) -> None:
    before = federation.step(head="", bytes=1)()["pid"]
    outcome = federation.step(head="slow server", bytes=20)
    federation.wait_until_handled("a", "slow server")
    federation.kill("co", "server")
    after = outcome()
    assert after["answers"] == same("a", "b") and after["pid"] != before


@pytest.mark.long
def test_a_superlink_that_is_killed(federation: Federation) -> None:
    outcome = federation.step(head="slow link", bytes=20)
    federation.wait_until_handled("b", "slow link")
    federation.kill("co", "superlink")
    assert outcome()["answers"] == same("a", "b")


@pytest.mark.long
def test_a_site_is_added_and_revoked_while_the_others_go_on(federation: Federation) -> None:
    added = federation.start("c", add_site(federation.folder, "c"))
    assert federation.step(head="", bytes=1)()["answers"] == same("a", "b", "c")
    revoke(federation.folder, "c")
    assert added.wait(90) == 1
    assert added.stderr is not None and "site 'c' was revoked by the coordinator" in added.stderr.read()
    again = federation.start("c", federation.folder / "joins" / "c.join")
    assert again.wait(90) == 1
    assert federation.step(head="", bytes=1)()["answers"] == same("a", "b")


@pytest.mark.long
def test_who_is_not_let_in(federation: Federation, tmp_path: Path) -> None:
    join = read_join_file(federation.folder / "joins" / "a.join")
    create_federation(tmp_path / "other", ["d"], ["localhost"], federation.port)
    (tmp_path / "stranger.join").write_text(
        join.model_copy(update={"node_key": certificates.new_node_key()[0]}).model_dump_json()
    )
    federation.start("d", tmp_path / "other" / "joins" / "d.join")
    federation.start("e", tmp_path / "stranger.join")
    for name, why in (("d", "is not the coordinator of this join file"), ("e", "does not belong to a site")):
        process = federation.processes[name]
        assert process.wait(90) == 1 and process.stderr is not None
        assert why in process.stderr.read()


def test_a_program_that_ends_ends_the_coordinator_and_a_site_stops_when_told(federation: Federation) -> None:
    (federation.folder / f"step-{federation.steps}.json").write_text('{"stop": true}')
    assert federation.processes["co"].wait(90) == 0
    pids = [federation.pid(name, child) for name in ("a", "b") for child in ("node", "worker")]
    for name in ("a", "b"):
        federation.processes[name].terminate()
    for name in ("a", "b"):
        federation.processes[name].wait(90)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_no_secret_is_in_a_log(federation: Federation) -> None:
    logs = "".join(path.read_text() for path in federation.root.rglob("logs/*"))
    for name in ("a", "b"):
        join = read_join_file(federation.folder / "joins" / f"{name}.join")
        key = join.node_key.splitlines()[1]
        assert key not in logs and join.identity not in logs
    assert "PRIVATE KEY" not in logs and '"event": "answered"' in logs
