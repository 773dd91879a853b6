"""Laws 1, 2, 3 and 10: what the server's arithmetic must do, on random tensors, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch

from fedsb.adapters.basis import make_basis, random_pair
from fedsb.config.registry import GROUP
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import Method, State, Update
from fedsb.methods.central import Central
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fed_sb_personal import FedSBPersonal
from fedsb.methods.fedex_lora import FedExLoRA
from fedsb.methods.fedit import FedIT
from fedsb.methods.fedrot_lora import FedRotLoRA
from fedsb.methods.fedsa_lora import FedSALoRA
from fedsb.methods.fedsvd import FedSVD
from fedsb.methods.ffa_lora import FFALoRA
from fedsb.methods.flexlora import FlexLoRA
from fedsb.methods.flora import FLoRA
from fedsb.methods.flora_na import FLoRANA
from fedsb.methods.hetlora import HetLoRA
from fedsb.methods.local import Local
from fedsb.methods.ravan import Ravan
from fedsb.methods.rolora import RoLoRA

SHAPES = {"blocks.0.up": (12, 10), "blocks.0.down": (10, 14)}
HEAD = {"head.weight": torch.zeros(3, 10), "head.bias": torch.zeros(3)}
GLOBAL = [
    pytest.param(FedSB(rank=4), id="fed-sb"),
    pytest.param(FedSB(rank=3, blocks=2), id="fed-sb, two blocks"),
    pytest.param(Ravan(rank=2, blocks=3), id="ravan"),
    pytest.param(FedIT(rank=4, alpha=12), id="fedit"),
    pytest.param(FFALoRA(rank=4, alpha=12), id="ffa-lora"),
    pytest.param(RoLoRA(rank=4, alpha=12), id="rolora"),
    pytest.param(FedExLoRA(rank=2, alpha=6), id="fedex-lora"),
    pytest.param(FLoRA(rank=2, alpha=6), id="flora"),
    pytest.param(FlexLoRA(rank=4, alpha=12), id="flexlora"),
    pytest.param(HetLoRA(rank=4, alpha=12, gamma=1.0), id="hetlora"),  # 1: no tail is cut off
    pytest.param(FLoRANA(rank=4, alpha=12), id="flora-na"),
    pytest.param(FedSVD(rank=4, alpha=12), id="fedsvd"),
    pytest.param(FedRotLoRA(rank=4, alpha=12), id="fedrot-lora"),
    pytest.param(Central(rank=4), id="central"),
    pytest.param(Central(rank=4, adapter="factors"), id="central, factors"),
    pytest.param(Central(rank=2, blocks=3, scalars=True), id="central, scalars"),
    pytest.param(Central(rank=4, adapter="factors", alpha=12), id="central, factors with alpha"),
]
OWN = [
    pytest.param(Local(rank=4), id="local"),
    pytest.param(Local(rank=4, adapter="factors"), id="local, factors"),
    pytest.param(Local(rank=2, blocks=3, scalars=True), id="local, scalars"),
    pytest.param(Local(rank=4, adapter="factors", alpha=12), id="local, factors with alpha"),
    pytest.param(FedSALoRA(rank=4, alpha=12), id="fedsa-lora"),
    pytest.param(FedSBPersonal(rank=4, personal=0.25), id="fed-sb-personal"),
]
ALL = [*GLOBAL, *OWN]
PLAIN = ServerOptimizer()


def test_every_method_of_ours_is_here() -> None:
    ours = {p.name for p in entry_points(group=GROUP) if p.value.startswith("fedsb.")}
    assert {case.values[0].spec.id for case in ALL} == ours


def start(method: Method) -> State:
    pairs = [(layer, random_pair(m, n, method.total_rank, 0, layer)) for layer, (m, n) in SHAPES.items()]
    state = method.start(SHAPES, make_basis("random", pairs), HEAD, seed=0)
    double = {key: value.double() for key, value in state.tensors.items()}
    common = {key: value.double() if value.is_floating_point() else value for key, value in state.shared.items()}
    return replace(state, tensors=double, shared=common)


def received(method: Method, state: State) -> dict[str, torch.Tensor]:
    return method.init_client(state.shared, method.broadcast(state), {}, state.round)


def trained(method: Method, state: State, seed: int) -> dict[str, torch.Tensor]:
    """A client's tensors after some training: those that may move are random."""
    draw = torch.Generator().manual_seed(seed)
    tensors = received(method, state)
    moved = method.trainable(tensors, state.round)
    return {
        key: torch.randn(value.shape, generator=draw, dtype=torch.float64) if key in moved else value
        for key, value in tensors.items()
    }


def update(method: Method, state: State, name: str, weight: float, tensors: dict[str, torch.Tensor]) -> Update:
    return Update(client=name, weight=weight, tensors=method.upload(received(method, state), tensors, state.round)[0])


def round_of(method: Method, state: State, seeds: Sequence[int], weights: Sequence[float] | None = None) -> State:
    weights = weights or [1.0] * len(seeds)
    updates = [
        update(method, state, f"c{k}", w, trained(method, state, seed))
        for k, (seed, w) in enumerate(zip(seeds, weights, strict=True))
    ]
    return method.aggregate(state, updates, PLAIN)


def deltas(method: Method, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {layer: f.scale * f.B @ f.A for layer, f in method.export(tensors).items()}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


# --- the laws, from a fresh start and after two rounds of random training ---

ROUNDS = pytest.mark.parametrize("rounds", [0, 1, 2])


def after(method: Method, rounds: int) -> State:
    state = start(method)
    for round in range(rounds):
        state = round_of(method, state, [100 + round] if method.spec.pools_data else [100 + round, 200 + round])
    return state


@ROUNDS
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("method", GLOBAL)
def test_law_1_alike_clients_are_the_identity(method: Method, clients: int, rounds: int) -> None:
    state = after(method, rounds)
    tensors = trained(method, state, seed=1)
    updates = [update(method, state, f"c{k}", 1.0 + k, tensors) for k in range(clients)]
    end = method.model(method.aggregate(state, updates, PLAIN))
    scale = max(1.0, max(float(x.abs().max()) for x in deltas(method, tensors).values()))
    assert worst(deltas(method, end), deltas(method, tensors)) < 1e-11 * scale
    assert worst({k: end[k] for k in HEAD}, {k: tensors[k] for k in HEAD}) < 1e-12


@ROUNDS
@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize("method", GLOBAL)
def test_law_2_exactness(method: Method, clients: int, rounds: int) -> None:
    """Exact methods: the global dW is sum p_k dW_k. The others show their gap; fedit's has rank (c - 1) r at most."""
    clients = 1 if method.spec.pools_data else clients  # a control has one client
    state = after(method, rounds)
    own = [trained(method, state, seed=k) for k in range(clients)]
    weights = [1.0 + 2.5 * k for k in range(clients)]
    updates = [update(method, state, f"c{k}", w, t) for k, (w, t) in enumerate(zip(weights, own, strict=True))]
    end = method.model(method.aggregate(state, updates, PLAIN))
    p = [w / sum(weights) for w in weights]
    ideal = {layer: sum(p_k * deltas(method, t)[layer] for p_k, t in zip(p, own, strict=True)) for layer in SHAPES}
    heads = {key: sum(p_k * t[key] for p_k, t in zip(p, own, strict=True)) for key in HEAD}
    assert worst({key: end[key] for key in HEAD}, heads) < 1e-12
    if method.spec.exact or clients == 1:
        assert worst(deltas(method, end), ideal) < 1e-10
        return
    assert worst(deltas(method, end), ideal) > 0.1
    if method.spec.id == "fedit":
        for layer in SHAPES:
            residual = ideal[layer] - deltas(method, end)[layer]
            assert torch.linalg.matrix_rank(residual, rtol=1e-9) <= (clients - 1) * method.rank


@pytest.mark.parametrize("clients", [2, 3, 6])
def test_law_2_flora_na_lies_between_fedit_and_the_best(clients: int) -> None:
    """Its error is never above FedIT's, nor below the best rank-r one, on clients of any size; and it says so."""
    for seed in range(5):
        errors = {}
        for method in (FedIT(rank=2, alpha=6), FLoRANA(rank=2, alpha=6), FlexLoRA(rank=2, alpha=6)):
            state = start(method)
            weights = [1.0 + 3 * k for k in range(clients)]
            own = [trained(method, state, seed=10 * seed + k) for k in range(clients)]
            updates = [update(method, state, f"c{k}", w, t) for k, (w, t) in enumerate(zip(weights, own, strict=True))]
            end = method.aggregate(state, updates, PLAIN)
            p = [w / sum(weights) for w in weights]
            gap = norm = 0.0
            for layer in SHAPES:
                M = sum(p_k * deltas(method, t)[layer] for p_k, t in zip(p, own, strict=True))
                assert isinstance(M, torch.Tensor)
                gap += float((M - deltas(method, method.model(end))[layer]).square().sum())
                norm += float(M.square().sum())
            errors[method.spec.id] = (gap / norm) ** 0.5
            if isinstance(method, FLoRANA):
                said = end.metrics
        assert errors["flexlora"] <= errors["flora-na"] + 1e-12
        assert errors["flora-na"] < errors["fedit"]
        assert said["error_fedit"] == pytest.approx(errors["fedit"], rel=1e-8)
        assert said["error_flora_na"] == pytest.approx(errors["flora-na"], rel=1e-8)
        assert said["error_best_rank_r"] == pytest.approx(errors["flexlora"], rel=1e-8)


@ROUNDS
@pytest.mark.parametrize("method", GLOBAL)
def test_law_3_order_and_dropping(method: Method, rounds: int) -> None:
    state = after(method, rounds)
    updates = [update(method, state, f"c{k}", 1.0 + k, trained(method, state, seed=k)) for k in range(4)]
    forward = method.model(method.aggregate(state, updates, PLAIN))
    backward = method.model(method.aggregate(state, updates[::-1], PLAIN))
    assert all(torch.equal(forward[key], backward[key]) for key in forward)
    without = method.model(method.aggregate(state, updates[:2] + updates[3:], PLAIN))
    assert worst(deltas(method, forward), deltas(method, without)) > 1e-3


@pytest.mark.parametrize("late", [(), (1,), (1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("method", ALL)
def test_law_10_a_site_that_skipped_rounds_catches_up(method: Method, late: tuple[int, ...]) -> None:
    """A site that follows the broadcasts holds what the server thinks, whichever rounds it missed, bit for bit."""
    state = start(method)
    held = state.shared
    _, kept = method.upload(received(method, state), trained(method, state, seed=9), state.round)
    last = 0
    for round in range(5):
        if round not in late:
            missed = round > 0 and last != round - 1
            held = method.update_shared(held, method.broadcast(state, missed_last_round=missed))
            last = round
            assert held.keys() == state.shared.keys()
            assert all(torch.equal(held[key], state.shared[key]) for key in held)
        state = round_of(method, state, [10 * round] if method.spec.pools_data else [10 * round, 10 * round + 1])
    message = method.broadcast(state, missed_last_round=last != state.round - 1)
    own = method.init_client(method.update_shared(held, message), message, kept, state.round)
    if not method.spec.own_models:
        assert worst(deltas(method, own), deltas(method, method.model(state))) == 0
    else:
        assert worst({k: own[k] for k in kept}, kept) == 0


MIXED = [
    pytest.param(FedSB(rank=4), (4, 2, 3), id="fed-sb"),
    pytest.param(FedSB(rank=3, blocks=2), (6, 2, 4), id="fed-sb, two blocks"),
    pytest.param(FedSBPersonal(rank=4), (4, 2, 3), id="fed-sb-personal"),
    pytest.param(Ravan(rank=2, blocks=3), (6, 2, 4), id="ravan"),
    pytest.param(FLoRA(rank=3, alpha=6), (3, 1, 2), id="flora"),
    pytest.param(FlexLoRA(rank=4, alpha=12), (4, 1, 2), id="flexlora"),
    pytest.param(HetLoRA(rank=4, alpha=12), (4, 1, 2), id="hetlora"),
]


def test_mixed_ranks_are_tried_where_the_facts_say_so() -> None:
    assert {case.values[0].spec.id for case in MIXED} == {
        case.values[0].spec.id for case in ALL if case.values[0].spec.mixed_ranks
    }


@pytest.mark.parametrize(("method", "ranks"), MIXED)
def test_clients_of_mixed_ranks(method: Method, ranks: tuple[int, ...]) -> None:
    """Every client trains and sends at its own rank; an entry is averaged over those that hold it."""
    state = start(method)
    for round in range(2):
        updates, own = [], []
        for k, rank in enumerate(ranks):
            mine = method.at(rank)
            assert mine.total_rank == rank and mine.scale == method.scale
            tensors = mine.init_client(state.shared, method.broadcast(state, total_rank=rank), {}, state.round)
            whole = received(method, state)
            for layer in SHAPES:
                for key, leading in corners(method, whole, layer, rank).items():
                    assert torch.equal(tensors[f"{layer}.{key}"], leading), key
            draw = torch.Generator().manual_seed(10 * round + k)
            for key in sorted(mine.trainable(tensors, round)):
                tensors[key] = torch.randn(tensors[key].shape, generator=draw, dtype=torch.float64)
            for layer, (m, n) in SHAPES.items():
                A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]
                assert (A.shape, B.shape) == ((rank, n), (m, rank))
            sent, _ = mine.upload(tensors, tensors, round)
            sizes = mine.traffic(SHAPES, head=33, clients=3, round=round)
            assert sum(x.numel() for x in sent.values()) == sizes.up + sizes.head
            updates.append(Update(client=f"c{k}", weight=1.0 + k, tensors=sent))
            own.append(mine.export(tensors))
        before, state = state, method.aggregate(state, updates, PLAIN)
        assert {key: x.shape for key, x in state.tensors.items()} == {key: x.shape for key, x in before.tensors.items()}
        M = {
            layer: sum((1.0 + k) / 6 * f[layer].scale * f[layer].B @ f[layer].A for k, f in enumerate(own))
            for layer in SHAPES
        }
        got = deltas(method, method.model(state))
        if method.spec.id == "flora":  # exact whatever the ranks
            assert worst(got, M) < 1e-10
        if method.spec.id == "flexlora":
            for layer in SHAPES:
                U, S, Vh = torch.linalg.svd(M[layer])
                assert torch.allclose(got[layer], (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-10)
        if method.spec.id == "fed-sb" and method.blocks == 1 and not round:  # an entry that one client holds is its own
            for layer in SHAPES:
                R = [u.tensors[f"{layer}.R"][0] for u in updates]
                mean = state.tensors[f"{layer}.R"][0]
                assert torch.allclose(mean[3], R[0][3]) and torch.allclose(mean[:3, 3], R[0][:3, 3])
                assert torch.allclose(mean[2, :3], (R[0][2, :3] + 3 * R[2][2]) / 4)
                assert torch.allclose(mean[:2, :2], (R[0][:2, :2] + 2 * R[1] + 3 * R[2][:2, :2]) / 6)


def corners(method: Method, whole: dict[str, torch.Tensor], layer: str, rank: int) -> dict[str, torch.Tensor]:
    """A smaller client's part of a layer, cut from what the largest gets: always the leading one."""
    A, B = whole[f"{layer}.A"], whole[f"{layer}.B"]
    if method.adapter == "factors":  # flora's is fresh: the same rows of A, drawn shorter
        return {"A": A[:rank], "B": B[:, :rank]}
    R = whole[f"{layer}.R"]
    if method.spec.id == "ravan":  # the first blocks
        return {"A": A[:rank], "B": B[:, :rank], "R": R[: rank // method.rank]}
    h, full = len(R), len(R[0])
    r = rank // h  # of every block the leading rows, columns and corner
    rows = [i * full + j for i in range(h) for j in range(r)]
    return {"A": A[rows], "B": B[:, rows], "R": R[:, :r, :r]}


def test_hetlora_prunes_a_tail_that_shrank() -> None:
    """gamma = 0.5 of rank 4 leaves 2; the server hands the client the leading two rows from then on."""
    method = HetLoRA(rank=4, gamma=0.5)
    state = after(method, 1)
    tensors = received(method, state)
    smaller = {key: x * 0.5 for key, x in tensors.items()}
    larger = {key: x * 2.0 for key, x in tensors.items()}
    sent = {name: method.upload(tensors, t, 1)[0] for name, t in (("a", smaller), ("b", larger))}
    assert [int(sent[name]["rank"]) for name in "ab"] == [2, 4]
    assert not sent["a"]["blocks.0.up.A"][2:].any() and sent["a"]["blocks.0.up.A"][:2].all()
    assert not sent["a"]["blocks.0.up.B"][:, 2:].any() and sent["b"]["blocks.0.up.B"].all()
    end = method.aggregate(state, [Update(client=n, weight=1, tensors=t) for n, t in sent.items()], PLAIN)
    assert end.total_ranks["a"] == 2 and end.total_ranks["b"] == 4
    assert len(method.broadcast(end, total_rank=2)["blocks.0.up.A"]) == 2
    one = torch.ones(1, 4, 3)
    penalty = method.penalty({"x.A": one, "x.B": one.mT})  # ||(3 x 2 ones)|| ||(2 x 3 ones)|| = sqrt 6 sqrt 6
    assert penalty is not None and penalty.tolist() == pytest.approx([6 * method.penalty_weight])


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
