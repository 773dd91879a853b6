"""A real federation of three sites on this machine, every party in processes of its own, and the means to hurt it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from namespaces import Network
from world import make_model, make_rows, settings, write_rows, write_toml

from fedsb.deployment.federation import create_federation
from fedsb.reporting.run_directory import read_rows

HERE = Path(__file__).parent
SITES = ("site-a", "site-b", "site-c")
CO = "coordinator"
WAIT_SECONDS = 240.0
TELLING = {"died", "lost", "trouble", "no heartbeat", "failed", "refused", "crashed", "worker gone", "answered again"}
TELLING |= {"asked again", "not needed", "answer not available", "asking failed", "run not closed", "waiting"}


class Rig:
    """Below `folder`: coordinator/ and a folder for each site, with its rows and what it spoils."""

    def __init__(
        self,
        folder: Path,
        toml: Path,
        rows: Mapping[str, Sequence[Mapping[str, str]]],
        spoils: Mapping[str, Mapping[str, str]] | None = None,
        net: Network | None = None,
    ) -> None:
        self.folder, self.processes = folder, dict[str, subprocess.Popen[str]]()
        self.disks: dict[str, str] = {}  # party -> size of the small disk that its folder is
        self.toml, self.rows = toml, rows
        self.spoils = spoils or {}
        self.net = net  # else all parties are on loopback
        self.host = net.address[CO] if net else "127.0.0.1"

    def make(self) -> None:
        """Creates the federation and its sites' folders, on the requested disks."""
        for party, size in self.disks.items():
            (self.folder / party).mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder / party)], check=True
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        create_federation(self.folder / CO, list(self.rows), [self.host], port)
        for name in self.rows:
            write_rows(self.folder / name / "rows.jsonl", self.rows[name])
            (self.folder / name / "site.toml").write_text(f"data = {str(self.folder / name / 'rows.jsonl')!r}\n")
            (self.folder / name / "spoil.json").write_text(json.dumps(self.spoils.get(name, {})))

    def start(self, party: str, *more: str) -> None:
        given = ["serve", str(self.folder / CO), str(self.toml), self.host]
        if party != CO:
            given = ["join", str(self.folder / CO / "joins" / f"{party}.join"), str(self.folder / party), *more]
        command = [sys.executable, str(HERE / "spoil.py"), *given]
        with (self.folder / f"{party}.out").open("a") as out:
            self.processes[party] = subprocess.Popen(
                self.net.inside(party, *command) if self.net else command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": _path()},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                text=True,
            )

    def stop(self) -> None:
        for name in (CO, *self.rows):
            if name in self.processes and self.processes[name].poll() is None:
                self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        for party in self.disks:
            shutil.copytree(self.folder / party, self.folder / f"{party}-kept", dirs_exist_ok=True)
            subprocess.run(["umount", "-l", str(self.folder / party)], check=False)
            shutil.rmtree(self.folder / party, ignore_errors=True)
            (self.folder / f"{party}-kept").rename(self.folder / party)

    # --- what is going on ---

    @property
    def run(self) -> Path:
        return self.folder / CO / "runs" / "run"

    def phases(self, party: str) -> list[dict[str, Any]]:
        return read_rows(self.folder / party / "phases.jsonl")

    def when(
        self,
        party: str,
        what: str,
        round: int = 0,
        event: str = "begin",
        after: float = 0.0,
        seconds: float = WAIT_SECONDS,
    ) -> float:
        """Waits until it has happened after `after`; when that was, by time.monotonic."""

        def there() -> float | None:
            for line in self.phases(party):
                same = (line["what"], line["round"], line["event"]) == (what, round, event)
                if same and line["at"] > after:
                    return float(line["at"])
            return None

        return self.until(there, f"{party}: {what} {round} {event}", seconds)

    def until(self, found: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (answer := found()) is not None:
                return answer
            for name, process in self.processes.items():
                if process.poll() not in (None, 0, -signal.SIGKILL):
                    raise RuntimeError(f"{name} ended while waiting for {what}: see {self.folder / name}.out")
            time.sleep(0.005)
        raise TimeoutError(f"{what} did not come within {seconds:g} s; see {self.folder}")

    def pid(self, party: str, process: str) -> int:
        pids = self.until(lambda: self.pids(party).get(process), f"{party}'s {process}")
        return int(pids)

    def pids(self, party: str) -> dict[str, int]:
        try:
            return dict(json.loads((self.folder / party / "pids.json").read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def send(self, number: int, party: str, process: str) -> int:
        pid = self.pid(party, process)
        os.kill(pid, number)
        return pid

    def said(self, since: datetime) -> list[str]:
        return said({party: self.folder / party for party in (CO, *self.rows)}, since)

    # --- disks ---

    def fill(self, party: str) -> None:
        """Fills the disk until not a byte fits."""
        for piece in (2**20, 4096, 1):
            with contextlib.suppress(OSError), (self.folder / party / "ballast").open("ab", buffering=0) as ballast:
                while ballast.write(b"x" * piece):
                    pass

    def empty(self, party: str) -> None:
        (self.folder / party / "ballast").unlink()


def tiny_rig(
    folder: Path,
    spoils: Mapping[str, Mapping[str, str]] | None = None,
    sites: Sequence[str] = SITES,
    shape: Mapping[str, int] | None = None,
    net: Network | None = None,
    **changes: Any,
) -> Rig:
    """Returns the federation of world.py, in an empty folder: a tiny model and toy rows."""
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(folder / "model", **(shape or {}))
    test = write_rows(folder / "test.jsonl", make_rows(40, 1))
    toml = write_toml(folder / "run.toml", settings(model, test, **changes))
    rows = {name: make_rows(60 + 10 * i, 10 + i) for i, name in enumerate(sites)}
    return Rig(folder, toml, rows, spoils, net)


@contextlib.contextmanager
def running(rig: Rig, twice: str = "") -> Iterator[Rig]:
    rig.make()
    try:
        for name in (CO, *rig.rows):
            rig.start(name, *(["twice"] if name == twice else []))
        yield rig
    finally:
        rig.stop()


def said(folders: Mapping[str, Path], since: datetime) -> list[str]:
    """Returns the events in the parties' logs since then, each kind once."""
    told: Counter[str] = Counter()
    for party, folder in folders.items():
        for path in sorted((folder / "logs").glob("*.jsonl")):
            for line in _lines(path):
                if datetime.fromisoformat(line["time"]) < since:
                    continue
                if line["event"] == "asked" and line.get("time_number", 1) > 1:
                    line["event"] = "asked again"
                if line["event"] in TELLING:
                    about = line.get("reason") or line.get("answer") or line.get("child") or ""
                    who = f" {line['site']}" if line.get("site") else ""
                    told[f"{party} {path.stem}: {line['event']}{who} {about}".strip()[:160]] += 1
    return [f"{text} ({n} times)" if n > 1 else text for text, n in told.items()]


def mount(folder: Path, size: str) -> bool:
    """Makes the folder a small disk of its own, in memory."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def can_mount(folder: Path) -> bool:
    """Returns whether this process may make small disks."""
    here = folder / "mount"
    here.mkdir(parents=True, exist_ok=True)
    return mount(here, "1m") and subprocess.run(["umount", str(here)], check=False).returncode == 0


def now() -> datetime:
    return datetime.now(UTC)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Reads a log, without lines that a kill or a full disk cut off."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _path() -> str:
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
