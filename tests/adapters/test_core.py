"""The core layer against the dense weight W0 + s sum_i B_i R_i A_i, and what it keeps for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fedsb.adapters.basis import random_pair
from fedsb.adapters.core import CoreLinear, core_delta, core_forward, core_left
from fedsb.adapters.layer import Routing, RoutingError
from fedsb.models.layers import base_weight, linear_shape

M, N, R = 12, 10, 2
SCALE = 1.5


def dense(A: Tensor, B: Tensor, R_hrr: Tensor, scale: float) -> Tensor:
    """s sum_i B_i R_i A_i, block by block."""
    h, r, _ = R_hrr.shape
    return scale * sum(B[:, i * r : (i + 1) * r] @ R_hrr[i] @ A[i * r : (i + 1) * r] for i in range(h))


def drawn(h: int, K: int, *, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, R and an input of 2 rows a client, float64."""
    torch.manual_seed(0)
    A, B = torch.randn(h * R, N).double(), torch.randn(M, h * R).double()
    return A, B, torch.randn(K, h, R, R).double(), torch.randn(2 * K, *shape, N).double()


def layer_of(base: nn.Module, A: Tensor, B: Tensor, R_Khrr: Tensor, scale: float = SCALE) -> CoreLinear:
    layer = CoreLinear(base, scale=scale, routing=Routing(), key="layer")
    layer.A, layer.B, layer.R = A, B, nn.Parameter(R_Khrr)
    return layer


def test_by_hand() -> None:
    """x = (1, 2), A = (3, 4): A x = 11; R = 5: 55; B = (1, 2)': (55, 110); s = 1/2."""
    x, A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    assert core_forward(x, A, B, torch.full((1, 1, 1, 1), 5.0), 0.5).tolist() == [[27.5, 55.0]]


@pytest.mark.parametrize("shape", [(), (5,), (3, 5)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("h", [1, 2, 3])
def test_forward_equals_the_dense_weight(h: int, K: int, shape: tuple[int, ...]) -> None:
    """Every client's two rows meet its own R and no other's."""
    A, B, R_Khrr, x = drawn(h, K, shape=shape)
    got = core_forward(x, A, B, R_Khrr, SCALE)
    for k in range(K):
        rows = slice(2 * k, 2 * k + 2)
        torch.testing.assert_close(got[rows], x[rows] @ dense(A, B, R_Khrr[k], SCALE).T)


def test_one_client_and_one_block_take_three_plain_products() -> None:
    A, B, R_Khrr, x = drawn(1, 1, shape=(5,))
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Seen():
        core_forward(x, A, B, R_Khrr, SCALE)
    assert seen.count("mm") == 3 and not {"bmm", "clone", "_unsafe_view_copy", "copy_"} & set(seen)


def test_an_expert_that_got_no_tokens() -> None:
    A, B, R_Khrr, _ = drawn(2, 1)
    assert core_forward(torch.zeros(0, N).double(), A, B, R_Khrr, SCALE).shape == (0, M)


@pytest.mark.parametrize("h", [1, 2, 3])
def test_delta_and_left_equal_the_dense_weight(h: int) -> None:
    A, B, R_Khrr, _ = drawn(h, 1)
    torch.testing.assert_close(core_delta(A, B, R_Khrr[0], SCALE), dense(A, B, R_Khrr[0], SCALE))
    torch.testing.assert_close(SCALE * core_left(B, R_Khrr[0]) @ A, dense(A, B, R_Khrr[0], SCALE))


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("h", [1, 2, 3])
def test_gradient_is_the_projected_gradient_of_the_dense_weight(h: int, K: int) -> None:
    """g_R = s B' G A', its blocks on the diagonal; G from autograd on the dense weight. Clients do not mix."""
    A, B, R_Khrr, x = drawn(h, K, shape=(5,))
    torch.manual_seed(1)
    target = torch.randn(2 * K, 5, M).double()
    R_Khrr.requires_grad_()
    (core_forward(x, A, B, R_Khrr, SCALE) - target).square().sum().backward()
    assert R_Khrr.grad is not None
    for k in range(K):
        rows = slice(2 * k, 2 * k + 2)
        W = dense(A, B, R_Khrr[k].detach(), SCALE).requires_grad_()
        (x[rows] @ W.T - target[rows]).square().sum().backward()
        projected = SCALE * B.T @ W.grad @ A.T
        for i in range(h):
            block = slice(i * R, (i + 1) * R)
            torch.testing.assert_close(R_Khrr.grad[k, i], projected[block, block])


def test_the_input_gets_the_gradient_of_the_dense_weight() -> None:
    A, B, R_Khrr, x = drawn(2, 3, shape=(5,))
    x.requires_grad_()
    core_forward(x, A, B, R_Khrr, SCALE).sum().backward()
    for k in range(3):
        expected = dense(A, B, R_Khrr[k], SCALE).sum(0).expand(2, 5, N)
        torch.testing.assert_close(x.grad[2 * k : 2 * k + 2], expected)


def test_an_sgd_step_on_R_is_the_full_step_projected() -> None:
    """With orthonormal B, A and s = 1: dW = -lr (B B') G (A' A)."""
    A, B = (t.double() for t in random_pair(M, N, 4, 0, "layer"))
    _, _, _, x = drawn(2, 1)
    W = torch.zeros(M, N, dtype=torch.float64, requires_grad=True)
    target = torch.ones(2, M).double()
    (x @ W.T - target).square().sum().backward()
    R0 = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (core_forward(x, A, B, R0, 1.0) - target).square().sum().backward()
    step = core_delta(A, B, -0.1 * R0.grad[0], 1.0)
    torch.testing.assert_close(step, -0.1 * B @ B.T @ W.grad @ A.T @ A, rtol=1e-5, atol=1e-6)  # A and B are of float32


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("h", [1, 2])
def test_autograd_keeps_only_x_A(h: int, K: int) -> None:
    """120 tokens, 96 in, 80 out, rank 2: of all that grows with the tokens, h r values a token are kept, once."""
    m, n, b, t = 80, 96, 2, 60
    A, B = random_pair(m, n, h * R, 0, "layer")
    layer = layer_of(nn.Linear(n, m).requires_grad_(False), A, B, torch.randn(K, h, R, R))
    x = torch.randn(b, t, n, requires_grad=True)  # as if lower layers train
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    frozen = {t.untyped_storage().data_ptr() for t in (A, B, layer.base.weight, layer.R)}
    of_tokens = [size for storage, size in kept.items() if storage not in frozen]
    assert sorted(of_tokens) == [K * h * R * R, b * t * h * R]  # the scaled core, and what grows with the tokens
    y.sum().backward()


def test_bfloat16_base_and_float32_core() -> None:
    """R, its gradient and so its steps are float32: a step of 1e-4 on an entry of 1 is not lost."""
    torch.manual_seed(0)
    A, B = random_pair(M, N, 4, 0, "layer")
    layer = layer_of(nn.Linear(N, M).to(torch.bfloat16).requires_grad_(False), A, B, torch.ones(1, 1, 4, 4), 1.0)
    x = torch.randn(6, 3, N, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.R is not None and layer.R.grad is not None
    assert layer.R.dtype == layer.R.grad.dtype == torch.float32
    G = torch.ones(18, M).T @ x.reshape(18, N).float()
    torch.testing.assert_close(layer.R.grad[0, 0], B.T @ G @ A.T, rtol=0.05, atol=0.1)
    exact = x.float() @ (layer.base.weight.float() + core_delta(A, B, layer.R.detach()[0], 1.0)).T
    torch.testing.assert_close(y.float(), exact + layer.base.bias.float(), rtol=0.05, atol=0.05)
    with torch.no_grad():
        layer.R -= 1e-4
    assert float(layer.R.detach().max()) < 1.0


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_layer_adds_to_its_base(kind: str) -> None:
    """GPT-2's Conv1D stores W0 as (in, out)."""
    torch.manual_seed(0)
    base = (nn.Linear(N, M) if kind == "linear" else Conv1D(M, N)).double()
    assert linear_shape(base) == (M, N)
    assert base_weight(base).shape == (M, N)
    A, B, R_Khrr, x = drawn(2, 1, shape=(5,))
    W = base_weight(base) + dense(A, B, R_Khrr[0], SCALE)
    torch.testing.assert_close(layer_of(base, A, B, R_Khrr)(x), x @ W.T + base.bias)


def test_rows_that_are_not_the_batch_are_refused_by_name() -> None:
    A, B, R_Khrr, x = drawn(1, 2)
    layer = layer_of(nn.Linear(N, M).double(), A, B, R_Khrr)
    layer.routing.rows = 4
    layer(x)
    with pytest.raises(RoutingError, match=r"'layer' receives 20 rows, and the batch has 4.*clients_per_forward = 1"):
        layer(x.repeat(5, 1))  # tokens, flattened
