"""A secure sum is the plain sum within its bound, whoever vanishes; and what the server sees tells nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sums import ANSWERS, Sum, body, is_uniform, make_plan

from fedsb.secagg.client import SumClient
from fedsb.secagg.fixed_point import FixedPoint, Floats
from fedsb.secagg.keys import mask_private, pair_mask, public_key, seal_key, self_check, self_mask
from fedsb.secagg.messages import Phase, SumError, SumPlan
from fedsb.secagg.primitives import SEED_BYTES, combine, fresh_seed, mask
from fedsb.secagg.protocol import Simulated, simulate
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.rng import keyed_generator

LARGE = 50_000  # values where a test looks at the bytes' distribution


def simulated(
    vectors: Mapping[str, Floats],
    weights: Mapping[str, float],
    *,
    threshold: int,
    clip: float,
    draws: Mapping[str, np.random.Generator],
    vanish: Mapping[str, Phase] | None = None,
) -> Simulated:
    """A sum of plain vectors among sites with fresh keys."""
    identities = {name: Ed25519PrivateKey.generate() for name in vectors}
    sites = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    size = next(iter(vectors.values())).size if vectors else 0
    plan = SumPlan(run="simulation", round=0, sites=sites, threshold=threshold, size=size, clip=clip)
    ring = {name: plan.grid.encode(x, weights[name], draws[name]) for name, x in vectors.items()}
    return simulate(plan, identities, ring, vanish)


def summed(n: int, size: int, threshold: int, vanish: dict[str, Phase] | None = None) -> Simulated:
    """Runs one, and compares it with the plain weighted sum over those that should be in it."""
    names = "abcdefgh"[:n]
    vectors = {k: keyed_generator("x", k).normal(0, 0.4, size).astype(np.float32) for k in names}
    weights = {k: float(keyed_generator("p", k).uniform(0.01, 1)) for k in names}
    draws = {k: keyed_generator("round", k) for k in names}
    result = simulated(vectors, weights, threshold=threshold, clip=0.8, draws=draws, vanish=vanish)
    stay = [k for k in names if (vanish or {}).get(k) not in ("advert", "sealed", "masked")]
    assert result.clients == tuple(stay)
    plain = sum(weights[k] * np.clip(vectors[k].astype(np.float64), -0.8, 0.8) for k in stay)
    bound = FixedPoint(clients=n, clip=0.8).bound(len(stay))
    assert result.values.shape == (size,)
    assert np.abs(result.values - plain).max() <= bound
    assert abs(result.weight - sum(weights[k] for k in stay)) <= bound / 0.8
    return result


# --- the sum ---


@pytest.mark.parametrize(
    ("n", "size"), [(2, 1), (2, 1000), (3, 17), (4, 1), (5, 64), (6, 4096), (7, 3), (8, 1), (8, 100_000)]
)
def test_the_sum_is_the_plain_sum_within_the_bound(n: int, size: int) -> None:
    for threshold in {n // 2 + 1, n}:
        summed(n, size, threshold)


def test_the_ring_is_summed_exactly() -> None:
    world = Sum(make_plan(n=5, threshold=3))
    world.vectors["b"][:] = 2**32 - 1  # -1
    assert world.finish().tolist() == [1 - 1 + 3 + 4 + 5] * 6
    assert world.server.survivors == ("a", "b", "c", "d", "e")


def test_all_clients_at_the_clip_bound_with_weight_one_do_not_overflow() -> None:
    vectors = {k: np.array([3, -3, 1e38, -1e38], np.float32) for k in "abcdefgh"}
    ones, draws = dict.fromkeys(vectors, 1.0), {k: keyed_generator(k) for k in vectors}
    result = simulated(vectors, ones, threshold=5, clip=3.0, draws=draws)
    assert result.values == pytest.approx([24, -24, 24, -24], abs=FixedPoint(clients=8, clip=3.0).bound(8))


def test_a_sum_over_its_weight_is_the_mean_of_those_who_stayed() -> None:
    sites = {k: np.array([i, i, -i], np.float32) for i, k in enumerate("abc")}
    result = simulated(
        sites,
        {"a": 0.5, "b": 0.25, "c": 0.25},
        threshold=2,
        clip=4.0,
        draws={k: keyed_generator(k) for k in sites},
        vanish={"a": "masked"},
    )
    np.testing.assert_allclose(result.values / result.weight, [1.5, 1.5, -1.5], atol=1e-7)


def test_bytes_are_those_stated() -> None:
    world = Sum(make_plan(n=5, threshold=3, size=1000))
    world.finish({"e": "advert", "d": "masked"})  # |U1| = 4, |U2| = 4
    sent = sum(len(body(world.sent[phase, "a"])) for phase in ANSWERS)
    assert sent == 4 * 1001 + 224 + 60 * 3 + 16 * 4
    headers = [len(message) - len(body(message)) for message in world.sent.values()]
    assert 150 < min(headers) <= max(headers) < 250


# --- who vanishes ---


@pytest.mark.parametrize("phase", ANSWERS)
@pytest.mark.parametrize("n", [3, 4, 8])
def test_one_may_vanish_before_any_message(phase: Phase, n: int) -> None:
    for name in ("a", "abcdefgh"[n - 1]):  # the first and the last: both signs of the pairwise masks
        summed(n, 10, n // 2 + 1, {name: phase})


@pytest.mark.parametrize(
    "vanish",
    [
        {"a": "masked", "h": "masked", "c": "masked"},  # down to exactly t = 5
        {"a": "advert", "b": "sealed", "c": "masked"},
        {"b": "sealed", "d": "confirm", "g": "shares"},
        {"f": "masked", "g": "confirm", "h": "shares"},
        {"f": "advert", "g": "advert", "h": "advert"},
    ],
)
def test_several_may_vanish_down_to_the_threshold(vanish: dict[str, Phase]) -> None:
    summed(8, 100, 5, vanish)


@pytest.mark.parametrize("phase", ANSWERS)
def test_below_the_threshold_the_round_fails_and_says_who_is_missing(phase: Phase) -> None:
    with pytest.raises(SumError, match=rf"2 of 5 clients sent '{phase}'; the threshold is 3.*Missing: b, d, e") as info:
        summed(5, 10, 3, {"b": phase, "d": phase, "e": phase})
    assert isinstance(info.value, RunError)


def test_below_the_threshold_over_several_phases() -> None:
    with pytest.raises(SumError, match="2 of 5 clients sent 'masked'"):
        summed(5, 10, 3, {"b": "advert", "d": "sealed", "e": "masked"})


def test_who_comes_late_but_before_the_phase_is_closed_is_in() -> None:
    world = Sum(make_plan(n=3, threshold=2)).to("masked")
    world.deliver(gone=["b", "c"])
    with pytest.raises(SumError, match="1 of 3"):
        world.close()
    assert world.server.silent == ("b", "c")
    world.server.receive("c", world.answer("c"))
    world.close()
    assert world.finish().tolist() == [1 + 3] * 6


# --- what the server sees ---


def test_masked_vectors_look_random_and_differ_between_rounds() -> None:
    seen = []
    for _ in range(2):
        world = Sum(make_plan(size=LARGE - 1)).to("confirm")
        seen.append({k: np.frombuffer(body(world.sent["masked", k]), "<u4") for k in world.plan.names})
    assert not is_uniform(world.vectors["a"])
    assert all(is_uniform(vector) for messages in seen for vector in messages.values())
    assert all(is_uniform(seen[0][k] - seen[1][k]) for k in seen[0])
    assert all(is_uniform(seen[0][j] - seen[0][k]) for j, k in combinations(seen[0], 2))
    assert all(is_uniform(seen[0][j] + seen[0][k]) for j, k in combinations(seen[0], 2))


def test_a_vector_is_bare_only_without_its_own_mask_and_all_of_its_pairs() -> None:
    """d vanishes after sharing, so the server learns all its pairwise masks, and then its vector comes after all."""
    world = Sum(make_plan(n=4, threshold=3, size=LARGE - 1)).to("masked")
    late = np.frombuffer(body(world.answer("d")), "<u4")
    world.finish({"d": "masked"})
    own = {k: self_mask(world.plan, client._self_seed) for k, client in world.clients.items()}
    # of d the server knows every pair, and not its own mask
    assert is_uniform(late - world.pairs("d", "abc"))
    assert is_uniform(late - own["d"])
    assert np.array_equal(late - own["d"] - world.pairs("d", "abc"), world.vectors["d"])
    # of the others it knows their own mask and the pair with d
    for name in "abc":
        masked = np.frombuffer(body(world.sent["masked", name]), "<u4")
        assert is_uniform(masked - own[name] - world.pairs(name, "d"))
        assert is_uniform(masked - world.pairs(name, "abcd"))
        others = sorted(set("abc") - {name})
        for known in others:  # even where one other tells it theirs
            assert is_uniform(masked - own[name] - world.pairs(name, ["d", known]))
        assert np.array_equal(masked - own[name] - world.pairs(name, ["d", *others]), world.vectors[name])


def test_the_answers_give_a_seed_of_16_bytes_each_and_never_both_of_one_client() -> None:
    world = Sum(make_plan(n=4, threshold=3))
    world.finish({"d": "masked"})
    answers = {name: body(world.sent["shares", name]) for name in "abc"}
    for i, name in enumerate("abcd"):
        shares = {k: answers[k][SEED_BYTES * i : SEED_BYTES * (i + 1)] for k in "abc"}
        seed = combine({world.plan.places[k]: share for k, share in shares.items()})
        client = world.clients[name]
        assert len(seed) == len(client._self_seed) == len(client._key_seed) == 16
        assert seed == (client._key_seed if name == "d" else client._self_seed)
        few = combine({world.plan.places[k]: shares[k] for k in "ab"})  # t - 1
        assert few not in (client._key_seed, client._self_seed)
        assert (public_key(mask_private(world.plan, name, seed)) == client._keys.mask) is (name == "d")


def test_keys_and_secrets_are_fresh_in_every_round() -> None:
    plan = make_plan()
    clients = [SumClient(plan, "a", Sum(plan).clients["a"]._identity) for _ in range(2)]
    secrets = [{c._key_seed, c._self_seed, *c._keys} for c in clients]
    assert len(secrets[0]) == len(secrets[1]) == 4
    assert not secrets[0] & secrets[1]


def test_seeds_are_random_throughout() -> None:
    seeds = np.frombuffer(b"".join(fresh_seed() for _ in range(8192)), "<u4").reshape(-1, 4)
    assert is_uniform(seeds.reshape(-1))
    assert all(is_uniform(seeds[:, i] - seeds[:, j]) for i, j in combinations(range(4), 2))


def test_one_seed_in_two_plans_makes_two_masks() -> None:
    plans = [make_plan(size=LARGE - 1, round=round) for round in (1, 2)]
    seed = bytes(16)
    assert is_uniform(self_mask(plans[0], seed) - self_mask(plans[1], seed))
    assert self_check(plans[0], seed) != self_check(plans[1], seed)
    assert is_uniform(self_mask(plans[0], seed) - mask(self_check(plans[0], seed), LARGE))  # the server sees the check
    assert public_key(mask_private(plans[0], "a", seed)) != public_key(mask_private(plans[1], "a", seed))


def test_one_pair_of_keys_makes_other_masks_in_another_plan_and_for_another_pair() -> None:
    """Else the masks of one round could be taken off another's vectors."""
    own, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    plans = [make_plan(), make_plan(round=8), make_plan(run="other"), make_plan(n=5)]
    masks = [pair_mask(plan, own, "a", "b", public_key(other)) for plan in plans]
    masks.append(pair_mask(plans[0], own, "a", "c", public_key(other)))
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    back = pair_mask(plans[0], other, "b", "a", public_key(own))
    assert not (masks[0] + back).any()


def test_one_pair_of_keys_seals_with_other_keys_in_another_plan_and_for_another_pair() -> None:
    own, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    plans = [make_plan(), make_plan(round=8), make_plan(run="other"), make_plan(n=5)]
    keys = [seal_key(plan, own, public_key(other), "a", "b") for plan in plans]
    keys += [seal_key(plans[0], own, public_key(other), *pair) for pair in (("b", "a"), ("a", "c"), ("c", "b"))]
    assert len(set(keys)) == len(keys)
    assert seal_key(plans[0], other, public_key(own), "a", "b") == keys[0]


def test_the_shares_travel_sealed() -> None:
    world = Sum().to("masked")
    seen = b"".join(world.sent.values()) + b"".join(world.mail.values())
    for client in world.clients.values():
        assert client._key_seed not in seen and client._self_seed not in seen
        for share in client._shares[client.name]:
            assert share not in seen
    world.to("confirm")
    for client in world.clients.values():
        for pair in client._shares.values():
            assert pair[0] not in seen and pair[1] not in seen


def test_a_client_forgets_the_shares_it_was_given() -> None:
    world = Sum()
    world.finish()
    assert all(not client._shares for client in world.clients.values())


# --- plans ---


@pytest.mark.parametrize(("n", "threshold"), [(2, 1), (2, 3), (3, 1), (4, 2), (8, 4), (8, 9), (5, 0), (5, -3)])
def test_a_threshold_that_is_no_majority_is_refused(n: int, threshold: int) -> None:
    with pytest.raises(UserError, match=f"threshold of {threshold} for {n} clients"):
        make_plan(n, threshold)


def test_plans_that_cannot_be_carried_out_are_refused() -> None:
    good = make_plan(n=3, threshold=2)
    one, key = dict(list(good.sites.items())[:1]), good.sites["a"]

    def plan(**changes: object) -> SumPlan:
        facts = {"run": "r", "round": 0, "sites": good.sites, "threshold": 2, "size": 3, "clip": 1.0, **changes}
        return SumPlan(**facts)  # type: ignore[arg-type]

    for changes, match in [
        ({"sites": one, "threshold": 1}, "a sum of one client hides nothing"),
        ({"size": 0}, "0 values"),
        ({"size": 2**40}, "values"),
        ({"round": -1}, "round -1"),
        ({"run": ""}, "characters"),
        ({"run": "x" * 201}, "characters"),
        ({"clip": 0.0}, "clip bound"),
        ({"sites": {**good.sites, "": bytes(32)}, "threshold": 3}, "characters"),
        ({"sites": {**good.sites, "b": b"short"}}, "32 bytes"),
        ({"sites": {**good.sites, "b": key}}, "must be different Ed25519"),
    ]:
        with pytest.raises(UserError, match=match):
            plan(**changes)
    digests = [
        plan(**changes).digest
        for changes in (
            {},
            {"run": "s"},
            {"round": 1},
            {"threshold": 3},
            {"size": 4},
            {"clip": 2.0},
            {"sites": {**good.sites, "c": bytes(32)}},
            {"sites": {**good.sites, "d": bytes(32)}, "threshold": 3},
        )
    ]
    assert len(set(digests)) == 8
    assert plan(sites=dict(reversed(good.sites.items()))).digest == digests[0]


def test_a_client_needs_the_key_that_the_directory_has() -> None:
    plan = make_plan()
    with pytest.raises(UserError, match="directory"):
        SumClient(plan, "a", Ed25519PrivateKey.generate())
    with pytest.raises(UserError, match="directory"):
        SumClient(plan, "z", Ed25519PrivateKey.generate())
