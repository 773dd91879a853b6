"""K optimisers in one against K of torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsb.training.local import LocalTraining
from fedsb.training.optimizer import clip_by_client, step_by_client

SHAPES = {"core": (1, 3, 3), "bias": (4,), "scalar": ()}
STEPS = 10


def start(K: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {key: torch.randn(K, *shape, generator=draw) for key, shape in SHAPES.items()}


def gradients(K: int, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return {key: torch.randn(K, *shape, generator=draw) * 3.0**step for key, shape in SHAPES.items()}


def by_torch(local: LocalTraining, k: int, K: int, steps: range, factor: float) -> dict[str, Tensor]:
    """Client k alone, with torch.optim; `bias` takes the head's rate."""
    own = {key: nn.Parameter(x[k].clone()) for key, x in start(K).items()}
    groups: list[dict[str, Any]] = [
        {"params": [p for key, p in own.items() if key != "bias"], "lr": local.lr * factor},
        {"params": [own["bias"]], "lr": local.head_lr * factor},
    ]
    if local.optimizer == "adamw":
        torch_one: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=local.weight_decay)
    else:
        torch_one = torch.optim.SGD(groups, momentum=local.momentum)
    for step in steps:
        for key, g in gradients(K, step).items():
            own[key].grad = g[k].clone()
        torch_one.step()
    return {key: p.detach() for key, p in own.items()}


SETTINGS = [
    LocalTraining(lr=0.02, head_lr=0.005, weight_decay=0.1),
    LocalTraining(optimizer="sgd", lr=0.02, head_lr=0.005, momentum=0.9),
    LocalTraining(optimizer="sgd", lr=0.02, head_lr=0.005),
]


@pytest.mark.parametrize("local", SETTINGS, ids=["adamw", "momentum", "sgd"])
def test_one_client_is_torchs_optimiser(local: LocalTraining) -> None:
    parameters, moments = start(1), {}
    for step in range(STEPS):
        step_by_client(local, parameters, gradients(1, step), moments, torch.tensor([0.5]), heads={"bias"})
    for key, expected in by_torch(local, 0, 1, range(STEPS), 0.5).items():
        torch.testing.assert_close(parameters[key][0], expected, rtol=1e-6, atol=1e-6)


def test_a_step_reads_its_counts_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator each read waits for all that was queued there."""
    read, cpu = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: read.append(tensor) or cpu(tensor))
    step_by_client(SETTINGS[0], start(2), gradients(2, 0), {}, torch.ones(2), heads={"bias"})
    assert len(read) == 1
    step_by_client(SETTINGS[1], start(2), gradients(2, 0), {}, torch.ones(2), heads={"bias"})
    assert len(read) == 1


@pytest.mark.parametrize("local", SETTINGS, ids=["adamw", "momentum", "sgd"])
def test_three_clients_with_their_own_steps_and_rates(local: LocalTraining) -> None:
    """The first has done 0, 4 and 7 steps before they meet, at rates of 1, 0.5 and 0.1."""
    before, factors = [0, 4, 7], [1.0, 0.5, 0.1]
    alone: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for k in range(3):
        own, moments = {key: x[k : k + 1].clone() for key, x in start(3).items()}, {}
        for step in range(before[k]):
            g = {key: value[k : k + 1].clone() for key, value in gradients(3, step).items()}
            step_by_client(local, own, g, moments, torch.tensor([factors[k]]), heads={"bias"})
        for key, x in own.items():  # a client that has not begun has no moments
            for name in (f"m.{key}",) if local.optimizer == "sgd" else (f"m.{key}", f"v.{key}"):
                moments.setdefault(name, torch.zeros_like(x))
        alone.append((own, {"steps": torch.zeros(1), **moments}))
    parameters = {key: torch.cat([own[key] for own, _ in alone]) for key in SHAPES}
    joint = {key: torch.cat([moments[key] for _, moments in alone]) for key in alone[0][1]}
    for step in range(3):
        g = {
            key: torch.stack([gradients(3, before[k] + step)[key][k] for k in range(3)]) for key in SHAPES
        }  # each client its own next gradient
        step_by_client(local, parameters, g, joint, torch.tensor(factors), heads={"bias"})
    assert joint["steps"].tolist() == [3, 7, 10]
    for k in range(3):
        for key, expected in by_torch(local, k, 3, range(before[k] + 3), factors[k]).items():
            torch.testing.assert_close(parameters[key][k], expected, rtol=1e-6, atol=1e-6)


def test_first_adam_step_by_hand() -> None:
    """Whatever the gradient, Adam's first step is lr times its sign; decay 0.1 shrinks x = 1 by lr * 0.1 before."""
    x, moments = {"w": torch.tensor([[1.0], [1.0]])}, {}
    local = LocalTraining(lr=0.5, weight_decay=0.1)
    step_by_client(local, x, {"w": torch.tensor([[2.0], [-30.0]])}, moments, torch.ones(2), heads=())
    assert x["w"].flatten().tolist() == pytest.approx([0.95 - 0.5, 0.95 + 0.5], abs=2e-5)


def test_sgd_decay_is_decoupled() -> None:
    """x = 1, g = 0, lr 0.5, decay 0.1: 0.95, and no trace of the decay in the momentum."""
    x, moments = {"w": torch.tensor([[1.0]])}, {}
    local = LocalTraining(optimizer="sgd", lr=0.5, weight_decay=0.1, momentum=0.9)
    step_by_client(local, x, {"w": torch.zeros(1, 1)}, moments, torch.ones(1), heads=())
    assert x["w"].item() == pytest.approx(0.95)
    assert not moments["m.w"].any()


def test_clipping_by_hand() -> None:
    """Client 0 has norm 5 over both tensors, client 1 has 0.5: only the first is scaled, to 1."""
    g = {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[0.0, 4.0], [0.4, 0.0]])}
    assert clip_by_client(g, 1.0).tolist() == pytest.approx([5.0, 0.5])
    assert g["a"].flatten().tolist() == pytest.approx([0.6, 0.3], rel=1e-5)
    assert g["b"].flatten().tolist() == pytest.approx([0.0, 0.8, 0.4, 0.0], rel=1e-5)


@pytest.mark.parametrize("limit", [0.1, 1.0, 7.0, 1e9])
def test_clipping_is_torchs_for_each_client(limit: float) -> None:
    g = {
        key: value * torch.tensor([0.1, 1.0, 10.0]).reshape(3, *[1] * (value.dim() - 1))
        for key, value in start(3).items()
    }
    expected = []
    for k in range(3):
        own = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
        for p, key in zip(own, SHAPES, strict=True):
            p.grad = g[key][k].clone()
        nn.utils.clip_grad_norm_(own, limit)
        expected.append({key: p.grad for p, key in zip(own, SHAPES, strict=True)})
    clip_by_client(g, limit)
    for k in range(3):
        for key in SHAPES:
            torch.testing.assert_close(g[key][k], expected[k][key], rtol=1e-6, atol=1e-7)
