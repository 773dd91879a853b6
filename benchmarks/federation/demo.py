"""Runs one coordinator and three sites as separate processes over TLS, and the same runs in one process.

    python benchmarks/federation/demo.py [--loopback] [--train rows.jsonl --test rows.jsonl --text text --label label]

Without files the rows are the docstrings of this Python's library. Plain sums must give the same adapter. Secure
aggregation must give one that differs after the first round by at most the fixed point's error, and the same final
score. If this machine allows it, each party is in a network namespace with its own address, and is disconnected during
the run: the adapter must again be the same. Otherwise the demo prints the reason, and all parties use loopback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apart import Apart, Cut
from namespaces import why_not
from safetensors.numpy import load_file

SITES = 3
SECURE = {"server.secure_aggregation": True}
HERE = Path(__file__).parent
SETTINGS = {
    "rounds": 4,
    "model.name": "minilm",
    "model.max_seq_length": 32,
    "task.pooling": "mean",
    "clients.partition": "iid",
    "clients.count": SITES,
    "method.name": "fed-sb",
    "method.rank": 16,
    "basis.share_samples": 0,
    "train.local_steps": 5,
    "train.lr": 0.02,
    "engine.clients_per_forward": 1,
}


def overrides(folder: Path, name: str, data: dict[str, str], **more: Any) -> list[str]:
    settings = {**SETTINGS, **data, **more, "name": name, "out": str(folder)}
    return [
        f"{key}={value if isinstance(value, int | float) else json.dumps(value)}" for key, value in settings.items()
    ]


def fedsb(folder: Path, name: str, given: Sequence[str], engine: str) -> Path:
    """Runs the command that a user types. Returns its run directory."""
    command = [sys.executable, "-m", "fedsb", "run", "quickstart", "--engine", engine]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums of floats depend on how many threads share them
    command += [word for text in given for word in ("--set", text)]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return folder / name if engine == "in_process" else folder / f"{name}-federation" / "coordinator" / "runs" / name


def facts(run: Path) -> dict[str, Any]:
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    traffic = [json.loads(line) for line in (run / "traffic.jsonl").read_text().splitlines()]
    weights = run / "adapter" / "adapter_model.safetensors"
    return {
        "scores": [row["score"] for row in rounds],
        "seconds_a_round": sorted(row["seconds"] for row in rounds)[len(rounds) // 2],
        "value_bytes": sum(row["bytes"] for row in traffic),
        "wire_bytes": sum(row["wire_bytes"] for row in traffic),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
    }


def largest_difference(one: Path, other: Path) -> float:
    """Returns the largest difference between two adapters in any value of B A."""
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    worst = max(float(abs(a[key] - b[key]).max()) for key in a if "lora_" not in key)
    for key in a:
        if key.endswith("lora_A.weight"):
            left = key.replace("lora_A", "lora_B")
            worst = max(worst, float(abs(a[left] @ a[key] - b[left] @ b[key]).max()))
    return worst


class Demo:
    """The runs, each in a folder of its own below `folder`."""

    def __init__(self, folder: Path, data: dict[str, str], apart: bool) -> None:
        self.folder, self.data, self.apart = folder, data, apart
        self.seen: dict[str, Any] = {}  # on the network, by run

    def one_process(self, name: str, **more: Any) -> Path:
        print(f"{name} ...", flush=True)
        return fedsb(self.folder, name, overrides(self.folder, name, self.data, **more), "in_process")

    def sites(self, name: str, cuts: Sequence[Cut] = (), **more: Any) -> Path:
        print(f"{name} ...", flush=True)
        given = overrides(self.folder, name, self.data, **more)
        if not self.apart:
            return fedsb(self.folder, name, given, "flower")
        federation = Apart(self.folder / f"{name}-federation", given)
        self.seen[name] = federation.carry_out(cuts, scan=bool(cuts))
        return federation.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "text", "label"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a folder that is deleted")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, also where they are allowed")
    asked = parser.parse_args()
    keys = {"train": "data.train", "test": "data.test", "text": "task.text", "label": "task.label"}
    data = {key: getattr(asked, name) for name, key in keys.items() if getattr(asked, name) is not None}
    data |= {key: str(Path(data[key]).resolve()) for key in ("data.train", "data.test") if key in data}
    folder = (asked.out or Path(tempfile.mkdtemp(prefix="fedsb-demo-"))).resolve()
    reason = "as asked" if asked.loopback else why_not()
    network = f"loopback ({reason})" if reason else "each party in a network namespace, with its own address"
    print(f"{SITES} sites and a coordinator on this machine, TLS between them; about six minutes on two cores")
    print(f"network: {network}", flush=True)
    demo = Demo(folder, data, apart=not reason)
    here, there = demo.one_process("plain-in-process"), demo.sites("plain-flower")
    once = demo.one_process("once-in-process", rounds=1), demo.sites("once-flower", rounds=1, **SECURE)
    secure = demo.sites("secure-flower", **SECURE)
    found = {
        "network": network,
        "one process": facts(here),
        "real sites, plain sums": facts(there),
        "real sites, secure aggregation": facts(secure),
        "the same adapter with plain sums": facts(here)["sha256"] == facts(there)["sha256"],
        "largest difference after one round of secure aggregation": largest_difference(*once),
    }
    same = found["the same adapter with plain sums"]
    if demo.apart:
        cut = demo.sites("cut-flower", [Cut("client-01", 2, 30), Cut("coordinator", 3, 10)])
        found["real sites, cables pulled"] = facts(cut)
        found["the same adapter with cables pulled"] = facts(cut)["sha256"] == facts(here)["sha256"]
        found["seen on the network"] = {name: demo.seen[name] for name in ("plain-flower", "cut-flower")}
        same &= found["the same adapter with cables pulled"]
    print(json.dumps(found, indent=1))
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    if not asked.out:
        shutil.rmtree(folder)
    if not same:
        sys.exit("the adapters differ")


if __name__ == "__main__":
    main()
