"""Measures a step of DP-SGD on the core: plain, ours, and Opacus with hooks and with ghost clipping.

    pip install opacus;  python benchmarks/private_step/run.py [--device cuda]       some ten minutes on a core

A BERT-like encoder (hidden 256, 4 layers, batch 32 x 128, classification) and a small Llama (hidden 256, 4 layers,
batch 16 x 128, next token), random weights, one thread. Times are medians of steps that take turns in one process, so
that what disturbs the machine disturbs all alike; peak memory is a process's own, less that of one that only loads the
model. For Opacus the core is three nn.Linear, of which the middle one trains: the form that its hooks know. All four
see the same rows, and the sums of clipped gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.basis import random_pair
from fedsb.adapters.layout import Layout
from fedsb.models.layers import find_targets
from fedsb.training.optimizer import clip_rows
from fedsb.training.per_example import RowGradients
from fedsb.training.scoring import forward
from fedsb.utils.environment import git_hash

HERE = Path(__file__).parent
RANKS = (16, 64, 200)
MODES = ("plain", "ours", "opacus hooks", "opacus ghost")
CLIP, TOKENS, STEPS = 1.0, 128, 9


class Rows:
    """A task over ready token ids: what the library asks of one, and no more."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal

    def collate(self, rows: list[dict[str, Any]], multiple_of: int = 1) -> dict[str, Tensor]:
        x = torch.tensor([row["input_ids"] for row in rows])
        labels = x.clone() if self.causal else torch.tensor([row["label"] for row in rows])
        return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": labels}

    def losses(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        if not self.causal:
            loss_b = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            return loss_b, torch.ones_like(loss_b)
        each = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
        return each.sum(1), torch.full_like(each[:, 0], each.shape[1])


class Three(nn.Module):
    """The same core as three linear layers around a frozen one."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor) -> None:
        super().__init__()
        r = len(A)
        self.base, self.A, self.R, self.B = (
            base,
            nn.Linear(A.shape[1], r, bias=False),
            nn.Linear(r, r, bias=False),
            None,
        )
        self.B = nn.Linear(r, len(B), bias=False)
        self.A.weight, self.B.weight = nn.Parameter(A, False), nn.Parameter(B, False)
        nn.init.zeros_(self.R.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.R(self.A(x)))


def model_of(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=1000,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=688,
        vocab_size=1000,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class Trainer:
    """One model at one rank, and a step in each mode."""

    def __init__(self, kind: str, rank: int, device: str) -> None:
        causal = kind == "llama"
        self.device, self.task = device, Rows(causal)
        draw = torch.Generator().manual_seed(1)
        self.rows = [
            {"input_ids": torch.randint(0, 1000, (TOKENS,), generator=draw).tolist(), "label": i % 2}
            for i in range(16 if causal else 32)
        ]
        plain = model_of(kind).to(device)
        head = [] if causal else ["classifier"]
        targets = find_targets(plain, "blocks", head)
        self.three = copy.deepcopy(plain)
        self.adapted = AdaptedModel(plain, kind="core", targets=targets, head=head)
        self.tensors: dict[str, Tensor] = {}
        self.three.requires_grad_(False)
        for layer, (m, n) in self.adapted.shapes.items():
            A, B = (x.to(device) for x in random_pair(m, n, rank, 0, layer))
            self.tensors |= {
                f"{layer}.A": A,
                f"{layer}.B": B,
                f"{layer}.R": torch.zeros(1, 1, rank, rank, device=device),
            }
            parent, _, child = layer.rpartition(".")
            setattr(self.three.get_submodule(parent), child, Three(self.three.get_submodule(layer), A, B).to(device))
        self.tensors |= {key: x.unsqueeze(0) for key, x in self.adapted.head_tensors().items()}
        self.trainable = frozenset(key for key in self.tensors if not key.endswith((".A", ".B")))
        layout = Layout.of({key: self.tensors[key][0] for key in self.trainable})
        self.values = layout.flatten({key: self.tensors[key][0] for key in self.trainable}).unsqueeze(0)
        self.frozen = {key: x for key, x in self.tensors.items() if key not in self.trainable}
        self.gradients = RowGradients.allocate(self.adapted, self.task, layout, len(self.rows))  # type: ignore[arg-type]
        if not causal:
            self.three.classifier.requires_grad_(True)

    def step(self, mode: str) -> Callable[[], Tensor]:
        """Returns a function that computes a step's gradient and returns the sum's norm."""
        return {"plain": self.plain, "ours": self.ours}.get(mode) or self.opacus(mode)

    def plain(self) -> Tensor:
        self.adapted.load(self.tensors, trainable=self.trainable)
        logits, batch = forward(self.adapted.model, self.task, self.rows)  # type: ignore[arg-type]
        loss_b, weight_b = self.task.losses(logits, batch)
        (loss_b / weight_b).mean().backward()
        gradients = {key: p.grad for key, p in self.adapted.parameters().items() if p.grad is not None}
        return clip_rows(torch.cat([x.flatten() for x in gradients.values()]).unsqueeze(0), CLIP)

    def ours(self) -> Tensor:
        sums, _ = self.gradients.clipped_sums(self.values, self.frozen, [self.rows], CLIP)
        return sums.norm()

    def opacus(self, mode: str) -> Callable[[], Tensor]:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

        batch = {key: x.to(self.device) for key, x in self.task.collate(self.rows).items()}
        inputs = {key: x for key, x in batch.items() if key != "labels"}
        if mode == "opacus hooks":
            hooked = GradSampleModule(
                copy.deepcopy(self.three).train(), batch_first=True, loss_reduction="sum", strict=False
            )

            def step() -> Tensor:
                hooked.zero_grad(set_to_none=True)
                loss_b, weight_b = self.task.losses(hooked(**inputs).logits, batch)
                (loss_b / weight_b).sum().backward()
                trained = [p for p in hooked.parameters() if p.requires_grad]
                norm_b = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in trained]).norm(dim=0)
                factor_b = (CLIP / norm_b).clamp(max=1)
                sums = [torch.einsum("b,b...->...", factor_b, p.grad_sample) for p in trained]
                for p in trained:
                    p.grad_sample = None
                return torch.stack([x.square().sum() for x in sums]).sum().sqrt()

            return step
        ghost = GradSampleModuleFastGradientClipping(
            copy.deepcopy(self.three).train(), batch_first=True, loss_reduction="sum", strict=False,
            max_grad_norm=CLIP, use_ghost_clipping=True,
        )  # fmt: skip

        def ghost_step() -> Tensor:
            ghost.zero_grad(set_to_none=True)
            ghost.enable_hooks()
            loss_b, weight_b = self.task.losses(ghost(**inputs).logits, batch)
            loss_b = loss_b / weight_b
            loss_b.sum().backward(retain_graph=True)
            factor_b = ghost.get_clipping_coef()
            ghost.zero_grad(set_to_none=True)
            ghost.disable_hooks()
            (factor_b * loss_b).sum().backward()
            sums = [p.grad for p in ghost.parameters() if p.requires_grad]
            return torch.stack([x.square().sum() for x in sums]).sum().sqrt()

        return ghost_step


def measure(kind: str, rank: int, device: str) -> dict[str, Any]:
    trainer = Trainer(kind, rank, device)
    steps = {mode: trainer.step(mode) for mode in MODES}
    norms = {mode: float(step()) for mode, step in steps.items()}
    for mode in MODES[2:]:
        assert abs(norms[mode] / norms["ours"] - 1) < 1e-3, norms
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(STEPS):
        for mode, step in steps.items():
            started = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[mode].append(time.perf_counter() - started)
    medians = {mode: statistics.median(times) for mode, times in seconds.items()}
    ratios = {
        mode: statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True))
        for mode, times in seconds.items()
    }
    return {"seconds": medians, "times_plain": ratios}


def peak_bytes(kind: str, rank: int, device: str, mode: str) -> int:
    """Returns the peak memory of a process that takes three steps in one mode ("load": none)."""
    command = [sys.executable, __file__, "--peak", kind, str(rank), mode, "--device", device]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def high_water_bytes() -> int:
    """Returns the peak memory of this process alone. getrusage starts from that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        kind, rank, mode = given.peak
        trainer = Trainer(kind, int(rank), given.device)
        if mode != "load":
            step = trainer.step(mode)
            for _ in range(3):
                step()
        print(torch.cuda.max_memory_allocated() if given.device != "cpu" else high_water_bytes())
        return
    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread",
        "commit": git_hash(),
        "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(),
        "cells": {},
    }
    lines = ["| model | r | mode | step, s | times plain | peak above loading, MiB |", "|---|---|---|---|---|---|"]
    for kind in ("bert", "llama"):
        for rank in RANKS:
            found = measure(kind, rank, given.device)
            loaded = peak_bytes(kind, rank, given.device, "load")
            found["peak_bytes"] = {mode: peak_bytes(kind, rank, given.device, mode) - loaded for mode in MODES}
            results["cells"][f"{kind} r{rank}"] = found
            for mode in MODES:
                time_s, times, peak = (found[key][mode] for key in ("seconds", "times_plain", "peak_bytes"))
                lines.append(f"| {kind} | {rank} | {mode} | {time_s:.3f} | {times:.2f} | {peak / 2**20:.0f} |")
                print(lines[-1], flush=True)
    name = "" if given.device == "cpu" else "-gpu"
    (HERE / f"results{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / f"table{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
