"""Runs a real federation of SmolLM2-135M on three of MedQuAD's institutes, and the same run in one process.

    git clone https://github.com/abachaa/MedQuAD && python benchmarks/medquad/table.py MedQuAD
    python benchmarks/federation/smollm2.py --train train.jsonl --test test.jsonl      (twenty minutes on two cores)

The coordinator and the sites are separate processes with TLS between them, each on one thread. Measured are the bytes
of every site and round, by the coordinator's ledger and at its public port, the seconds per round, and the peak of
resident memory (VmHWM) of each process. The two adapters must be the same file. Writes smollm2.json and smollm2.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faults import adapter, dropped
from rig import CO, HERE, Rig, running
from scale import peak_mb
from world import write_rows, write_toml

from fedsb.reporting.run_directory import read_rows
from fedsb.runs.find import recipe_path
from fedsb.utils.environment import describe_machine, git_hash

RECIPE, INSTITUTES, ROUNDS, SECONDS = "medquad-smollm2", ("CancerGov", "GHR", "NINDS"), 5, 3600.0
CHANGES: dict[str, dict[str, Any]] = {
    "data": {"test_rows": 30},
    "train": {"local_steps": 2},
    "eval": {"every": ROUNDS},
}
COUNTER_SECONDS = 1.6  # the coordinator writes its counts of the public port every second
THREADS = "1"  # sums of floats depend on how many threads share them


class Measured:
    """Figures read while the parties run: the peak of each process, and the counts of the public port."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.peaks: dict[str, dict[str, float]] = {}  # party -> process -> MB
        self.port: list[dict[str, dict[str, int]]] = []  # after the opening, and after each round

    def read_peaks(self) -> None:
        for party in (CO, *self.rig.rows):
            for process, pid in self.rig.pids(party).items():
                try:
                    mb = peak_mb(pid)
                except (FileNotFoundError, ProcessLookupError, AssertionError):  # it has ended
                    continue
                peaks = self.peaks.setdefault(party, {})
                peaks[process] = max(mb, peaks.get(process, 0.0))

    def read_port(self) -> None:
        time.sleep(COUNTER_SECONDS)
        counts = json.loads((self.rig.folder / CO / "traffic.json").read_text())
        self.port.append({site: {key: counts[site][key] for key in ("bytes_in", "bytes_out")} for site in counts})

    def wait_for_end(self) -> None:
        while self.rig.processes[CO].poll() is None:
            self.read_peaks()
            time.sleep(0.1)
        if self.rig.processes[CO].returncode:
            raise RuntimeError(f"the coordinator failed: see {self.rig.folder / CO}.out")


def settings(test: Path, train: str, engine: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Returns the recipe with the changes of this measurement."""
    config: dict[str, Any] = tomllib.loads(recipe_path(RECIPE).read_text())
    changes = {**CHANGES, "data": {**CHANGES["data"], "train": train, "test": str(test)}, "engine": dict(engine)}
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    return config | {"name": "run", "rounds": ROUNDS, "out": str(out)}


def federation(folder: Path, rows: Mapping[str, Sequence[Mapping[str, str]]], test: Path) -> tuple[Rig, Measured]:
    toml = write_toml(folder / "sites.toml", settings(test, "each site's own", {"name": "flower"}, folder))
    rig = Rig(folder, toml, rows)
    measured = Measured(rig)
    with running(rig):
        rig.when(CO, "checkpoint", 0, seconds=SECONDS)
        measured.read_port()
        for number in range(1, ROUNDS + 1):
            rig.when(CO, "checkpoint", number, seconds=SECONDS)
            measured.read_port()
            measured.read_peaks()
            print(f"round {number} of {ROUNDS} by the sites", flush=True)
        measured.wait_for_end()
    return rig, measured


def one_process(folder: Path, rows: Mapping[str, Sequence[Mapping[str, str]]], test: Path) -> tuple[Path, float]:
    """Returns the run directory of the same run in one process, and the peak of its memory in MB."""
    table = write_rows(folder / "one-process.jsonl", [row for own in rows.values() for row in own])
    engine = {"name": "in_process", "clients_per_forward": 1}
    toml = write_toml(folder / "one-process.toml", settings(test, str(table), engine, folder / "one-process"))
    process = subprocess.Popen([sys.executable, "-m", "fedsb", "run", str(toml)], stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        try:
            peak = max(peak, peak_mb(process.pid))
        except (FileNotFoundError, AssertionError):
            break
        time.sleep(0.1)
    if process.wait():
        raise RuntimeError(f"the run in one process failed. Repeat it with: fedsb run {toml}")
    return folder / "one-process" / "run", peak


# --- results ---


def by_round(rig: Rig, measured: Measured) -> list[dict[str, Any]]:
    """Returns the seconds of each round, and each site's bytes in it."""
    traffic, found = read_rows(rig.run / "traffic.jsonl"), []
    for row in read_rows(rig.run / "rounds.jsonl"):
        number, sites = row["round"], dict[str, dict[str, int]]()
        for site in rig.rows:
            own = [line for line in traffic if (line["round"], line["client"]) == (number, site)]
            sites[site] = {
                f"{direction}_{kind}": sum(line[kind] for line in own if line["direction"] == direction)
                for direction in ("up", "down")
                for kind in ("bytes", "wire_bytes")
            }
            before, after = (measured.port[i][site] for i in (number - 1, number))
            sites[site] |= {
                "port_in": after["bytes_in"] - before["bytes_in"],
                "port_out": after["bytes_out"] - before["bytes_out"],
            }
        found.append({"round": number, "seconds": row["seconds"], "loss": row["loss"], "sites": sites})
    return found


def table(found: Mapping[str, Any]) -> str:
    """Returns smollm2.md."""
    machine = f"{found['machine']['cores']} cores, {found['machine']['memory_gib']} GiB, other load"
    lines = [
        "# A federation of SmolLM2-135M over TLS",
        "",
        f"Made by `python benchmarks/federation/smollm2.py` at commit {found['commit']}, seed {found['seed']}, on one",
        f"machine ({machine}). A coordinator and three sites are separate processes, each on one",
        f"thread. The run is the recipe `{RECIPE}` with three institutes, {ROUNDS} rounds of 2 steps of 4 rows, and 30",
        "test rows. Every detail is in smollm2.json.",
        "",
    ]
    same = "is the same file as" if found["the same adapter"] else "DIFFERS from"
    lines += [
        f"The adapter {same} that of the run in one process. Dropped: {found['dropped'] or 'nobody'}. The loss on the",
        f"test rows is {found['score']:.4f} nats per token, before training {found['score_before']:.4f}.",
        "",
        "| site | bytes per round up | down | at the public port in | out | all rounds at the port |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for site in found["rounds"][0]["sites"]:
        rows = [row["sites"][site] for row in found["rounds"]]
        mean = {key: round(statistics.mean(row[key] for row in rows)) for key in rows[0]}
        port = sum(row["port_in"] + row["port_out"] for row in rows)
        lines.append(
            f"| {site} | {mean['up_wire_bytes']:,} | {mean['down_wire_bytes']:,} | {mean['port_in']:,} "
            f"| {mean['port_out']:,} | {port:,} |"
        )
    lines += [
        "",
        "Bytes up and down are `wire_bytes` of traffic.jsonl, the mean over the rounds. The public port also counts",
        "HTTP headers and polling. These rounds do not include the opening and the finish. With them, the port counts",
        f"{found['port_all_bytes']:,} bytes of all sites.",
        "",
        "| round | seconds | training loss |",
        "|---:|---:|---:|",
        *(f"| {row['round']} | {row['seconds']:.1f} | {row['loss']:.4f} |" for row in found["rounds"]),
        f"| median, in one process | {found['one_process_seconds']:.1f} | |",
        "",
        "Peak of resident memory (VmHWM) in MB:",
        "",
        "| party | process | MB |",
        "|---|---|---:|",
    ]
    lines += [
        f"| {party} | {name} | {mb:,.0f} |" for party, peaks in found["peak_mb"].items() for name, mb in peaks.items()
    ]
    lines += [f"| one process | all | {found['one_process_mb']:,.0f} |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="train.jsonl of benchmarks/medquad/table.py")
    parser.add_argument("--test", type=Path, required=True, help="test.jsonl of benchmarks/medquad/table.py")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": THREADS, "FEDSB_PAUSE": "2.5"}  # a checkpoint waits until the port was read
    folder, commit = Path(tempfile.mkdtemp(prefix="fedsb-smollm2-")), git_hash()
    given = read_rows(asked.train)
    rows = {name: [row for row in given if row["client"] == name] for name in INSTITUTES}
    test = write_rows(folder / "test.jsonl", [row for row in read_rows(asked.test) if row["client"] in INSTITUTES])
    rig, measured = federation(folder, rows, test)
    print("the same run in one process ...", flush=True)
    run, mb = one_process(folder, rows, test)
    end = json.loads((rig.folder / CO / "traffic.json").read_text())
    result = json.loads((rig.run / "result.json").read_text())
    found = {
        "commit": commit,
        "machine": describe_machine(),
        "seed": 0,
        "training_rows": {name: len(own) for name, own in rows.items()},
        "the same adapter": adapter(rig.run) == adapter(run),
        "adapter_sha256": adapter(rig.run),
        "dropped": dropped(rig),
        "score": result["score"],
        "score_before": json.loads((rig.run / "manifest.json").read_text())["before"]["score"],
        "rounds": by_round(rig, measured),
        "port_all_bytes": sum(row["bytes_in"] + row["bytes_out"] for row in end.values()),
        "peak_mb": measured.peaks,
        "one_process_mb": mb,
        "one_process_seconds": statistics.median(row["seconds"] for row in read_rows(run / "rounds.jsonl")),
    }
    (HERE / "smollm2.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "smollm2.md").write_text(table(found))
    print(table(found), folder)
    if not found["the same adapter"]:
        sys.exit("the adapters differ")


if __name__ == "__main__":
    main()
