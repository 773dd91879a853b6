"""Laws 1, 2, 3 and 10: what the server's arithmetic must do, on random tensors, without any model."""

from __future__ import annotations

import pytest
import torch

from fedsb.adapters.basis import make_basis, random_pair
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.central import Central
from fedsb.methods.contract import Method, State, Update
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT
from fedsb.methods.local import Local

SHAPES = {"blocks.0.up": (12, 10), "blocks.0.down": (10, 14)}
HEAD = {"head.weight": torch.zeros(3, 10), "head.bias": torch.zeros(3)}
GLOBAL = [
    pytest.param(FedSB(rank=4), id="fed-sb"),
    pytest.param(FedSB(rank=3, blocks=2), id="fed-sb, two blocks"),
    pytest.param(FedIT(rank=4, alpha=12), id="fedit"),
    pytest.param(Central(rank=4), id="central"),
    pytest.param(Central(rank=4, adapter="factors"), id="central, factors"),
]
ALL = [
    *GLOBAL,
    pytest.param(Local(rank=4), id="local"),
    pytest.param(Local(rank=4, adapter="factors"), id="local, factors"),
]
PLAIN = ServerOptimizer()


def start(method: Method) -> State:
    pairs = [(layer, random_pair(m, n, method.total_rank, 0, layer)) for layer, (m, n) in SHAPES.items()]
    state = method.start(SHAPES, make_basis("random", pairs), HEAD, seed=0)
    double = {key: value.double() for key, value in state.tensors.items()}
    return State(tensors=double, common={key: value.double() for key, value in state.common.items()})


def trained(method: Method, state: State, seed: int) -> dict[str, torch.Tensor]:
    """A client's tensors after some training: those that may move are random."""
    draw = torch.Generator().manual_seed(seed)
    tensors = method.receive(state.common, method.broadcast(state), {})
    moved = method.trainable(tensors, state.round)
    return {
        key: torch.randn(value.shape, generator=draw, dtype=torch.float64) if key in moved else value
        for key, value in tensors.items()
    }


def update(method: Method, state: State, name: str, weight: float, tensors: dict[str, torch.Tensor]) -> Update:
    received = method.receive(state.common, method.broadcast(state), {})
    return Update(client=name, weight=weight, tensors=method.upload(received, tensors)[0])


def deltas(method: Method, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {layer: f.scale * f.B @ f.A for layer, f in method.export(tensors).items()}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("method", GLOBAL)
def test_law_1_alike_clients_are_the_identity(method: Method, clients: int) -> None:
    state = start(method)
    tensors = trained(method, state, seed=1)
    updates = [update(method, state, f"c{k}", 1.0 + k, tensors) for k in range(clients)]
    after = method.model(method.aggregate(state, updates, PLAIN))
    assert worst(deltas(method, after), deltas(method, tensors)) < 1e-12
    assert worst({k: after[k] for k in HEAD}, {k: tensors[k] for k in HEAD}) < 1e-12


@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize("method", GLOBAL)
def test_law_2_exactness(method: Method, clients: int) -> None:
    """Exact methods: the global dW is sum p_k dW_k. The others show their gap, of rank at most (c - 1) r."""
    clients = 1 if method.facts.pools_data else clients  # a control has one client
    state = start(method)
    own = [trained(method, state, seed=k) for k in range(clients)]
    weights = [1.0 + 2.5 * k for k in range(clients)]
    updates = [update(method, state, f"c{k}", w, t) for k, (w, t) in enumerate(zip(weights, own, strict=True))]
    after = deltas(method, method.model(method.aggregate(state, updates, PLAIN)))
    p = [w / sum(weights) for w in weights]
    ideal = {layer: sum(p_k * deltas(method, t)[layer] for p_k, t in zip(p, own, strict=True)) for layer in SHAPES}
    if method.facts.exact or clients == 1:
        assert worst(after, ideal) < 1e-10
    else:
        assert worst(after, ideal) > 0.1
        for layer in SHAPES:
            residual = ideal[layer] - after[layer]
            assert torch.linalg.matrix_rank(residual, rtol=1e-9) <= (clients - 1) * method.rank


@pytest.mark.parametrize("method", GLOBAL)
def test_law_3_order_and_dropping(method: Method) -> None:
    state = start(method)
    updates = [update(method, state, f"c{k}", 1.0 + k, trained(method, state, seed=k)) for k in range(4)]
    forward = method.aggregate(state, updates, PLAIN).tensors
    backward = method.aggregate(state, updates[::-1], PLAIN).tensors
    assert all(torch.equal(forward[key], backward[key]) for key in forward)
    without = method.aggregate(state, updates[:2] + updates[3:], PLAIN).tensors
    assert all(not torch.equal(forward[key], without[key]) for key in without)


@pytest.mark.parametrize("method", ALL)
def test_law_10_a_client_that_skipped_rounds_catches_up(method: Method) -> None:
    """What a client ends with does not depend on what it kept from a round long ago, unless the model is its own."""
    state = start(method)
    received = method.receive(state.common, method.broadcast(state), {})
    _, kept_long_ago = method.upload(received, trained(method, state, seed=9))
    for round in range(3):
        updates = [update(method, state, f"c{k}", 1.0, trained(method, state, seed=10 * round + k)) for k in range(2)]
        state = method.aggregate(state, updates, PLAIN)
    late = method.receive(state.common, method.broadcast(state), kept_long_ago)
    if method.facts.global_model:
        assert worst(deltas(method, late), deltas(method, method.model(state))) == 0
    else:
        assert worst({k: late[k] for k in kept_long_ago}, kept_long_ago) == 0


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_a_server_optimizer_moves_towards_the_mean(kind: str) -> None:
    """From 0 with every client at 1: momentum steps lr (0.5 each), and 0.5 + 0.9 * 0.5 ... of what is left."""
    method = FedSB(rank=4)
    state = start(method)
    ones = {key: torch.ones_like(value) for key, value in state.tensors.items()}
    server = ServerOptimizer(kind=kind, lr=0.5, beta1=0.9, beta2=0.99, tau=1e-3)  # type: ignore[arg-type]
    first = method.aggregate(state, [Update(client="c", weight=1, tensors=ones)], server)
    key = "blocks.0.up.R"
    expected = 0.5 if kind == "momentum" else 0.5 * 0.1 / (0.01**0.5 + 1e-3)
    assert first.tensors[key].mean().item() == pytest.approx(expected, rel=1e-6)
    second = method.aggregate(first, [Update(client="c", weight=1, tensors=ones)], server)
    if kind == "momentum":  # m = 0.9 * 1 + (1 - 0.5) = 1.4
        assert second.tensors[key].mean().item() == pytest.approx(0.5 + 0.5 * 1.4, rel=1e-6)
    assert set(second.server) == {
        f"{m}.{k}" for k in state.tensors for m in ("m", "v")[: 1 if kind == "momentum" else 2]
    }
