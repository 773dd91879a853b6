"""One coordinator and three sites as processes of their own, over TLS, beside the same runs in one process.

    python benchmarks/federation/demo.py [--train rows.jsonl --test rows.jsonl --text text --label label]

Without files the rows are the docstrings of this Python's library. Plain sums must give the very same adapter; secure
sums one that differs after the first round by no more than the fixed point allows, and the same score at the end.
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
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

SITES = 3
HERE = Path(__file__).parent
SETTINGS = {
    "rounds": 4,
    "model.name": "minilm",
    "model.max_tokens": 32,
    "task.pooling": "mean",
    "clients.split": "iid",
    "clients.count": SITES,
    "method.name": "fed-sb",
    "method.rank": 16,
    "basis.share_samples": 0,
    "train.steps": 5,
    "train.lr": 0.02,
    "engine.cohort_size": 1,
}


def fedsb(folder: Path, name: str, data: dict[str, str], engine: str, **more: Any) -> Path:
    """A run by the command that a user types; gives back its run directory."""
    settings = {**SETTINGS, **data, **more, "name": name, "out": str(folder)}
    command = [sys.executable, "-m", "fedsb", "run", "quickstart", "--engine", engine]
    for key, value in settings.items():
        command += ["--set", f"{key}={value if isinstance(value, int | float) else json.dumps(value)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums of floats depend on how many threads share them
    print(f"{name} ...", flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return folder / name if engine == "embedded" else folder / f"{name}-federation" / "coordinator" / "runs" / name


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
    """Between two adapters, of any value of B A."""
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    worst = max(float(abs(a[key] - b[key]).max()) for key in a if "lora_" not in key)
    for key in a:
        if key.endswith("lora_A.weight"):
            left = key.replace("lora_A", "lora_B")
            worst = max(worst, float(abs(a[left] @ a[key] - b[left] @ b[key]).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "text", "label"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a folder that is deleted")
    asked = parser.parse_args()
    keys = {"train": "data.train", "test": "data.test", "text": "task.text", "label": "task.label"}
    data = {keys[key]: value for key, value in vars(asked).items() if key in keys and value is not None}
    folder = asked.out or Path(tempfile.mkdtemp(prefix="fedsb-demo-"))
    print(f"{SITES} sites and a coordinator on this machine, TLS between them; about four minutes on two cores")
    here, there = (fedsb(folder, f"plain-{engine}", data, engine) for engine in ("embedded", "flower"))
    once = [
        fedsb(folder, f"once-{engine}", data, engine, rounds=1, **{"server.secure_sum": engine == "flower"})
        for engine in ("embedded", "flower")
    ]
    secure = fedsb(folder, "secure-flower", data, "flower", **{"server.secure_sum": True})
    found = {
        "one process": facts(here),
        "real sites, plain sums": facts(there),
        "real sites, secure sums": facts(secure),
        "the same adapter with plain sums": facts(here)["sha256"] == facts(there)["sha256"],
        "largest difference after one round of secure sums": largest_difference(*once),
    }
    print(json.dumps(found, indent=1))
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    if not asked.out:
        shutil.rmtree(folder)
    if not found["the same adapter with plain sums"]:
        sys.exit("the adapters differ")


if __name__ == "__main__":
    main()
