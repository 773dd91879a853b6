"""Trains a head alone on the frozen model with the same DP-SGD, as a reference for adapters.

    python benchmarks/sst2_private/head.py train.jsonl dev.jsonl          some minutes on one core

A head on mean-pooled states is linear in them, so that the model is run once, over a quarter of each client's rows
(q and sigma are those of all rows), and a run takes a second. Over epsilons, rates of the head, and two lengths: 40
steps of 128 rows at clip 0.1, and compare.toml's 12 of 256 at 0.01; five seeds each; accuracy on the test rows, and on
800 training rows left out. Its noise is torch's and seeded: an experiment, not a private run. Writes head.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsb.channels.in_process import open_in_process
from fedsb.config.load import load_config
from fedsb.data.tasks.base import Example
from fedsb.models.load import matmul_precision
from fedsb.privacy.plan import PrivacyPlan, default_delta
from fedsb.training.gradients import load_nothing
from fedsb.training.scoring import forward
from fedsb.training.trainer import Trainer

HERE = Path(__file__).parent
Rows = tuple[Tensor, Tensor]  # states (b, d), the last of them 1; labels (b,)
SETTINGS = ({"rounds": 8, "steps": 5, "batch": 128, "clip": 0.1}, {"rounds": 4, "steps": 3, "batch": 256, "clip": 0.01})


def main() -> None:
    torch.set_num_threads(1)
    raw: dict[str, Any] = tomllib.loads((HERE / "compare.toml").read_text())
    raw.pop("compare")
    raw["data"] |= {"train": sys.argv[1], "test": sys.argv[2]}
    config = load_config(raw).config
    opened = open_in_process(config, config.method, "head")
    load_nothing(opened.trainer.adapted, opened.trainer.head)
    sites = [states(opened.trainer, client.train[::4]) for client in opened.clients]
    test, rows = states(opened.trainer, opened.data.test), opened.clients[0].rows
    left_out = tuple(torch.cat([site[i][:267] for site in sites]) for i in (0, 1))
    found = []
    for setting in SETTINGS:
        for epsilon in (1.0, 3.0, 10.0, None):
            sigma = sigma_of(rows, epsilon, setting)
            for lr in (0.01, 0.03, 0.1, 0.3):
                heads = [train([(x[267:], y[267:]) for x, y in sites], sigma, lr, seed, **setting) for seed in range(5)]
                on_test = [accuracy(W, test) for W in heads]
                found.append(
                    {
                        **setting, "epsilon": epsilon, "sigma": sigma, "head_lr": lr,
                        "mean": statistics.fmean(on_test), "sd": statistics.stdev(on_test),
                        "left_out": statistics.fmean(accuracy(W, left_out) for W in heads),
                    }
                )  # fmt: skip
                print(json.dumps(found[-1]), flush=True)
    (HERE / "head.json").write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")


@torch.no_grad()
def states(trainer: Trainer, rows: Sequence[Example]) -> Rows:
    seen: list[Tensor] = []
    (head,) = trainer.adapted.heads.values()
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, y = [], []
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    with matmul_precision(trainer.config.model.float32_matmul_precision):
        for start in range(0, len(ordered), 64):
            _, batch = forward(trainer.adapted.model, trainer.task, ordered[start : start + 64])
            mask = batch["attention_mask"].unsqueeze(-1).float()
            x.append((seen.pop() * mask).sum(1) / mask.sum(1))
            y.append(batch["labels"])
    hook.remove()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    together = torch.cat(x)[order]
    return torch.cat([together, torch.ones(len(rows), 1)], dim=1), torch.cat(y)[order]


def sigma_of(rows: int, epsilon: float | None, setting: dict[str, Any]) -> float:
    if epsilon is None:
        return 0.0
    delta, _ = default_delta("example", [rows])
    shape = {key: setting[key] for key in ("rounds", "steps", "batch", "clip")}
    return PrivacyPlan(unit="example", delta=delta, rows=rows, **shape).calibrate(epsilon).sigma


def train(
    sites: list[Rows], sigma: float, lr: float, seed: int, *, rounds: int, steps: int, batch: int, clip: float
) -> Tensor:
    """Trains by FedAvg of DP-SGD with Adam, restarted each round, as fedsb does. The head is (2, d), with its bias."""
    draw = torch.Generator().manual_seed(seed)
    width = sites[0][0].shape[1]
    W = torch.cat([0.02 * torch.randn(2, width - 1, generator=draw), torch.zeros(2, 1)], dim=1)
    for _ in range(rounds):
        trained = []
        for x, y in sites:
            w, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
            for t in range(1, steps + 1):
                drawn = torch.rand(len(x), generator=draw) < batch / len(x)
                x_b, error_b = x[drawn], torch.softmax(x[drawn] @ w.T, dim=1)
                error_b[torch.arange(len(x_b)), y[drawn]] -= 1
                factor_b = (clip / (error_b.norm(dim=1) * x_b.norm(dim=1))).clamp(max=1)
                noise = sigma * clip * torch.randn(w.shape, generator=draw)
                g = ((error_b * factor_b[:, None]).T @ x_b + noise) / batch
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            trained.append(w)
        W = torch.stack(trained).mean(0)
    return W


def accuracy(W: Tensor, rows: Rows) -> float:
    return float(((rows[0] @ W.T).argmax(1) == rows[1]).float().mean())


if __name__ == "__main__":
    main()
