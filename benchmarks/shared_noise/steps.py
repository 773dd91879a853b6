"""Measures a step with shared noise: seconds and bytes by the number of sites, in one process and over TLS.

    python benchmarks/shared_noise/steps.py --train train.jsonl --test dev.jsonl            (ten minutes on two cores)

In one process the batch of all sites together is the same, so what grows with the sites is secure aggregation: keys,
masks, shares and their recovery at the server. "crypto" times it alone, with every party on one core. The federation
is a coordinator and three sites as separate processes with TLS between them. Writes steps.json and steps.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

sys.path.append(str(Path(__file__).parents[1] / "federation"))
from rig import CO, Rig, running
from world import write_toml

from fedsb.config.load import load_config
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.plan import PrivacyPlan, SharedNoise
from fedsb.protocol.secure_sum import KEY_ROUNDS
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.secagg.protocol import KeyPlan, SumPlan, simulate
from fedsb.utils.environment import describe_machine, git_hash

HERE = Path(__file__).parent
SITES, BATCH, ROUNDS, VALUES = (3, 8, 16, 50), 768, 4, 4227
Json = dict[str, Any]


def settings(train: str, test: str, sites: int, **more: Any) -> Json:
    return {
        "name": f"sites-{sites}",
        "rounds": ROUNDS,
        "model": {"name": "minilm", "target_modules": ".*[.]layer[.][45][.].*", "max_seq_length": 64},
        "data": {"train": train, "test": test, "test_rows": 50},
        "task": {"kind": "classification", "pooling": "mean"}
        | {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        "clients": {"partition": "iid", "count": sites},
        "method": {"name": "fed-sb", "rank": 16},
        "train": {"local_steps": 1, "batch_size": BATCH // sites, "lr": 0.16, "head_lr": 0.3},
        "server": {"secure_aggregation": True},
        "privacy": {"unit": "example", "epsilon": 3.0, "clip_norm": 0.01},
        "eval": {"every": ROUNDS},
        **more,
    }


def per_round(folder: Path, first: int = 1) -> Json:
    """Returns seconds, and bytes of one site, of a round of a run: the median over all but the first rounds."""
    rounds, traffic = read_rows(folder / "rounds.jsonl")[first:], read_rows(folder / "traffic.jsonl")
    sites = len(rounds[0]["cohort"])
    sums = {
        f"{way}_{kind}": statistics.median(
            sum(line[kind] for line in traffic if (line["round"], line["direction"]) == (row["round"], way)) / sites
            for row in rounds
        )
        for way in ("up", "down")
        for kind in ("bytes", "wire_bytes")
    }
    return {"seconds": statistics.median(row["seconds"] for row in rounds), **sums}


def in_process(train: str, test: str, sites: int, folder: Path) -> Json:
    """Returns the figures of a run with shared noise, and the seconds of a round of the same with local noise."""
    shared = federate(load_config({**settings(train, test, sites), "out": str(folder)}))
    local = settings(train, test, sites, name=f"local-{sites}", server={}, out=str(folder))
    return {**per_round(shared.folder), "local_seconds": per_round(federate(load_config(local)).folder)["seconds"]}


def crypto(sites: int) -> Json:
    """Returns the seconds that all parties together compute for one round, and for an agreement of keys."""
    threshold, names = sites - sites // 10, [f"site-{i:02d}" for i in range(sites)]
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    public = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    plan = PrivacyPlan(
        unit="example",
        clip=0.01,
        delta=1e-5,
        batch=BATCH,
        rows=9999 // sites,
        steps=1,
        rounds=40,
        sigma=1.0,
        shared=SharedNoise(clients=sites, honest=threshold, rows=9999),
    )
    grid, seconds = NoiseGrid.of(plan, VALUES), dict[int, float]()
    ring = grid.ring(sites)
    draw = np.random.default_rng(0)
    vectors = {name: ring.encode_whole(draw.integers(-1000, 1000, VALUES)) for name in names}
    for rounds in (1, KEY_ROUNDS):
        agreed = KeyPlan(run="r", round=0, rounds=rounds, sites=public, threshold=threshold, attempt="a", signed=False)
        sums = SumPlan(run="r", round=0, sites=public, threshold=threshold, size=VALUES, grid=ring, keys=agreed)
        started = time.perf_counter()
        simulate(sums, keys, vectors)
        seconds[rounds] = time.perf_counter() - started
    each = (seconds[KEY_ROUNDS] - seconds[1]) / (KEY_ROUNDS - 1)  # of a round's keys
    return {"bits": grid.bits, "round_seconds": seconds[1] - each, "keys_seconds_per_round": each}


def over_tls(train: Sequence[Json], test: str, folder: Path) -> Json:
    """Returns the figures of a federation of three sites as processes of their own."""
    config = settings("each site's own", test, 3, name="run", engine={"name": "flower"}, out=str(folder))
    del config["clients"]
    rows = {f"site-{i}": [train[j] for j in range(i, len(train), 3)] for i in range(3)}
    folder.mkdir()
    rig = Rig(folder, write_toml(folder / "run.toml", config), rows)
    with running(rig):
        rig.until(lambda: rig.processes[CO].poll(), "the end of the run", 1800.0)
    return per_round(rig.run)


def table(found: Json) -> str:
    machine = f"{found['machine']['cores']} cores, {found['machine']['memory_gib']} GiB"
    lines = [
        "# A step with shared noise",
        "",
        f"Made by `python benchmarks/shared_noise/steps.py` at commit {found['commit']} on one machine ({machine}):",
        f"SNLI, Fed-SB r = 16, {VALUES:,} values, {BATCH} rows per step of all sites together. Medians over",
        f"{ROUNDS - 1} rounds after the first, in which the sites agree on keys for {KEY_ROUNDS} rounds.",
        "",
        "| sites | seconds of a step | with local noise | bits | bytes up per site | on the wire up | down | "
        "crypto of a round, all parties | keys, per round |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["in_process"]:
        lines.append(
            f"| {row['sites']} | {row['seconds']:.2f} | {row['local_seconds']:.2f} | {row['bits']} "
            f"| {row['up_bytes']:,.0f} | {row['up_wire_bytes']:,.0f} | {row['down_wire_bytes']:,.0f} "
            f"| {row['round_seconds']:.2f} s | {row['keys_seconds_per_round']:.2f} s |"
        )
    tls = found["over_tls"]
    lines += [
        "",
        f"Three sites over TLS: {tls['seconds']:.2f} seconds of a step, {tls['up_wire_bytes']:,.0f} bytes up and "
        f"{tls['down_wire_bytes']:,.0f} down per site and step, headers included.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    given = parser.parse_args()
    opened = gzip.open if given.train.endswith(".gz") else open
    with opened(given.train, "rt") as file:
        rows = [json.loads(line) for line in file]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "commit": git_hash(),
            "machine": describe_machine(),
            "over_tls": over_tls(rows, given.test, folder / "federation"),
            "in_process": [{"sites": n, **in_process(given.train, given.test, n, folder), **crypto(n)} for n in SITES],
        }
    (HERE / "steps.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "steps.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
