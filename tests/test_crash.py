"""Kill -9, Ctrl-C and SIGTERM anywhere in a run: resumed, it ends bit for bit where an unbroken run ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, adapter_bytes, set_all, tiny_settings, write_toml
from fedsb.config.load import load_config
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate, resume


def short(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Two rounds that keep state with the clients too, so that every kind of file is written."""
    train = {**config["train"], "local_steps": 2, "persist_optimizer_state": True}
    return set_all(config, rounds=2, train=train, **changes)


def run_and_die(config: dict[str, Any], call: int | None, report: str) -> None:
    """Runs `config`, killed before the k-th time it flushes, renames or deletes something; None: counts these."""
    calls: list[str] = []

    def before(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(f"{name} {args[0]}")
            return inner(*args, **kwargs)

        return wrapped

    os.fsync = before("fsync", os.fsync)  # a file that is written, not yet renamed
    os.rename = before("rename", os.rename)
    os.replace = before("replace", os.replace)
    shutil.rmtree = before("rmtree", shutil.rmtree)
    Path.write_text = before("write_text", Path.write_text)  # type: ignore[method-assign]
    federate(load_config(config))
    Path(report).write_bytes(json.dumps(calls).encode())


def start(config: dict[str, Any], call: int | None, report: Path) -> int | None:
    """The exit code of `run_and_die` in a process of its own; the imports are done once for all of them."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fedsb.runs.run", "transformers", "peft", "jinja2"])
    process = server.Process(target=run_and_die, args=(config, call, str(report)))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def unbroken(tiny_bert: Path, tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_settings(tiny_bert, tables, tmp_path_factory.mktemp("unbroken"))
    return federate(load_config(short(config))).folder


def same_run(broken: Path, whole: Path) -> None:
    """Checks the adapter to the last bit, and ledgers in which every round occurs once."""
    assert adapter_bytes(broken) == adapter_bytes(whole)
    rounds = [[{**row, "seconds": 0} for row in read_rows(folder / "rounds.jsonl")] for folder in (broken, whole)]
    assert rounds[0] == rounds[1]
    assert read_rows(broken / "traffic.jsonl") == read_rows(whole / "traffic.jsonl")
    assert not list(broken.rglob(".*"))


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_killed_before_a_write(tiny_config: dict[str, Any], tmp_path: Path, unbroken: Path, every: int) -> None:
    """Kill -9 at places all over the run: its start, a checkpoint, a ledger, a client's state, the export, the end."""
    config = short(tiny_config)
    assert start(set_all(config, out=str(tmp_path / "counted")), None, tmp_path / "calls.json") == 0
    calls = json.loads((tmp_path / "calls.json").read_text())
    same_run(tmp_path / "counted" / "tiny", unbroken)
    for name in ("shared.safetensors", "round-0002", "clients", "adapter_model", "adapter_config", "report"):
        assert any(name in call for call in calls), (name, calls)
    for k in range(0, len(calls), every):
        folder = tmp_path / str(k)
        assert start(set_all(config, out=str(folder)), k, tmp_path / "unused") == -signal.SIGKILL, calls[k]
        if (folder / "tiny" / "manifest.json").exists():
            resume(folder / "tiny")
        else:  # nothing had begun
            federate(load_config(set_all(config, out=str(folder))))
        same_run(folder / "tiny", unbroken)


def started_run(tmp_path: Path, config: dict[str, Any], rounds: int) -> subprocess.Popen[str]:
    """Starts `python -m fedsb run` in a process of its own. Returns it when `rounds` rounds are completed."""
    toml = write_toml(tmp_path / "long.toml", config)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsb", "run", str(toml), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ledger = Path(config["out"]) / config["name"] / "rounds.jsonl"
    until = time.monotonic() + 120
    while len(read_rows(ledger)) < rounds:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def long_settings(
    tiny_bert: Path, tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """A run of two seconds of rounds, and the folder of the same run without an interruption."""
    config = set_all(tiny_settings(tiny_bert, tables, tmp_path_factory.mktemp("long")), rounds=60)
    return config, federate(load_config(config)).folder


@pytest.mark.parametrize("sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_round(
    long_settings: tuple[dict[str, Any], Path], tmp_path: Path, cli: Callable[..., Said], sent: signal.Signals
) -> None:
    config, whole = long_settings
    config = set_all(config, out=str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "tiny"
    process = started_run(tmp_path, config, rounds=2)
    if sent == signal.SIGTERM:
        said = cli("resume", folder)
        assert (said.code, "in use by another fedsb process" in said.err) == (1, True)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert len(read_rows(folder / "rounds.jsonl")) < 60, "it was done before the signal came"
    assert not (folder / "result.json").exists()
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"interrupted\n  Completed rounds are in {folder}. To resume:\n    fedsb resume {folder}\n" in err
        assert "Traceback" not in err
        assert not list(folder.rglob(".*"))
    said = cli("resume", folder, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["rounds"] == 60
    same_run(folder, whole)


def test_a_signal_during_a_write_comes_after_it(tmp_path: Path) -> None:
    from fedsb.utils.signals import Interrupts

    done = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupts().installed() as interrupts:
        with interrupts.hold():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append("the write")
        done.append("never")
    assert done == ["the write"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_write_that_fails_is_the_news_even_where_a_signal_came() -> None:
    from fedsb.utils.signals import Interrupts

    with pytest.raises(OSError, match="full"), Interrupts().installed() as interrupts, interrupts.hold():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        raise OSError("full")


def test_killed_while_copying_the_export(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Said]
) -> None:
    """A copy that was cut off leaves no folder of that name: a half adapter is never taken for a whole one."""
    real = shutil.copytree

    def cut_off(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "adapter_config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copytree", cut_off)
    assert cli("export", unbroken, "--to", tmp_path / "copy").code == 130
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "copytree", real)
    assert cli("export", unbroken, "--to", tmp_path / "copy").code == 0
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == next(
        iter(adapter_bytes(unbroken).values())
    )
