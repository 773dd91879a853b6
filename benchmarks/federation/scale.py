"""Measures a coordinator's memory and time for growing sites and models, and the bytes at its public port.

    python benchmarks/federation/scale.py        (about twenty minutes on two cores)

real       eight sites on this machine, each in processes of its own, TLS between them, 20 rounds
messages   up to forty sites with the same messages in one other process: the coordinator alone is measured
wire       three real sites with payloads of kB and of MB: bytes of HTTP at the public port against traffic.jsonl

Writes scale.json. Memory is the high-water mark of resident memory (VmHWM).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rig import CO, HERE, Rig, running, tiny_rig
from world import OneProcess, make_model, make_rows, settings, write_rows

from fedsb.channels.serialized import SerializedChannel
from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import Train, read_request
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.server.opened import OpenedFederation, open_sites

ROUNDS, FEW, COUNTS = 20, 6, (5, 10, 20, 40)
SMALL, LARGE = {"width": 64, "layers": 2}, {"width": 512, "layers": 2}


def real(folder: Path, sites: int, shape: Mapping[str, int]) -> dict[str, Any]:
    names = [f"site-{i}" for i in range(sites)]
    rig = tiny_rig(folder / f"real-{sites}-{shape['width']}", sites=names, shape=shape, rounds=ROUNDS)
    with running(rig):
        rig.when(CO, "checkpoint", ROUNDS)
        memory = {name: peak_mb(rig.pid(CO, name)) for name in ("server", "superlink")}
        ended(rig)
    rows = read_rows(rig.run / "rounds.jsonl")
    dropped = sum(len(row["dropped"]) for row in rows)
    seconds = statistics.median(row["seconds"] for row in rows)
    return {"sites": sites, **shape, "rounds": len(rows), "dropped": dropped, "seconds_a_round": seconds, **memory}


def wire(folder: Path, what: str, **changes: Any) -> dict[str, Any]:
    """Returns the time from the first checkpoint to the last, so that only rounds are compared."""
    os.environ["FEDSB_PAUSE"] = "2.5"  # traffic.json is written every second
    rig, at = tiny_rig(folder / f"wire-{what.replace(' ', '-')}", rounds=FEW, shape=LARGE, **changes), []
    with running(rig):
        for number in (1, FEW):
            rig.when(CO, "checkpoint", number)
            time.sleep(1.6)
            at.append((time.monotonic(), json.loads((rig.folder / CO / "traffic.json").read_text())))
        ended(rig)
    del os.environ["FEDSB_PAUSE"]
    rows = [row for row in read_rows(rig.run / "traffic.jsonl") if 1 < row["round"] <= FEW]
    (begun, before), (done, after) = at

    def door(key: str) -> int:
        return sum(after[site][key] - before[site][key] for site in after)

    ledger = sum(row["wire_bytes"] for row in rows)
    http = door("bytes_in") + door("bytes_out")
    return {
        "payload": what,
        "bytes_a_message": round(ledger / len(rows)),
        "messages": len(rows),
        "ledger_bytes": ledger,
        "door_bytes": http,
        "more_bytes_a_message": round((http - ledger) / len(rows)),
        "more_percent": round(100 * (http - ledger) / ledger, 2),
        "requests_of_http": door("requests"),
        "seconds": round(done - begun, 1),
    }


# --- many sites behind the same messages ---


class Elsewhere:
    """A channel to sites that are all in one other process."""

    def __init__(self, folder: Path, rows: Mapping[str, list[dict[str, str]]]) -> None:
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._pipe, self.waited = here, 0.0
        self._process = context.Process(target=answer_all, args=(folder, rows, there), daemon=True)
        self._process.start()
        self.directory: dict[str, bytes] = here.recv()

    @property
    def sites(self) -> list[str]:
        return sorted(self.directory)

    def ask(
        self, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        for name, request in requests.items():
            begun = time.monotonic()
            self._pipe.send((name, request))
            answer = self._pipe.recv()
            if isinstance(read_request(request), Train):
                self.waited += time.monotonic() - begun
            yield name, answer

    def open_federation(self, config: Config, method: Method, run: str) -> OpenedFederation:
        opened = open_sites(config, method, run, SerializedChannel(self, "flower"), self.directory)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark from here on is of the rounds
        self.opened_mb = peak_mb(os.getpid())
        return opened


def answer_all(folder: Path, rows: Mapping[str, list[dict[str, str]]], pipe: Connection) -> None:
    sites = OneProcess(folder, rows)
    pipe.send(sites.directory)
    while True:
        try:
            name, request = pipe.recv()
        except EOFError:
            return
        ((_, answer),) = sites.ask({name: request})
        pipe.send(answer)


def messages(count: int, width: int, layers: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="fedsb-scale-"))
    rows = {f"site-{i:02d}": make_rows(24, i) for i in range(count)}
    model = make_model(folder / "model", width, layers)
    test = write_rows(folder / "test.jsonl", make_rows(40, 1000))
    train = {"local_steps": 2, "batch_size": 4, "lr": 0.01}
    sites = Elsewhere(folder / "sites", rows)
    loaded = load_config(settings(model, test, rounds=FEW, out=str(folder), train=train))
    run = federate(loaded, open_federation=sites.open_federation).folder
    done = read_rows(run / "rounds.jsonl")
    own = sum(row["seconds"] for row in done) - sites.waited  # checks, the average, one score of the test rows
    dropped = sum(len(row["dropped"]) for row in done)
    found = {"sites": count, "width": width, "dropped": dropped, "model_mb": round(size_mb(model), 1)}
    found |= {"opened_mb": sites.opened_mb, "peak_mb": peak_mb(os.getpid())}
    return {**found, "coordinator_seconds_a_round": round(own / FEW, 3)}


# --- helpers ---


def ended(rig: Rig) -> None:
    rig.until(lambda: True if rig.processes[CO].poll() == 0 else None, "the end of the run", 600)


def peak_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return round(int(found.group(1)) / 1e3, 1)


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def fresh(count: int, shape: Mapping[str, int]) -> dict[str, Any]:
    """Runs in a new process, because memory that a previous run left would count."""
    command = [sys.executable, __file__, "--one", str(count), str(shape["width"]), str(shape["layers"])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(messages(*map(int, sys.argv[2:5]))))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder, path = Path(tempfile.mkdtemp(prefix="fedsb-scale-")), HERE / "scale.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    big = {"method": {"name": "fedit", "rank": 64}}
    plan: dict[str, list[Callable[[], dict[str, Any]]]] = {
        "messages": [partial(fresh, n, shape) for shape, ns in ((SMALL, COUNTS), (LARGE, (5, 40))) for n in ns],
        "wire": [partial(wire, folder, "Fed-SB, rank 8"), partial(wire, folder, "FedIT, rank 64", **big)],
        "real": [partial(real, folder, n, shape) for n, shape in ((3, SMALL), (8, SMALL), (8, LARGE))],
    }
    for name in sys.argv[1:] or plan:
        found[name] = []
        for measure in plan[name]:
            found[name].append(measure())
            print(name, found[name][-1], flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
