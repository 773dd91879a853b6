"""The resident worker: one answer a request, whatever dies in between."""

from __future__ import annotations

import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsb.deployment import worker
from fedsb.protocol.channel import Handle, NoResponse
from fedsb.utils.errors import DiskError, RefusalError, RunError, UserError

TOKEN = bytes(range(32))


class Site:
    """A worker in a thread, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.handled = folder, list[bytes]()
        self.path, self.answers = folder / "socket", folder / "answers"

    def start(self, handle: Handle | None = None) -> None:
        arguments = (handle or self.handle, self.answers, self.path, TOKEN)
        threading.Thread(target=worker.serve, args=arguments, daemon=True).start()

    def handle(self, request: bytes) -> bytes:
        self.handled.append(request)
        if request == b"refuse":
            raise RefusalError("not allowed here")
        if request == b"data":
            raise UserError("patients.csv: row 7 has the label 'hiv'")
        if request == b"fail":
            raise RunError("no room in /home/ward-3")
        if request == b"bug":
            raise KeyError("patient 7")
        if request == b"slow":
            time.sleep(0.3)
        return request[::-1]

    def ask(self, request: bytes) -> bytes | NoResponse:
        return worker.ask(self.path, TOKEN, request)


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="fedsb-") as folder:  # a socket's path must be short
        yield Site(Path(folder))


def test_a_request_that_comes_again_is_not_carried_out_again(site: Site) -> None:
    site.start()
    assert [site.ask(b"abc"), site.ask(b"abc"), site.ask(b"")] == [b"cba", b"cba", b""]
    assert site.handled == [b"abc", b""]
    assert stat.S_IMODE(site.path.stat().st_mode) == 0o600


def test_answers_outlive_the_process(site: Site) -> None:
    site.start()
    site.ask(b"abc")
    other = Site(site.folder)
    other.path = site.folder / "socket2"
    other.start()
    assert other.ask(b"abc") == b"cba" and other.handled == []


def test_a_refusal_is_told_and_not_stored(site: Site) -> None:
    site.start()
    assert site.ask(b"refuse") == site.ask(b"refuse") == NoResponse("refused: not allowed here")
    assert site.handled == [b"refuse", b"refuse"]


def test_what_is_the_sites_own_is_said_there_alone(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.start()
    assert site.ask(b"data") == NoResponse(
        "refused: the site's data or settings do not fit this run (the site's log has the reason)"
    )
    assert site.ask(b"fail") == NoResponse("failed: RunError at the site (the site's log has the reason)")
    assert site.ask(b"bug") == NoResponse("failed: KeyError at the site (the site's log has the reason)")
    said = capsys.readouterr().out
    assert "refused: patients.csv: row 7 has the label 'hiv'" in said and "failed: no room in /home/ward-3" in said


def test_an_answer_that_cannot_be_stored_does_not_leave(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise DiskError(f"the disk is full: {path}")

    with monkeypatch.context() as patched:
        patched.setattr(worker, "write_atomic", full)
        site.start()
        assert site.ask(b"abc") == NoResponse("failed: DiskError at the site (the site's log has the reason)")
    assert site.ask(b"abc") == b"cba"  # there is room again, and the worker still runs


def test_who_has_no_token_gets_nothing(site: Site) -> None:
    site.start()
    assert worker.ask(site.path, bytes(32), b"abc") == NoResponse(
        "failed: the site's worker died 3 times during this request"
    )
    assert site.handled == []


def test_who_asked_may_go_and_ask_again(site: Site) -> None:
    site.start()
    site.ask(b"first")
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect(str(site.path))
        gone.sendall(TOKEN + (4).to_bytes(8, "big") + b"slow")
    with socket.socket(socket.AF_UNIX) as torn:
        torn.connect(str(site.path))
        torn.sendall(TOKEN + (4).to_bytes(8, "big") + b"sl")
    assert site.ask(b"slow") == b"wols"
    assert site.handled == [b"first", b"slow"]


def test_asking_waits_for_a_worker_that_is_starting(site: Site) -> None:
    threading.Timer(0.3, site.start).start()
    assert site.ask(b"abc") == b"cba"


def test_only_the_last_answers_are_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STORED_ANSWERS", 2)
    site.start()
    for request in (b"1", b"2", b"1", b"3"):  # 1 was asked for again after 2
        site.ask(request)
    assert sorted(file.read_bytes() for file in site.answers.iterdir()) == [b"1", b"3"]


def test_large_requests(site: Site) -> None:
    site.start()
    request = bytes(range(256)) * 40_000
    assert site.ask(request) == request[::-1]
