"""The lossy link: what sites hold, what is owed, when it is forgotten, and that it matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsb.adapters.basis import basis_hash, make_basis, random_pair
from fedsb.config.training import ServerConfig
from fedsb.config.registry import build_method
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import Method, State
from fedsb.config.training import Codec
from fedsb.protocol.compressor import Compressor, unmoved
from fedsb.protocol.payload import Payload, pack, unpack
from fedsb.protocol.tensors import to_arrays, to_tensors, under, within
from fedsb.server.validation import rules, validate_updates
from fedsb.utils.rng import keyed_generator

LAYER = "layer"
SHAPES = {LAYER: (24, 20)}
CLIENTS = ("a", "b", "c", "d")
LOSSY: tuple[Codec, ...] = ("bfloat16", "int8", "int4")
METHODS = [
    "fed-sb",
    "ravan",
    "fedit",
    "ffa-lora",
    "rolora",
    "fedsa-lora",
    "flexlora",
    "flora-na",
    "fedsvd",
    "fedrot-lora",
    "hetlora",
    "flora",
    "fedex-lora",
]


def link(codec: Codec, seed: int = 0) -> Compressor:
    return Compressor(run="run", codec=codec, seed=seed)


def start(name: str, rank: int = 4) -> tuple[Method, State]:
    method = build_method(name, {"rank": rank, **({"blocks": 2} if name == "ravan" else {})})
    pairs = [(layer, random_pair(m, n, method.total_rank, 0, layer)) for layer, (m, n) in SHAPES.items()]
    basis = make_basis("random", pairs) if method.adapter == "core" else None
    head = {"head.weight": torch.from_numpy(keyed_generator(0, "head").standard_normal((3, 30)).astype(np.float32))}
    return method, method.start(SHAPES, basis, head, 0)


def shaken(tensors: dict[str, Tensor], moving: frozenset[str], *key: int | str, by: float = 0.1) -> dict[str, Tensor]:
    """Local training, as far as a link is concerned."""
    draw = keyed_generator(0, *key)
    return {
        name: x + by * torch.from_numpy(draw.standard_normal(x.shape).astype(np.float32)) if name in moving else x
        for name, x in sorted(tensors.items())
    }


def one_round(
    wire: Compressor, method: Method, state: State, kept: dict[str, Any], cohort: tuple[str, ...] = CLIENTS
) -> State:
    """A round over the link, every client up to date; `kept` is changed."""
    heard = wire.heard(method, state)
    replies = []
    for client in cohort:
        rank = state.total_ranks.get(client)
        mine = method if rank is None else method.at(rank)
        _, message = wire.down(method, state, heard, basis=basis_hash(heard.shared), late=False, rank=rank)
        own = mine.init_client(heard.shared, message, within("method", kept.get(client, {})), state.round)
        trained = shaken(own, mine.trainable(own, state.round), client, state.round)
        sent, keep = mine.upload(own, trained, state.round)
        payload = Payload(
            kind="update",
            run="run",
            round=state.round,
            client=client,
            samples=5,
            basis=basis_hash(heard.shared),
            tensors=to_arrays(sent),
        )
        data, lost = wire.up(method, payload, unmoved(mine, heard.shared, message, state.round), kept.get(client, {}))
        kept[client] = {**under("method", keep), **lost}
        replies.append((client, data))
    updates, dropped = validate_updates(replies, rules(method, heard, ServerConfig(codec=wire.codec), "run", {}))
    assert not dropped
    return wire.settled(method, state, heard, method.aggregate(heard, updates, ServerOptimizer()))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in one.items())


# --- what sites hold ---


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("name", METHODS)
def test_a_site_that_hears_every_broadcast_holds_what_the_server_thinks(name: str, codec: Codec) -> None:
    """Bit for bit, from the envelopes alone: h in its tensors, and what is common to all."""
    wire, (method, state) = link(codec), start(name)
    kept: dict[str, Any] = {}
    held: dict[str, Tensor] = {}
    common = state.shared
    for _ in range(4):
        heard = wire.heard(method, state)
        envelope = unpack(wire.down(method, state, heard, basis=basis_hash(heard.shared), late=False, rank=None)[0])
        news = to_tensors(envelope.tensors)
        before = {**common, **held}  # RoLoRA's factors are common before they are told
        message = news if envelope.codec == "float32" else {key: before[key] + c for key, c in news.items()}
        held |= message
        common = method.update_shared(common, message)
        assert same(common, heard.shared) and envelope.basis == basis_hash(common)
        assert all(torch.equal(held[key], heard.tensors[key]) for key in held if key in heard.tensors)
        late = unpack(wire.down(method, state, heard, basis=basis_hash(heard.shared), late=True, rank=None)[0])
        assert late.codec == "float32"
        mine = method.init_client(common, message, {}, state.round)
        theirs = method.init_client(
            method.update_shared(heard.shared, to_tensors(late.tensors)), to_tensors(late.tensors), {}, state.round
        )
        assert same(mine, theirs)  # whoever comes late starts from the same tensors
        state = one_round(wire, method, state, kept)


@pytest.mark.parametrize("name", ["fed-sb", "fedit", "rolora"])
def test_losses_on_the_way_down_do_not_add_up(name: str) -> None:
    """After 30 rounds sites are one coding of one round's change away from the server, as after the first."""
    wire, (method, state) = link("int4"), start(name)
    kept: dict[str, Any] = {}
    gaps = []
    for _ in range(30):
        state = one_round(wire, method, state, kept)
        heard = wire.heard(method, state)
        gaps.append(max(float((state.tensors[key] - x).abs().max()) for key, x in heard.tensors.items()))
    assert 0 < max(gaps[-5:]) < 3 * max(gaps[:5])


@pytest.mark.parametrize("name", ["fed-sb", "ravan", "fedit", "rolora", "flora-na", "hetlora", "fedsvd", "fedrot-lora"])
def test_a_mean_is_a_step_from_what_the_server_has_and_all_else_replaces_it(name: str) -> None:
    """s + (aggregate(h) - h) for a plain mean that does not turn; aggregate(h) for the others."""
    wire, (method, state) = link("int4"), start(name)
    state = one_round(wire, method, state, {})
    heard = wire.heard(method, state)
    trained = shaken(heard.tensors, frozenset(heard.tensors), "aggregate")
    after = replace(heard, round=2, tensors=trained)
    settled = wire.settled(method, state, heard, after)
    assert same(settled.client_view, heard.tensors)
    assert any(not torch.equal(x, heard.tensors[key]) for key, x in state.tensors.items())
    steps = name in ("fed-sb", "ravan", "fedit", "rolora")
    for key, x in settled.tensors.items():
        wanted = state.tensors[key] + (trained[key] - heard.tensors[key]) if steps else trained[key]
        assert torch.allclose(x, wanted, atol=1e-6), key


def test_in_float32_nothing_is_held_owed_or_changed() -> None:
    wire, (method, state) = link("float32"), start("fed-sb")
    kept: dict[str, Any] = {}
    after = one_round(wire, method, state, kept)
    assert after.client_view == {} and all(own == {} for own in kept.values())
    assert wire.heard(method, after) is after and wire.settled(method, state, state, after) is after


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_a_method_that_changes_the_base_is_told_everything_in_float32(name: str) -> None:
    wire, (method, state) = link("int4"), start(name)
    kept: dict[str, Any] = {}
    for _ in range(3):
        data, _ = wire.down(method, state, wire.heard(method, state), basis="", late=False, rank=None)
        assert unpack(data).codec == "float32"
        state = one_round(wire, method, state, kept)
        assert state.client_view == {}


@pytest.mark.parametrize("name", ["fed-sb", "flexlora", "hetlora"])
def test_a_client_of_another_rank_is_told_its_part_of_what_all_hold(name: str) -> None:
    wire, (method, state) = link("int4"), start(name)
    state = one_round(wire, method, state, {})
    heard = wire.heard(method, state)
    for rank, codec in ((None, "int4"), (4, "int4"), (2, "float32")):
        data, message = wire.down(method, state, heard, basis=basis_hash(heard.shared), late=False, rank=rank)
        assert unpack(data).codec == codec
        assert same(message, method.broadcast(heard, total_rank=rank))


# --- what is owed ---


def update(tensors: dict[str, Any], round: int = 0, client: str = "a") -> Payload:
    return Payload(kind="update", run="run", round=round, client=client, samples=1, tensors=tensors)


def test_what_was_lost_is_owed_and_paid() -> None:
    """Over ten rounds, all that was sent and what is still owed make up all that was to be sent."""
    wire, (method, _) = link("int4"), start("fed-sb")
    base = {"x": torch.from_numpy(keyed_generator(0, "base").standard_normal(100).astype(np.float32))}
    kept: dict[str, Tensor] = {}
    wanted, arrived = np.zeros(100), np.zeros(100)
    for round in range(10):
        change = keyed_generator(round, "change").standard_normal(100).astype(np.float32)
        data, kept = wire.up(method, update({"x": base["x"].numpy() + change}, round), base, kept)
        wanted, arrived = wanted + change, arrived + unpack(data).tensors["x"]
    owed = kept["codec/x"].numpy()
    assert np.abs(owed).max() > 0.05
    assert np.allclose(arrived + owed, wanted, atol=1e-5)
    assert not np.allclose(arrived, wanted, atol=0.01)


def test_a_tensor_that_skips_a_round_keeps_what_it_is_owed() -> None:
    wire, (method, _) = link("int4"), start("rolora")
    zero = {"A": torch.zeros(50), "B": torch.zeros(50)}
    values = keyed_generator(0).standard_normal(50).astype(np.float32)
    _, first = wire.up(method, update({"B": values}, 0), zero, {})
    _, second = wire.up(method, update({"A": values}, 1), zero, first)
    assert set(second) == {"codec/A", "codec/B"} and torch.equal(second["codec/B"], first["codec/B"])


def test_a_tensor_of_another_shape_starts_again() -> None:
    wire, (method, _) = link("int4"), start("hetlora")
    kept = {"codec/x": torch.full((7, 9), 100.0)}
    data, kept = wire.up(method, update({"x": np.ones((5, 9), np.float32)}), {"x": torch.zeros(5, 9)}, kept)
    assert np.abs(unpack(data).tensors["x"]).max() < 1.2
    assert kept["codec/x"].shape == (5, 9)


@pytest.mark.parametrize("name", ["flora", "flexlora", "fedsvd", "fedrot-lora"])
def test_where_coordinates_turn_nothing_is_owed(name: str) -> None:
    wire, (method, state) = link("int4"), start(name)
    kept: dict[str, Any] = {}
    one_round(wire, method, state, kept)
    assert all(not within("codec", own) for own in kept.values())


def test_a_single_number_arrives_as_it_is() -> None:
    """A client's next rank, of HetLoRA: 3 stays 3 between values a thousand times smaller."""
    wire, (method, _) = link("int4"), start("hetlora")
    tensors = {"A": np.full(90, 1e-3, np.float32), "rank": np.array([3], np.float32)}
    base = {"A": torch.zeros(90), "rank": torch.tensor([4.0])}
    data, kept = wire.up(method, update(tensors), base, {})
    assert unpack(data).tensors["rank"].tolist() == [-1.0] and kept["codec/rank"].item() == 0


def test_draws_are_of_the_client_the_round_and_the_seed() -> None:
    _, (method, _) = link("int4"), start("fed-sb")
    values = {"x": keyed_generator(0).standard_normal(200).astype(np.float32)}
    base = {"x": torch.zeros(200)}

    def sent(seed: int, client: str, round: int) -> list[float]:
        envelope, _ = link("int4", seed).up(method, update(values, round, client), base, {})
        return unpack(envelope).tensors["x"].tolist()  # type: ignore[no-any-return]

    assert sent(0, "a", 1) == sent(0, "a", 1)
    others = [sent(0, "b", 1), sent(0, "a", 2), sent(1, "a", 1)]
    assert all(other != sent(0, "a", 1) for other in others)


# --- the server ---


@pytest.mark.parametrize("codec", LOSSY)
def test_the_server_adds_what_the_change_is_a_change_of(codec: Codec) -> None:
    wire, (method, state) = link(codec), start("fedit")
    state = one_round(wire, method, state, {})
    heard = wire.heard(method, state)
    tensors = to_arrays({key: x + 0.125 for key, x in heard.tensors.items()})
    payload = replace(update(tensors, round=1), basis=basis_hash(heard.shared))
    data, _ = wire.up(method, payload, heard.tensors, {})
    (got,), dropped = validate_updates([("a", data)], rules(method, heard, ServerConfig(codec=codec), "run", {}))
    assert not dropped
    for key, x in heard.tensors.items():
        assert torch.allclose(got.tensors[key], x + 0.125, atol={"int4": 0.019}.get(codec, 1.1e-3)), key  # a step


@pytest.mark.parametrize(("claimed", "wanted"), [("float32", "int8"), ("int8", "float32"), ("int4", "int8")])
def test_another_codec_is_refused(claimed: Codec, wanted: Codec) -> None:
    method, state = start("fed-sb")
    payload = replace(update(to_arrays(state.tensors)), codec=claimed, basis=basis_hash(state.shared))
    data = pack(payload, keyed_generator(0))
    with pytest.raises(Exception, match=f"its codec is '{claimed}', this round's is '{wanted}'"):
        validate_updates([("a", data)], rules(method, state, ServerConfig(codec=wanted), "run", {}))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_change_that_is_no_number_is_dropped(bad: float) -> None:
    method, state = start("fed-sb")
    tensors = to_arrays({key: torch.zeros_like(x) for key, x in state.tensors.items()})
    tensors["layer.R"][0, 1, 2] = bad
    payload = replace(update(tensors), codec="int8", basis=basis_hash(state.shared))
    server = rules(method, state, ServerConfig(codec="int8"), "run", {})
    with pytest.raises(Exception, match="values that are NaN or infinite"):
        validate_updates([("a", pack(payload, keyed_generator(0)))], server)


def test_a_change_of_the_wrong_shape_or_name_is_dropped() -> None:
    method, state = start("fed-sb")
    server = rules(method, state, ServerConfig(codec="int8"), "run", {})
    good = to_arrays(state.tensors)
    for tensors, said in (
        ({**good, "layer.R": np.zeros((4, 4), np.float32)}, "has shape"),
        ({**good, "other": np.zeros(4, np.float32)}, "unknown 'other'"),
        ({}, "missing"),
    ):
        payload = replace(update(tensors), codec="int8", basis=basis_hash(state.shared))
        with pytest.raises(Exception, match=said):
            validate_updates([("a", pack(payload, keyed_generator(0)))], server)


def test_a_torn_or_flipped_change_never_crashes_the_server() -> None:
    method, state = start("fed-sb")
    payload = replace(update(to_arrays(state.tensors)), codec="int4", basis=basis_hash(state.shared))
    data = pack(payload, keyed_generator(0))
    server = rules(method, state, ServerConfig(codec="int4"), "run", {})
    draw = keyed_generator(0, "flips")
    for _ in range(300):
        harmed = bytearray(data)
        for position in draw.integers(0, len(data), 3):
            harmed[position] ^= int(draw.integers(1, 256))
        cut = int(draw.integers(0, 2 * len(data)))
        updates, dropped = validate_updates([("b", good_update(method, state)), ("a", bytes(harmed[:cut]))], server)
        assert len(updates) + len(dropped) == 2
        for got in updates:
            assert all(torch.isfinite(x).all() for x in got.tensors.values())


def good_update(method: Method, state: State) -> bytes:
    tensors = to_arrays({key: torch.full_like(x, 0.1) for key, x in state.tensors.items()})
    payload = replace(update(tensors, client="b"), codec="int4", basis=basis_hash(state.shared))
    return pack(payload, keyed_generator(0))


# --- that it matters ---


def distance(codec: Codec, feedback: bool, rounds: int = 200) -> float:
    """Root mean square distance to the optimum, over the last 50 rounds, of clients that pull to targets of their own.

    Client k moves from h to h + 0.05 (T_k - h); the optimum is the mean of the T_k, where no client's change is zero.
    Without feedback each round adds a loss of its own; with it, each round makes good what the last one lost.
    """
    wire, (method, state) = link(codec), start("fed-sb", rank=16)
    R = f"{LAYER}.R"
    targets = {
        client: torch.from_numpy(keyed_generator(1, client).standard_normal((1, 16, 16)).astype(np.float32))
        for client in CLIENTS
    }
    optimum = torch.stack(list(targets.values())).mean(0)
    kept: dict[str, dict[str, Tensor]] = {}
    gaps = []
    for _ in range(rounds):
        heard = wire.heard(method, state)
        replies = []
        for client in CLIENTS:
            moved = {**heard.tensors, R: heard.tensors[R] + 0.05 * (targets[client] - heard.tensors[R])}
            payload = replace(update(to_arrays(moved), state.round, client), basis=basis_hash(heard.shared))
            data, kept[client] = wire.up(method, payload, heard.tensors, kept.get(client, {}) if feedback else {})
            replies.append((client, data))
        updates, _ = validate_updates(replies, rules(method, heard, ServerConfig(codec=codec), "run", {}))
        after = method.aggregate(heard, updates, ServerOptimizer())
        state = wire.settled(method, state, heard, after)
        if not feedback and codec != "float32":
            state = replace(state, tensors=after.tensors)
        gaps.append(float((state.tensors[R] - optimum).square().mean().sqrt()))
    return float(np.mean(gaps[-50:]))


@pytest.mark.parametrize(("codec", "level"), [("int4", 0.005), ("int8", 0.0003)])
def test_feedback_matters(codec: Codec, level: float) -> None:
    """0.003 with it and 0.009 without in int4, 0.0002 and 0.0005 in int8; the theory says 1 / sqrt(0.1), a third."""
    with_feedback, without = distance(codec, True), distance(codec, False)
    assert with_feedback < level < without
    assert 2 * with_feedback < without
    assert distance("float32", True) < 1e-4
