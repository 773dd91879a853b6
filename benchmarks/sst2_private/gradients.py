"""Measures the adapter's and the head's share of a clipped row, and their signal to noise, in a private step.

    python benchmarks/sst2_private/gradients.py train.jsonl dev.jsonl          some minutes on a core

For contenders in the setting of first/compare.toml, at the start of a run, over 768 rows of the first client:

    share     of a clipped row's squared length that is the adapter's, mean over rows
    signal    length of the mean clipped gradient, in clips, without what chance adds to it: <a, b>^(1/2), a and b the
              means over two halves of the rows
    ratio     signal over the length of a step's noise, sigma sqrt(values) / batch

Writes gradients.json to this folder. It reads raw gradients without noise, so it is not private.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedsb.channels.in_process import EmbeddedEngine
from fedsb.config.load import load_config
from fedsb.config.nested import set_key
from fedsb.config.schema import Config, method_of
from fedsb.models.load import matmul_precision
from fedsb.training.joint import join_tensors
from fedsb.training.per_example import clipped_sums

HERE = Path(__file__).parent
ROWS = 768
CONTENDERS = {
    "fed-sb r16": {"method.name": "fed-sb", "method.rank": 16},
    "fed-sb r16, basis random": {"method.name": "fed-sb", "method.rank": 16, "basis.kind": "random"},
    "fed-sb r16, basis core": {
        "method.name": "fed-sb", "method.rank": 16, "basis.kind": "core", "basis.samples": 6000, "basis.R0": "zero",
    },
    "ffa-lora r4": {"method.name": "ffa-lora", "method.rank": 4},
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for name, settings in CONTENDERS.items():
        found.append({"contender": name, **measure(config_of(settings))})
        print(json.dumps(found[-1]), flush=True)
    (HERE / "gradients.json").write_text(json.dumps(found, indent=1) + "\n")


def config_of(settings: Mapping[str, Any]) -> Config:
    raw: dict[str, Any] = tomllib.loads((HERE / "first" / "compare.toml").read_text())
    raw.pop("compare")
    train, test = sys.argv[1:]
    raw["data"] |= {"train": train, "test": test}
    for key, value in settings.items():
        raw = set_key(raw, key, value)
    return load_config(raw).config


def measure(config: Config) -> dict[str, float]:
    method = method_of(config)
    engine = EmbeddedEngine(config, method, "gradients")
    with TemporaryDirectory() as folder:  # a basis of private rows is noised, so it needs its ledgers
        engine.policy.open_ledgers(Path(folder), "gradients", new=True)
        basis, _ = engine.build_basis(method)
        engine.policy.close()
    state = method.start(engine.shapes, basis, engine.head, config.seed)
    own = method.init_client(state.shared, method.broadcast(state), {}, 0)
    trainable, heads = method.trainable(own, 0), engine.adapted.head_keys
    joined = join_tensors(engine.adapted, [own])
    site, plan = engine.sites[0], engine.policy.plans[engine.sites[0].name]
    rows = site.train[:: site.rows // ROWS][:ROWS]

    def sums(part: list[Any]) -> Mapping[str, Tensor]:
        return clipped_sums(engine.adapted, engine.task, joined, trainable, [part], plan.clip, 64)[0]

    with matmul_precision(config.model.float32_matmul_precision):
        first, second = sums(rows[0::2]), sums(rows[1::2])
        alone = [sums([row]) for row in rows[::16]]
    squares = [{part: square(one, keys) for part, keys in parts(trainable, heads)} for one in alone]
    share = sum(s["adapter"] / (s["adapter"] + s["head"]) for s in squares) / len(squares)
    facts: dict[str, float] = {"sigma": plan.sigma, "share": share}
    for part, keys in parts(trainable, heads):
        product = sum(float((first[key] * second[key]).sum()) for key in keys) / (len(rows) / 2) ** 2
        signal = max(product, 0.0) ** 0.5 / plan.clip
        values = sum(first[key].numel() for key in keys)
        noise = plan.sigma * values**0.5 / plan.batch
        facts |= {f"{part}_values": values, f"{part}_signal": signal, f"{part}_ratio": signal / noise}
    return facts


def parts(trainable: frozenset[str], heads: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    return [("adapter", trainable - heads), ("head", trainable & heads)]


def square(tensors: Mapping[str, Tensor], keys: frozenset[str]) -> float:
    return sum(float(tensors[key].square().sum()) for key in keys)


if __name__ == "__main__":
    main()
