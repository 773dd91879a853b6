"""TREC with every codec, and int4 without its feedback or with a head in float32: what is lost, and what it costs.

    python benchmarks/codec/run.py --data FOLDER       (FOLDER holds train.jsonl[.gz])

Trains on the first 5,000 rows, scored on the 452 behind them, three seeds, the learning rates of benchmarks/trec. The
variants are patches of this script's own processes, no settings. Two processes at a time, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import find, slice_of, spread

HERE = Path(__file__).parent
METHODS = {
    "fed-sb r32": ["method.name=fed-sb", "method.rank=32", "train.lr=0.04"],
    "fedit r4": ["method.name=fedit", "method.rank=4", "train.lr=0.005"],
}
CODECS = {
    "fed-sb r32": ("float32", "bfloat16", "int8", "int4", "int4, no feedback", "int4, head in float32"),
    "fedit r4": ("float32", "int8", "int4"),
}
SEEDS = (0, 1, 2)


def one(method: str, codec: str, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """The outcome of one run, in this process."""
    import torch

    import fedsb
    from fedsb.record import read_rows
    from fedsb.report import summary

    torch.set_num_threads(1)
    kind, _, variant = codec.partition(", ")
    if variant == "no feedback":
        without_feedback()
    if variant == "head in float32":
        with_exact_head()
    recipe = Path(fedsb.__file__).parent / "recipes" / "trec.toml"
    with tempfile.TemporaryDirectory() as out:
        settings = [f"data.train={train}", f"data.test={test}", f"seed={seed}", f"out={out}", "basis.share_samples=0"]
        settings += [*METHODS[method], f"server.codec={kind}", "eval.every=5"]
        result = fedsb.federate(fedsb.load_config(recipe, settings))
        rounds, found = read_rows(result.folder / "rounds.jsonl"), summary(result.folder)
    return {"score": result.score, "loss": rounds[-1]["loss"], "bytes": found["bytes"]["federation"]["with_head"]}


def without_feedback() -> None:
    """Nothing is owed, neither by clients nor by the server."""
    from fedsb.federation.link import Link

    up, settled = Link.up, Link.settled
    Link.up = lambda self, method, payload, base, kept: (up(self, method, payload, base, {})[0], {})  # type: ignore
    Link.settled = lambda self, method, state, heard, after: replace(  # type: ignore
        settled(self, method, state, heard, after), tensors=after.tensors
    )


def with_exact_head() -> None:
    """The head's values pass by the codec; the bytes, which are not those of such a codec, are to be computed."""
    from fedsb.engines import embedded
    from fedsb.federation import link, payload, server

    exact: dict[bytes, Any] = {}

    def pack(message: Any, draw: Any = None) -> bytes:
        data = payload.pack(message, draw)
        exact[data] = {key: x for key, x in message.tensors.items() if key.startswith("classifier")}
        return data

    def unpack(data: bytes) -> Any:
        message = payload.unpack(data)
        return replace(message, tensors={**message.tensors, **exact.get(data, {})})

    link.pack, link.unpack, server.unpack, embedded.unpack = pack, unpack, unpack, unpack  # type: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    train = find(parser.parse_args().data, "train")
    test = slice_of(train, 5000, HERE / "tune.jsonl")
    results = HERE / "results.json"
    done: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    cells = {f"{m} | {c} | {seed}": (m, c, seed) for m in METHODS for seed in SEEDS for c in CODECS[m]}
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        jobs = {name: pool.submit(one, *cell, train, test) for name, cell in cells.items() if name not in done}
        for name, job in jobs.items():
            done[name] = job.result()
            results.write_text(json.dumps(done, indent=1) + "\n")
            print(name, done[name]["score"], flush=True)
    lines = ["| method | codec | accuracy | less float32, seed by seed | last loss | up | down |", "|---" * 7 + "|"]
    for m in METHODS:
        for c in CODECS[m]:
            rows, plain = ([done[f"{m} | {codec} | {seed}"] for seed in SEEDS] for codec in (c, "float32"))
            gaps = [row["score"] - other["score"] for row, other in zip(rows, plain, strict=True)]
            sizes = " | ".join(
                "" if "head" in c else f"{mean(row['bytes'][way] for row in rows) / 1e6:.2f} MB"
                for way in ("up", "down")
            )
            loss = f"{mean(row['loss'] for row in rows):.3f}"
            lines.append(
                f"| {m} | {c} | {spread([row['score'] for row in rows])} | {spread(gaps)} | {loss} | {sizes} |"
            )
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
