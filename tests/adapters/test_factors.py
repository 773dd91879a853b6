"""The two-factor layer against the dense weight W0 + s B A."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedsb.adapters.factors import FactorLinear, factor_forward, factor_start
from fedsb.adapters.layer import Routing, RoutingError

M, N, R, SCALE = 12, 10, 3, 0.5


def drawn(K_A: int, K_B: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(K_A, R, N).double(), torch.randn(K_B, M, R).double()


def test_by_hand() -> None:
    """x = (1, 2), A = (3, 4): 11; B = (1, 2)': (11, 22); s = 2."""
    A, B = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0], [2.0]]])
    assert factor_forward(torch.tensor([[1.0, 2.0]]), A, B, 2.0).tolist() == [[22.0, 44.0]]


@pytest.mark.parametrize("shape", [(), (5,), (3, 5)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize(("K_A", "K_B"), [(1, 1), (3, 3), (1, 3), (3, 1)])
def test_forward_equals_the_dense_weight(K_A: int, K_B: int, shape: tuple[int, ...]) -> None:
    """A factor that all clients share has an axis of one client."""
    A, B = drawn(K_A, K_B)
    K = max(K_A, K_B)
    x = torch.randn(2 * K, *shape, N).double()
    got = factor_forward(x, A, B, SCALE)
    assert got.shape == (2 * K, *shape, M)
    for k in range(K):
        W = SCALE * B[k % K_B] @ A[k % K_A]
        torch.testing.assert_close(got[2 * k : 2 * k + 2], x[2 * k : 2 * k + 2] @ W.T)


def test_an_expert_that_got_no_tokens() -> None:
    A, B = drawn(1, 1)
    assert factor_forward(torch.zeros(0, N).double(), A, B, SCALE).shape == (0, M)


def test_gradients_are_those_of_the_dense_weight() -> None:
    """g_B = s G A', g_A = s B' G, each client's of its own rows; a shared A gets their sum."""
    A, B = drawn(1, 2)
    x, target = torch.randn(4, N).double(), torch.randn(4, M).double()
    A.requires_grad_(), B.requires_grad_()
    (factor_forward(x, A, B, SCALE) - target).square().sum().backward()
    shared = torch.zeros(R, N).double()
    for k in range(2):
        W = (SCALE * B[k] @ A[0]).detach().requires_grad_()
        (x[2 * k : 2 * k + 2] @ W.T - target[2 * k : 2 * k + 2]).square().sum().backward()
        torch.testing.assert_close(B.grad[k], SCALE * W.grad @ A[0].detach().T)
        shared += SCALE * B[k].detach().T @ W.grad
    torch.testing.assert_close(A.grad[0], shared)


def test_bfloat16_base_and_float32_factors() -> None:
    layer = FactorLinear(nn.Linear(N, M).to(torch.bfloat16), scale=SCALE, routing=Routing(), key="layer")
    A, B = drawn(1, 1)
    layer.A, layer.B = nn.Parameter(A.float()), nn.Parameter(B.float())
    y = layer(torch.randn(4, 3, N, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.A.grad.dtype == layer.B.grad.dtype == torch.float32


def test_rows_that_are_not_the_batch_are_refused_by_name() -> None:
    A, B = drawn(2, 2)
    layer = FactorLinear(nn.Linear(N, M).double(), scale=SCALE, routing=Routing(rows=4), key="layer")
    layer.A, layer.B = nn.Parameter(A), nn.Parameter(B)
    layer(torch.randn(4, N).double())
    with pytest.raises(RoutingError, match="'layer' receives 8 rows, and the batch has 4"):
        layer(torch.randn(8, N).double())


def test_start() -> None:
    """B = 0; A uniform in +-1/sqrt(n), so of variance 1/(3n), another for each layer and seed, in any company."""
    start = factor_start({"a": (20, 400), "b": (20, 400)}, 8, seed=0)
    assert start["a.A"].dtype == torch.float32 and start["a.A"].shape == (8, 400)
    assert not start["a.B"].any() and start["a.B"].shape == (20, 8)
    assert float(start["a.A"].abs().max()) <= 0.05
    assert float(start["a.A"].var()) == pytest.approx(1 / 1200, rel=0.05)
    assert not torch.equal(start["a.A"], start["b.A"])
    assert not torch.equal(start["a.A"], factor_start({"a": (20, 400)}, 8, seed=1)["a.A"])
    assert torch.equal(start["b.A"], factor_start({"b": (20, 400)}, 8, seed=0)["b.A"])
