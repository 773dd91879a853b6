"""K optimisers in one matrix against K of torch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsb.adapters.layout import Layout
from fedsb.training.buffers import ClientBuffers
from fedsb.training.local import LocalTraining
from fedsb.training.optimizer import StepSizes, clip_rows, nearest_orthogonal, step_rows
from support.accelerator import accelerator

SHAPES = {"core": (1, 3, 3), "bias": (4,), "scalar": ()}
LAYOUT = Layout(tuple(sorted(SHAPES.items())))
HEADS = frozenset({"bias"})
STEPS = 10


def start(K: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {key: torch.randn(K, *shape, generator=draw) for key, shape in SHAPES.items()}


def gradients(K: int, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return {key: torch.randn(K, *shape, generator=draw) * 3.0**step for key, shape in SHAPES.items()}


def buffers_of(clients: list[dict[str, Tensor]], moments: list[dict[str, Tensor]] | None = None) -> ClientBuffers:
    layout = Layout.of(clients[0])
    buffers = ClientBuffers(layout, len(clients), next(iter(clients[0].values())).device)
    buffers.read(clients, moments or [{}] * len(clients))
    return buffers


def client(tensors: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    return {key: x[k] for key, x in tensors.items()}


def fill(buffers: ClientBuffers, k: int, tensors: dict[str, Tensor]) -> None:
    """Sets client k's gradients."""
    for key, view in buffers.layout.views(buffers.gradients[k]).items():
        view.copy_(tensors[key])


def by_torch(local: LocalTraining, k: int, K: int, steps: range, factor: float) -> dict[str, Tensor]:
    """Client k alone, with torch.optim; `bias` takes the head's rate."""
    own = {key: nn.Parameter(x[k].clone()) for key, x in start(K).items()}
    if local.optimizer == "muon":
        others = by_torch(replace(local, optimizer="adamw"), k, K, steps, factor)
        return {
            **others,
            "core": by_muon(local, own["core"], [gradients(K, step)["core"][k] for step in steps], factor),
        }
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


def by_muon(local: LocalTraining, core: Tensor, each: list[Tensor], factor: float) -> Tensor:
    """One core, by the definition: numpy's singular vectors, and each singular value through the polynomial."""
    x, m, lr = core.detach().double().numpy()[0], np.zeros((3, 3)), local.lr * factor
    for g in (g.double().numpy()[0] for g in each):
        m = 0.9 * m + 0.1 * g
        U, S, Vh = np.linalg.svd(0.9 * m + 0.1 * g)
        S /= np.linalg.norm(S)
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        x = x * (1 - lr * local.weight_decay) - lr * np.sqrt(3) * U @ np.diag(S) @ Vh
    return torch.from_numpy(x)[None].float()


SETTINGS = [
    LocalTraining(lr=0.02, head_lr=0.005, weight_decay=0.1),
    LocalTraining(optimizer="muon", lr=0.02, head_lr=0.005, weight_decay=0.1),
    LocalTraining(optimizer="sgd", lr=0.02, head_lr=0.005, momentum=0.9),
    LocalTraining(optimizer="sgd", lr=0.02, head_lr=0.005),
]


@pytest.mark.parametrize("local", SETTINGS, ids=["adamw", "muon", "momentum", "sgd"])
def test_one_client_is_torchs_optimiser(local: LocalTraining) -> None:
    buffers = buffers_of([client(start(1), 0)])
    sizes = StepSizes.of(local, buffers, HEADS, [[0.5]] * STEPS, [0])
    for step in range(STEPS):
        fill(buffers, 0, client(gradients(1, step), 0))
        step_rows(local, buffers, 1, sizes, step)
    ((tensors, _),) = buffers.write(1)
    for key, expected in by_torch(local, 0, 1, range(STEPS), 0.5).items():
        torch.testing.assert_close(tensors[key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("local", SETTINGS, ids=["adamw", "muon", "momentum", "sgd"])
def test_a_step_reads_nothing_from_the_device(local: LocalTraining) -> None:
    """On an accelerator each read waits for all that was queued there."""
    with accelerator() as device:
        buffers = buffers_of([{key: x[k].to("pretend") for key, x in start(2).items()} for k in range(2)])
        sizes = StepSizes.of(local, buffers, HEADS, [[1.0, 0.5]], [0, 0])
        device.clear()
        clip_rows(buffers.gradients, 1.0)
        step_rows(local, buffers, 2, sizes, 0)
        assert not device.waits and device.kernels


@pytest.mark.parametrize("local", SETTINGS, ids=["adamw", "muon", "momentum", "sgd"])
def test_three_clients_with_their_own_steps_and_rates(local: LocalTraining) -> None:
    """The first has done 0, 4 and 7 steps before they meet, at rates of 1, 0.5 and 0.1."""
    before, factors = [0, 4, 7], [1.0, 0.5, 0.1]
    alone: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for k in range(3):
        own = buffers_of([client(start(3), k)])
        sizes = StepSizes.of(local, own, HEADS, [[factors[k]]] * before[k], [0])
        for step in range(before[k]):
            fill(own, 0, client(gradients(3, step), k))
            step_rows(local, own, 1, sizes, step)
        alone += own.write(1)
    alone[0] = alone[0][0], {}  # a client that has not begun has no moments
    joint = buffers_of([tensors for tensors, _ in alone], [moments for _, moments in alone])
    sizes = StepSizes.of(local, joint, HEADS, [factors] * 3, before)
    for step in range(3):
        for k in range(3):  # each client its own next gradient
            fill(joint, k, client(gradients(3, before[k] + step), k))
        step_rows(local, joint, 3, sizes, step)
    for k, (tensors, _) in enumerate(joint.write(3)):
        for key, expected in by_torch(local, k, 3, range(before[k] + 3), factors[k]).items():
            torch.testing.assert_close(tensors[key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (4, 30), (30, 4), (1, 5)])
def test_the_nearest_orthogonal_matrix(shape: tuple[int, int]) -> None:
    """U V' up to singular values of 0.7 to 1.2, whatever the scale; zeros stay zeros."""
    draw = torch.Generator().manual_seed(0)
    M = torch.randn(5, *shape, generator=draw) * torch.tensor([1e-6, 1.0, 1e6, 3.0, 0.1])[:, None, None]
    found = nearest_orthogonal(M)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    inner = U.mT @ found @ Vh.mT  # diagonal where the singular vectors are the same
    values = inner.diagonal(dim1=-2, dim2=-1)
    clear = 0.05 * S[:, :1] < S  # smaller ones have not grown to 1 yet
    assert ((values > 0.65) & (values < 1.25))[clear].all()
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert torch.equal(nearest_orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_a_client_that_has_finished_its_steps_stays_as_it_is() -> None:
    """A step of the first client alone: the second's values and moments do not move."""
    buffers = buffers_of([client(start(2), k) for k in range(2)])
    fill(buffers, 0, client(gradients(2, 0), 0))
    fill(buffers, 1, client(gradients(2, 0), 1))
    before = [matrix[1].clone() for matrix in (buffers.values, buffers.m, buffers.v)]
    first = buffers.values[0].clone()
    step_rows(SETTINGS[0], buffers, 1, StepSizes.of(SETTINGS[0], buffers, HEADS, [[1.0, 1.0]], [0, 0]), 0)
    assert (buffers.values[0] != first).all()
    for matrix, expected in zip((buffers.values, buffers.m, buffers.v), before, strict=True):
        assert torch.equal(matrix[1], expected)


def two_values(first: float, second: float, local: LocalTraining, gradient: list[float]) -> ClientBuffers:
    """One step of clients with one value each."""
    buffers = buffers_of([{"w": torch.tensor([x])} for x in (first, second)])
    buffers.gradients.copy_(torch.tensor(gradient).unsqueeze(1))
    step_rows(local, buffers, 2, StepSizes.of(local, buffers, frozenset(), [[1.0, 1.0]], [0, 0]), 0)
    return buffers


def test_first_adam_step_by_hand() -> None:
    """Whatever the gradient, Adam's first step is lr times its sign; decay 0.1 shrinks x = 1 by lr * 0.1 before."""
    buffers = two_values(1.0, 1.0, LocalTraining(lr=0.5, weight_decay=0.1), [2.0, -30.0])
    assert buffers.values.flatten().tolist() == pytest.approx([0.95 - 0.5, 0.95 + 0.5], abs=2e-5)


def test_sgd_decay_is_decoupled() -> None:
    """x = 1, g = 0, lr 0.5, decay 0.1: 0.95, and nothing of the decay in the momentum."""
    local = LocalTraining(optimizer="sgd", lr=0.5, weight_decay=0.1, momentum=0.9)
    buffers = two_values(1.0, 2.0, local, [0.0, 0.0])
    assert buffers.values.flatten().tolist() == pytest.approx([0.95, 1.9])
    assert not buffers.m.any()


def test_clipping_by_hand() -> None:
    """Client 0 has norm 5 over both tensors, client 1 has 0.5: only the first is scaled, to 1."""
    g = torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.4, 0.0]])
    assert clip_rows(g, 1.0).tolist() == pytest.approx([5.0, 0.5])
    assert g[0].tolist() == pytest.approx([0.6, 0.0, 0.8], rel=1e-5)
    assert g[1].tolist() == pytest.approx([0.3, 0.4, 0.0], rel=1e-5)


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
    rows = torch.stack([LAYOUT.flatten(client(g, k)) for k in range(3)])
    clip_rows(rows, limit)
    for k in range(3):
        for key, x in LAYOUT.views(rows[k]).items():
            torch.testing.assert_close(x, expected[k][key], rtol=1e-6, atol=1e-7)
