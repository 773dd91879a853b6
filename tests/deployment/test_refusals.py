"""What a user is told where a certificate, a clock or a run's settings do not fit."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedsb.config.load import load_config
from fedsb.deployment import certificates
from fedsb.deployment.certificates import tls_client
from fedsb.deployment.coordinate import prepare
from fedsb.deployment.federation import create_federation, renew
from fedsb.deployment.flower_client import raise_if_final
from fedsb.deployment.run import serve
from fedsb.utils.errors import UserError


class Past(datetime.datetime):
    """A clock that is three years behind."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:  # type: ignore[override]
        return datetime.datetime.now(tz) - datetime.timedelta(days=3 * 365)


def made_in_the_past(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A federation whose server's certificate (2 years) has expired, and whose authority (5 years) has not."""
    with monkeypatch.context() as patched:
        clock = SimpleNamespace(datetime=Past, timedelta=datetime.timedelta, UTC=datetime.UTC)
        patched.setattr(certificates, "datetime", clock)
        create_federation(folder, ["north"], ["localhost"])
    return folder


def test_a_coordinator_with_an_expired_certificate_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_in_the_past(tmp_path / "fed", monkeypatch)
    with pytest.raises(
        UserError, match=r"The server's certificate expired on 20.*Renew it with `fedsb federation renew .*`"
    ):
        serve(folder)
    renew(folder, [])
    certificates.check_dates((folder / "server.pem").read_text(), "the server's certificate", "renew it")


def test_a_site_that_meets_an_expired_certificate_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_in_the_past(tmp_path / "fed", monkeypatch)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def shake() -> None:
            connection, _ = listener.accept()
            with pytest.raises(OSError), context.wrap_socket(connection, server_side=True) as shaken:
                shaken.recv(1)

        thread = threading.Thread(target=shake, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        trust = tls_client((folder / "ca.pem").read_text())
        with httpx.Client(verify=trust) as client, pytest.raises(httpx.ConnectError) as met:
            client.post(f"https://localhost:{port}/")
        thread.join(10)
    with pytest.raises(UserError, match=r"the coordinator at localhost:1 has expired.*fedsb federation renew"):
        raise_if_final(met.value, "localhost:1")


def test_other_settings_under_the_same_name_are_named(tmp_path: Path) -> None:
    config = {"name": "one", "model": {"name": "minilm"}, "data": {"train": "x"}, "task": {"kind": "classification"}}
    create_federation(tmp_path / "fed", ["north"], ["localhost"])
    folder = prepare(tmp_path / "fed", load_config({**config, "rounds": 3}))
    prepare(tmp_path / "fed", load_config({**config, "rounds": 4}))  # nothing has begun
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    prepare(tmp_path / "fed", load_config({**config, "rounds": 4}))
    with pytest.raises(UserError, match=r"(?s)was started with other settings.*rounds: 4 -> 5"):
        prepare(tmp_path / "fed", load_config({**config, "rounds": 5}))
