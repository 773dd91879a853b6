"""A site tries its files, its rows, its rules and the door before it joins, and sends nothing."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, set_all, write_rows, write_toml
from fedsb.deployment.federation import create_federation
from fedsb.deployment.registry import SERVER, SERVER_KEY
from fedsb.reporting.run_directory import read_rows
from support.architectures import build


@contextmanager
def door(folder: Path, port: int) -> Iterator[None]:
    """Shakes hands once, with the certificate of the federation in `folder`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / SERVER, folder / SERVER_KEY)
    with socket.create_server(("127.0.0.1", port)) as listener:

        def shake() -> None:
            with suppress(OSError), listener.accept()[0] as plain, context.wrap_socket(plain, server_side=True):
                pass

        shaking = threading.Thread(target=shake, daemon=True)
        shaking.start()
        yield
        shaking.join(10)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def site_of(folder: Path, port: int, data: Path, allow: str = "") -> list[str]:
    """The command of a site of a new federation, whose rules these are."""
    (join,) = create_federation(folder, ["a"], ["127.0.0.1"], port)
    here = folder / "here"
    here.mkdir()
    (here / "site.toml").write_text(f"data = '{data}'\n[allow]\n{allow}\n")
    return ["site", "check", str(join), "--folder", str(here)]


def test_all_is_well(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tables: tuple[Path, Path], tmp_path: Path, port: int
) -> None:
    run = write_toml(tmp_path / "my.toml", set_all(tiny_config, data={"test": str(tables[1])}))
    join = site_of(tmp_path / "fed", port, tables[0])
    with door(tmp_path / "fed", port):
        said = cli(*join, "--config", run)
    assert said.code == 0, said.err
    for line in (
        "rules: this site takes part in such a run",
        "rows: 72 to train on, 18 held out",
        "base model: ",
        "shows a certificate of this federation",
    ):
        assert line in said.out
    assert not (tmp_path / "fed" / "here" / "outbox.jsonl").exists()


def test_a_model_that_cannot_protect_single_rows_is_refused_at_the_site(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tables: tuple[Path, Path], tmp_path: Path, port: int
) -> None:
    """Before it joins, with its own copy of the model: no ledger is there yet."""
    model = {"name": str(build(tmp_path / "fnet", "fnet", "AutoModelForSequenceClassification")), "max_seq_length": 16}
    private = {"unit": "example", "epsilon": 8.0}
    config = set_all(tiny_config, data={"test": str(tables[1])}, model=model, privacy=private)
    said = cli(*site_of(tmp_path / "fed", port, tables[0]), "--config", write_toml(tmp_path / "my.toml", config))
    assert said.code == 1 and "privacy.unit = 'example' cannot be kept with this model" in said.err
    assert not list((tmp_path / "fed" / "here").rglob("privacy/*"))


def test_the_door_must_be_of_this_federation(
    cli: Callable[..., Said], tables: tuple[Path, Path], tmp_path: Path, port: int
) -> None:
    join = site_of(tmp_path / "fed", port, tables[0])
    assert "cannot be reached" in cli(*join).err
    create_federation(tmp_path / "another", [], ["127.0.0.1"], port)
    with door(tmp_path / "another", port):
        said = cli(*join)
    assert said.code == 1
    assert "a certificate that is not of this federation" in said.err


@pytest.mark.parametrize(
    ("allow", "said"), [("rounds = 1", "rounds = 3, allowed are 1"), ("round = 1", "did you mean 'rounds'")]
)
def test_what_is_not_well_is_said(
    allow: str, said: str, cli: Callable[..., Said], tiny_config: dict[str, Any], tables: Any, tmp_path: Path
) -> None:
    run = write_toml(tmp_path / "my.toml", set_all(tiny_config, data={"test": str(tables[1])}))
    got = cli(*site_of(tmp_path / "fed", 1, tables[0], allow), "--config", run)
    assert got.code == 1
    assert said in got.err


def test_a_site_with_one_class_may_take_part(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tables: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = [row for row in read_rows(tables[0]) if row["label"] == "red"]
    run = write_toml(tmp_path / "my.toml", set_all(tiny_config, data={"test": str(tables[1])}))
    join = site_of(tmp_path / "fed", 1, write_rows(tmp_path / "red.jsonl", rows))
    said = cli(*join, "--config", run)
    assert "labels: 1 here" in said.out and "cannot be reached" in said.err


def test_a_secure_sum_of_too_few_is_refused_before_the_run(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tables: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = set_all(tiny_config, data={"test": str(tables[1])}, server={"secure_aggregation": True})
    join = site_of(tmp_path / "fed", 1, tables[0], "sum_clients = 2")
    said = cli(*join, "--config", write_toml(tmp_path / "my.toml", settings))
    assert "it is of 1 clients at least" in said.err and "raise the run's server.min_clients" in said.err


def test_rows_that_are_not_there_are_not_kept(
    cli: Callable[..., Said], tables: tuple[Path, Path], tmp_path: Path
) -> None:
    (join,) = create_federation(tmp_path / "fed", ["a"], ["127.0.0.1"], 1)
    command = ["site", "check", str(join), "--folder", str(tmp_path / "here"), "--data"]
    said = cli(*command, str(tmp_path / "none.jsonl"))
    assert said.code == 1 and "none.jsonl does not exist" in said.err
    assert "rows: 90" in cli(*command, str(tables[0])).out
