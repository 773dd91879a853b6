"""Processes that die, are started again, are given up, and end with their supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsb.deployment import supervisor as supervisor_module
from fedsb.deployment.supervisor import Child, Supervisor
from fedsb.utils.errors import RunError, UserError

CHILD = """
import os, signal, sys, time
from pathlib import Path
from fedsb.deployment.child_process import run_child
from fedsb.utils.errors import RunError, UserError
lives = Path(sys.argv[1]) / "lives"
with lives.open("a") as file:
    file.write(".")
def main():
    for what in sys.argv[2:]:
        if what.startswith("die") and len(lives.read_text()) <= int(what[3:]):
            os.kill(os.getpid(), 9)
        if what == "user":
            raise UserError("write it differently")
        if what == "run":
            raise RunError("the disk is full")
        if what == "crash":
            raise ValueError("a bug")
        if what == "busy":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (Path(sys.argv[1]) / "busy").touch()
        if what in ("stay", "busy"):
            time.sleep(60)
run_child(main)
"""


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(supervisor_module, "MAX_DEATHS", 3)

    def make(*what: str) -> Supervisor:
        return Supervisor(tmp_path, [Child(name="one", module="a_child", arguments=[str(tmp_path), *what])])

    return make


def lives(folder: Path) -> int:
    return len((folder / "lives").read_text())


def test_what_died_is_started_again(supervisor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    supervisor("die1").watch()
    assert lives(tmp_path) == 2
    assert not (tmp_path / "pids.json").exists()


@pytest.mark.parametrize(("what", "kind"), [("user", UserError), ("run", RunError)])
def test_its_own_errors_are_told_and_end_it(supervisor, tmp_path: Path, what: str, kind: type[Exception]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=r"write it differently|the disk is full"):
        supervisor(what).watch()
    assert lives(tmp_path) == 1


def test_what_dies_again_and_again_is_given_up(supervisor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RunError, match=r"one died 3 times in 300 s, the last time with exit code 70. See .*one.out"):
        supervisor("crash").watch()
    assert lives(tmp_path) == 3
    lines = [json.loads(line) for line in (tmp_path / "logs" / "one.jsonl").read_text().splitlines()]
    assert "a bug" in lines[0]["traceback"]


def test_children_end_with_a_supervisor_that_is_killed(supervisor, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code = (
        "from pathlib import Path; from fedsb.deployment.supervisor import *\n"
        f"folder = {str(tmp_path)!r}\n"
        "Supervisor(Path(folder), [Child(name='one', module='a_child', arguments=[folder, 'stay'])]).watch()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "lives").exists():
        time.sleep(0.05)
    child = json.loads((tmp_path / "pids.json").read_text())["one"]
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and _state(child) != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists() or _state(child) == "Z"


def test_a_second_interrupt_ends_it_at_once_and_leaves_nothing_behind(  # type: ignore[no-untyped-def]
    supervisor, tmp_path: Path
) -> None:
    """The first waits for what the children are doing."""
    code = (
        "from pathlib import Path; from fedsb.deployment.supervisor import *\n"
        "from fedsb.utils.signals import Interrupts\n"
        f"folder = {str(tmp_path)!r}\n"
        "with Interrupts().installed():\n"
        "    Supervisor(Path(folder), [Child(name='one', module='a_child', arguments=[folder, 'busy'])]).watch()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "busy").exists():
        time.sleep(0.05)
    child = json.loads((tmp_path / "pids.json").read_text())["one"]
    parent.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert parent.poll() is None and _state(child) != "Z"
    parent.send_signal(signal.SIGINT)
    assert parent.wait(10) != 0
    assert parent.stderr is not None and "KeyboardInterrupt" in (said := parent.stderr.read())
    assert "Press Ctrl-C again to stop at once" in said
    assert not (tmp_path / "pids.json").exists(), "status would take it for killed"
    assert _state(child) == "Z"


def test_who_comes_after_a_killed_supervisor_waits_for_its_children(  # type: ignore[no-untyped-def]
    supervisor, tmp_path: Path
) -> None:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    (tmp_path / "pids.json").write_text(json.dumps({"supervisor": left.pid, "one": left.pid}))
    begun = time.monotonic()
    supervisor("end").watch()
    assert time.monotonic() - begun > 1.0 and left.poll() == 0


def test_a_fault_is_told_without_a_disk(  # type: ignore[no-untyped-def]
    supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pids are for who looks in; what a child died of comes through a pipe."""

    def full(path: Path, content: bytes) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(supervisor_module, "write_atomic", full)
    with pytest.raises(UserError, match="write it differently"):
        supervisor("user").watch()
    assert not list((tmp_path / "logs").glob("*fault*"))


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
