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
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedsb.adapters.layout import Layout
from fedsb.channels.in_process import open_in_process
from fedsb.config.load import load_config
from fedsb.config.nested import set_key
from fedsb.config.schema import Config
from fedsb.models.load import matmul_precision
from fedsb.server.server import Server
from fedsb.training.joint import join_tensors
from fedsb.training.per_example import RowGradients

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
    method = config.method
    server = Server(config, method, "gradients", open_in_process(config, method, "gradients"))
    adapted, client = server.trainer.adapted, server.clients[0]
    with TemporaryDirectory() as folder:  # a basis of private rows is noised, so it needs its ledgers
        server.policy.open_ledgers(Path(folder), "gradients", new=True)
        server.opened.local_clients.start(server.policy, server.secure_sums, {})
        state, _, _ = server.start()
        server.policy.close()
    own = method.init_client(state.shared, method.broadcast(state), {}, 0)
    trainable, heads = method.trainable(own, 0), adapted.head_keys
    layout = Layout.of({key: own[key] for key in trainable})
    values = layout.flatten({key: own[key] for key in trainable}).unsqueeze(0)
    frozen = join_tensors(adapted, [{key: x for key, x in own.items() if key not in trainable}])
    gradients, plan = RowGradients.allocate(adapted, server.data.task, layout, 64), server.policy.plans[client.name]
    rows = client.train[:: client.rows // ROWS][:ROWS]

    def sums(part: Sequence[Any]) -> Mapping[str, Tensor]:
        return layout.views(gradients.clipped_sums(values, frozen, [part], plan.clip)[0][0])

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
