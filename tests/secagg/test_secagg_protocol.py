"""The sum is the plain sum within its bound with any clients that vanish, and the server sees nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sums import ANSWERS, IDENTITIES, OF_KEYS, Sum, body, is_uniform, make_keys, make_plan

from fedsb.secagg.fixed_point import FixedPoint, Floats
from fedsb.secagg.keys import mask_private, public_key, seal_key
from fedsb.secagg.messages import Phase, SumError
from fedsb.secagg.primitives import SEED_BYTES, combine
from fedsb.secagg.protocol import Simulated, simulate
from fedsb.utils.errors import RunError
from fedsb.utils.rng import keyed_generator

LARGE = 50_000  # values where a test looks at the bytes' distribution


@dataclass(frozen=True, kw_only=True)
class Case:
    """A simulated sum among the first n sites."""

    n: int
    threshold: int
    size: int = 10
    clip: float = 0.8
    bits: int = 32
    signed: bool = True

    def run(
        self, vectors: Mapping[str, Floats], weights: Mapping[str, float], vanish: Mapping[str, Phase]
    ) -> Simulated:
        keys = make_keys(self.n, self.threshold, signed=self.signed)
        names = "".join(name for name in keys.names if vanish.get(name) not in OF_KEYS)
        plan = make_plan(keys, size=self.size, names=names)
        plan = replace(plan, grid=replace(plan.grid, clip=self.clip, bits=self.bits))
        ring = {k: plan.grid.encode(vectors[k], weights[k], keyed_generator("round", k)) for k in plan.names}
        return simulate(plan, IDENTITIES, ring, vanish)


def summed(case: Case, vanish: Mapping[str, Phase] | None = None) -> Simulated:
    """Runs a sum, and compares it with the plain weighted sum over those that should be in it."""
    vanish = vanish or {}
    names = "abcdefgh"[: case.n]
    vectors = {k: keyed_generator("x", k).normal(0, 0.4, case.size).astype(np.float32) for k in names}
    weights = {k: float(keyed_generator("p", k).uniform(0.01, 1)) for k in names}
    result = case.run(vectors, weights, vanish)
    stay = [k for k in names if vanish.get(k) not in (*OF_KEYS, "masked")]
    assert result.clients == tuple(stay)
    plain = sum(weights[k] * np.clip(vectors[k].astype(np.float64), -case.clip, case.clip) for k in stay)
    asked = sum(vanish.get(k) not in OF_KEYS for k in names)
    bound = FixedPoint(clients=asked, clip=case.clip, bits=case.bits).bound(len(stay))
    assert result.values.shape == (case.size,)
    assert np.abs(result.values - plain).max() <= bound
    assert abs(result.weight - sum(weights[k] for k in stay)) <= bound / case.clip
    return result


# --- the sum ---


@pytest.mark.parametrize(
    ("n", "size"), [(2, 1), (2, 1000), (3, 17), (4, 1), (5, 64), (6, 4096), (7, 3), (8, 1), (8, 100_000)]
)
@pytest.mark.parametrize("signed", [True, False])
def test_the_sum_is_the_plain_sum_within_the_bound(n: int, size: int, signed: bool) -> None:
    for threshold in {n // 2 + 1, n}:
        summed(Case(n=n, threshold=threshold, size=size, signed=signed))


@pytest.mark.parametrize("bits", [12, 17, 24, 31])
def test_the_sum_is_the_plain_sum_in_a_narrow_ring(bits: int) -> None:
    summed(Case(n=5, threshold=3, size=1001, bits=bits))
    summed(Case(n=5, threshold=3, size=1001, bits=bits), {"a": "masked", "d": "shares"})


@pytest.mark.parametrize("bits", [9, 32])
def test_the_ring_is_summed_exactly(bits: int) -> None:
    world = Sum(make_plan(make_keys(n=5, threshold=3), bits=bits))
    world.vectors["b"][:] = 2**bits - 1  # -1
    world.vectors["c"][0] = 2**bits - 5  # the sum is below 0
    total = world.finish()
    assert total.tolist() == [2**bits + 1 - 1 - 5 + 4 + 5 - 2**bits, *[1 - 1 + 3 + 4 + 5] * 5]
    assert world.sums.survivors == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("bits", [12, 32])
def test_all_clients_at_the_clip_bound_with_weight_one_do_not_overflow(bits: int) -> None:
    vectors = {k: np.array([3, -3, 1e38, -1e38], np.float32) for k in "abcdefgh"}
    case = Case(n=8, threshold=5, size=4, clip=3.0, bits=bits)
    result = case.run(vectors, dict.fromkeys(vectors, 1.0), {})
    bound = FixedPoint(clients=8, clip=3.0, bits=bits).bound(8)
    assert result.values == pytest.approx([24, -24, 24, -24], abs=bound)


def test_a_sum_over_its_weight_is_the_mean_of_those_that_stayed() -> None:
    vectors = {k: np.array([i, i, -i], np.float32) for i, k in enumerate("abc")}
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    result = Case(n=3, threshold=2, size=3, clip=4.0).run(vectors, weights, {"a": "masked"})
    np.testing.assert_allclose(result.values / result.weight, [1.5, 1.5, -1.5], atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("rounds", "bits"), [(1, 32), (6, 13)])
def test_bytes_are_those_stated(rounds: int, bits: int, signed: bool) -> None:
    keys = make_keys(n=5, threshold=3, rounds=rounds, signed=signed)
    world = Sum(make_plan(keys, size=1000, bits=bits))
    world.finish({"e": "advert", "d": "masked"})  # |U1| = |U2| = 4
    sent = {phase: len(body(world.sent[phase, "a"])) for phase in world.answers}
    assert sent["advert"] == 32 * rounds + 96
    assert sent["sealed"] == (32 * rounds + 28) * 3
    assert sent["held"] == 0
    assert sent["masked"] == -(-bits * 1001 // 8) + 32
    assert sent["shares"] == 16 * 4
    assert sent.get("confirm", 0) == (64 if signed else 0)
    headers = [len(message) - len(body(message)) for message in world.sent.values()]
    assert 150 < min(headers) <= max(headers) < 250


def test_simulated_bytes_are_those_of_the_messages() -> None:
    result = summed(Case(n=4, threshold=3, size=100), {"d": "masked"})
    header = 2 + len('{"fedsb":"secure-sum","version":3,"run":"run","round":7,"phase":"","sender":"a","plan":""}') + 64
    phases = sum(len(phase) for phase in ANSWERS)
    assert result.up_bytes["a"] == 6 * header + phases + (32 + 96) + 60 * 3 + (404 + 32) + 64 + 16 * 4
    assert result.up_bytes["d"] < result.up_bytes["a"] == result.up_bytes["b"]
    assert result.down_bytes["d"] < result.down_bytes["a"]


# --- clients that vanish ---


@pytest.mark.parametrize("phase", ANSWERS)
@pytest.mark.parametrize("n", [3, 4, 8])
def test_one_may_vanish_before_any_message(phase: Phase, n: int) -> None:
    for name in ("a", "abcdefgh"[n - 1]):  # the first and the last: both signs of the pairwise masks
        summed(Case(n=n, threshold=n // 2 + 1), {name: phase})


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "vanish",
    [
        {"a": "masked", "h": "masked", "c": "masked"},  # down to exactly t = 5
        {"a": "advert", "b": "advert", "c": "masked"},
        {"f": "masked", "g": "masked", "h": "shares"},
        {"f": "shares", "a": "shares", "h": "shares"},
        {"f": "advert", "g": "advert", "h": "advert"},
    ],
)
def test_several_may_vanish_down_to_the_threshold(vanish: dict[str, Phase], signed: bool) -> None:
    summed(Case(n=8, threshold=5, size=100, signed=signed), vanish)


@pytest.mark.parametrize(
    "vanish",
    [
        {"a": "advert", "b": "sealed", "c": "masked"},
        {"a": "advert", "b": "sealed", "c": "held"},
        {"b": "sealed", "d": "confirm", "g": "shares"},
        {"f": "masked", "g": "confirm", "h": "shares"},
    ],
)
def test_several_may_vanish_in_the_phases_of_signed_sums(vanish: dict[str, Phase]) -> None:
    summed(Case(n=8, threshold=5, size=100), vanish)


@pytest.mark.parametrize("phase", ANSWERS)
def test_below_the_threshold_the_round_fails_and_says_who_is_missing(phase: Phase) -> None:
    world, gone = Sum(make_plan(make_keys(n=5, threshold=3))), dict.fromkeys("bde", phase)
    with pytest.raises(SumError, match=rf"2 of 5 clients sent '{phase}'; the threshold is 3.*Missing: b, d, e") as info:
        world.finish(gone)
    assert isinstance(info.value, RunError)


def test_below_the_threshold_over_several_phases() -> None:
    with pytest.raises(SumError, match="2 of 3 clients sent 'masked'"):
        Sum(make_plan(make_keys(n=5, threshold=3))).finish({"b": "advert", "d": "sealed", "e": "masked"})


@pytest.mark.parametrize("phase", OF_KEYS)
def test_a_simulated_sum_with_a_client_without_keys_fails(phase: Phase) -> None:
    plan = make_plan(make_keys(n=4, threshold=2 + 1))
    with pytest.raises(SumError, match="the sum is with c, which has no keys"):
        simulate(plan, IDENTITIES, {}, {"c": phase})


def test_a_client_that_answers_late_but_before_the_phase_is_closed_is_in() -> None:
    world = Sum(make_plan(make_keys(n=3, threshold=2))).to("masked")
    world.deliver(gone=["b", "c"])
    with pytest.raises(SumError, match="1 of 3"):
        world.close()
    assert world.server.silent == ("b", "c")
    world.server.receive("c", world.answer("c"))
    world.close()
    assert world.finish().tolist() == [1 + 3] * 6


# --- the server's view ---


@pytest.mark.parametrize("bits", [32, 16])
def test_masked_vectors_look_random_and_differ_between_agreements(bits: int) -> None:
    seen = []
    for _ in range(2):
        world = Sum(make_plan(size=LARGE - 1, bits=bits)).to("confirm")
        seen.append({k: world.masked(k).astype(f"u{bits // 8}") for k in "abcd"})
    assert not is_uniform(world.vectors["a"])
    assert all(is_uniform(vector) for messages in seen for vector in messages.values())
    assert all(is_uniform(seen[0][k] - seen[1][k]) for k in seen[0])
    assert all(is_uniform(seen[0][j] - seen[0][k]) for j, k in combinations(seen[0], 2))
    assert all(is_uniform(seen[0][j] + seen[0][k]) for j, k in combinations(seen[0], 2))


def test_a_vector_is_bare_only_without_its_own_mask_and_all_of_its_pairs() -> None:
    """d vanishes with its keys, so the server learns all its pairwise masks, and then its vector arrives after all."""
    world = Sum(make_plan(size=LARGE - 1)).to("masked")
    late = world.vector_of(world.answer("d"))
    world.finish({"d": "masked"})
    own = {k: world.own_mask(k) for k in "abcd"}
    # of d the server knows every pair, and not its own mask
    assert is_uniform(late - world.pairs("d", "abc"))
    assert is_uniform(late - own["d"])
    assert np.array_equal(late - own["d"] - world.pairs("d", "abc"), world.vectors["d"])
    # of the others it knows their own mask and the pair with d
    for name in "abc":
        masked = world.masked(name)
        assert is_uniform(masked - own[name] - world.pairs(name, "d"))
        assert is_uniform(masked - world.pairs(name, "abcd"))
        others = sorted(set("abc") - {name})
        for known in others:  # even if one of the others colludes
            assert is_uniform(masked - own[name] - world.pairs(name, ["d", known]))
        assert np.array_equal(masked - own[name] - world.pairs(name, ["d", *others]), world.vectors[name])


@pytest.mark.parametrize("signed", [True, False])
def test_the_answers_give_a_seed_of_16_bytes_each_and_never_both_of_one_client(signed: bool) -> None:
    world = Sum(make_plan(make_keys(signed=signed)))
    world.finish({"d": "masked"})
    answers, places = {name: body(world.sent["shares", name]) for name in "abc"}, world.plan.keys.places
    for i, name in enumerate("abcd"):
        shares = {k: answers[k][SEED_BYTES * i : SEED_BYTES * (i + 1)] for k in "abc"}
        seed = combine({places[k]: share for k, share in shares.items()})
        seeds = world.seeds[name]
        assert len(seed) == len(seeds.self) == len(seeds.key) == 16
        assert seed == (seeds.key if name == "d" else seeds.self)
        few = combine({places[k]: shares[k] for k in "ab"})  # t - 1
        assert few not in seeds
        own_key = public_key(mask_private(world.plan.keys, name, seed)) == world.public(name).masks[0]
        assert own_key is (name == "d")


def test_one_pair_of_keys_seals_with_other_keys_in_another_plan_and_for_another_pair() -> None:
    own, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    plans = [make_keys(), make_keys(round=8), make_keys(run="other"), make_keys(n=5)]
    keys = [seal_key(plan, own, public_key(other), "a", "b") for plan in plans]
    keys += [seal_key(plans[0], own, public_key(other), *pair) for pair in (("b", "a"), ("a", "c"), ("c", "b"))]
    assert len(set(keys)) == len(keys)
    assert seal_key(plans[0], other, public_key(own), "a", "b") == keys[0]


def test_the_shares_travel_sealed() -> None:
    world = Sum(make_plan(make_keys(rounds=2)))
    seen = b""
    while world.phase != "masked":
        world.deliver()
        seen += b"".join(world.sent.values())
        world.close()
        seen += b"".join(world.mail.values())
    assert not any(seed in seen for rounds in world.all_seeds.values() for seeds in rounds for seed in seeds)
    shares = [share for own in world.keys.values() for one in own._shares for pair in one.values() for share in pair]
    assert len(shares) == len(set(shares)) == 4 * 2 * 4 * 2
    assert not any(share in seen for share in shares)
