"""Plans that hide nothing are refused, a digest has all that a plan says, and every key and mask depends on it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sums import IDENTITIES, is_uniform, make_keys, make_plan

from fedsb.secagg.client import ClientKeys
from fedsb.secagg.fixed_point import FixedPoint
from fedsb.secagg.keys import mask_private, pair_mask, public_key, seal_key, self_check, self_mask
from fedsb.secagg.primitives import fresh_seed, mask
from fedsb.utils.errors import UserError

LARGE = 50_000  # values where a test looks at the bytes' distribution


@pytest.mark.parametrize(("n", "threshold"), [(2, 1), (2, 3), (3, 1), (4, 2), (8, 4), (8, 9), (5, 0), (5, -3)])
def test_a_threshold_that_is_not_a_majority_is_refused(n: int, threshold: int) -> None:
    with pytest.raises(UserError, match=f"threshold of {threshold} for {n} clients"):
        make_keys(n, threshold)


def test_plans_of_keys_that_cannot_be_carried_out_are_refused() -> None:
    good = make_keys(n=3, threshold=2)
    one = dict(list(good.sites.items())[:1])
    for changes, match in [
        ({"sites": one, "threshold": 1}, "a sum of one client hides nothing"),
        ({"rounds": 0}, "Keys for 0 rounds"),
        ({"rounds": 1001}, "Keys for 1001 rounds"),
        ({"round": -1}, "round -1"),
        ({"run": ""}, "characters"),
        ({"run": "x" * 201}, "characters"),
        ({"sites": {**good.sites, "": bytes(32)}, "threshold": 3}, "characters"),
        ({"sites": {**good.sites, "b": b"short"}}, "32 bytes"),
        ({"sites": {**good.sites, "b": good.sites["a"]}}, "must be different Ed25519"),
    ]:
        with pytest.raises(UserError, match=match):
            replace(good, **changes)


def test_plans_of_sums_that_cannot_be_carried_out_are_refused() -> None:
    keys = make_keys(n=4, threshold=3, rounds=2)
    good = make_plan(keys)
    grid = FixedPoint(clients=2, clip=1.0)
    for changes, match in [
        ({"sites": {k: keys.sites[k] for k in "ab"}, "grid": grid}, "2 clients with a threshold of 3"),
        ({"size": 0}, "0 values"),
        ({"size": 2**40}, "values"),
        ({"grid": grid}, "The grid is for 2 clients. The plan has 4"),
        ({"run": "other"}, "not for round 8 of this run"),
        ({"threshold": 4}, "not for round 8 of this run with this threshold"),
        ({"round": 6}, "not for round 7"),
        ({"round": 9}, "not for round 10"),
        ({"sites": {**keys.sites, "d": IDENTITIES["e"].public_key().public_bytes_raw()}}, "not for d"),
        ({"sites": {**{k: keys.sites[k] for k in "abc"}, "e": bytes(32)}}, "not for e: not among the sites"),
    ]:
        with pytest.raises(UserError, match=match):
            replace(good, **changes)


def test_a_digest_contains_all_that_a_plan_says() -> None:
    keys = make_keys(n=4, threshold=3, rounds=2)
    other_site = {**keys.sites, "d": bytes(32)}
    agreements = [
        keys,
        *(
            replace(keys, **changes)
            for changes in (
                {"run": "s"},
                {"round": 6},
                {"rounds": 3},
                {"threshold": 4},
                {"attempt": "second"},
                {"signed": False},
                {"sites": other_site},
                {"sites": {**keys.sites, "e": bytes(32)}},
            )
        ),
    ]
    plan = make_plan(keys)
    few = {name: keys.sites[name] for name in "abc"}
    sums = [
        *(make_plan(agreement) for agreement in agreements),
        *(
            replace(plan, **changes)
            for changes in (
                {"round": 8},
                {"size": 6},
                {"context": "settings"},
                {"grid": replace(plan.grid, clip=2.0)},
                {"grid": replace(plan.grid, bits=31)},
                {"sites": few, "grid": replace(plan.grid, clients=3)},
            )
        ),
    ]
    digests = {one.digest for one in (*agreements, *sums)}
    assert len(digests) == len(agreements) + len(sums) == 24
    assert replace(keys, sites=dict(reversed(keys.sites.items()))).digest == keys.digest
    assert replace(plan, sites=dict(reversed(keys.sites.items()))).digest == plan.digest


def test_a_client_needs_the_key_that_the_directory_has() -> None:
    for name in "az":
        with pytest.raises(UserError, match="directory"):
            ClientKeys(make_keys(), name, Ed25519PrivateKey.generate())


# --- derivations ---


def test_seeds_are_random_throughout() -> None:
    seeds = np.frombuffer(b"".join(fresh_seed() for _ in range(8192)), "<u4").reshape(-1, 4)
    assert is_uniform(seeds.reshape(-1))
    assert all(is_uniform(seeds[:, i] - seeds[:, j]) for i, j in combinations(range(4), 2))


def test_keys_and_secrets_are_fresh_in_every_agreement_and_round() -> None:
    plan = make_keys(rounds=3)
    clients = [ClientKeys(plan, "a", IDENTITIES["a"]) for _ in range(2)]
    secrets = [{seed for pair in c._seeds for seed in pair} | {c._own.seal, *c._own.masks} for c in clients]
    assert len(secrets[0]) == len(secrets[1]) == 3 * 2 + 1 + 3
    assert not secrets[0] & secrets[1]


def test_one_seed_in_two_plans_makes_two_masks() -> None:
    plans = [make_plan(make_keys(round=round), size=LARGE - 1) for round in (1, 2)]
    seed = bytes(16)
    assert is_uniform(self_mask(plans[0], seed) - self_mask(plans[1], seed))
    assert self_check(plans[0], seed) != self_check(plans[1], seed)
    assert is_uniform(self_mask(plans[0], seed) - mask(self_check(plans[0], seed), LARGE))  # the server sees the check
    keys = [public_key(mask_private(plan.keys, "a", seed)) for plan in plans]
    assert len({*keys, public_key(mask_private(plans[0].keys, "b", seed))}) == 3


def test_one_pair_of_keys_makes_other_masks_in_a_different_plan_and_for_a_different_pair() -> None:
    """Otherwise the masks of one round could be removed from the vectors of another."""
    own, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    keys = make_keys(rounds=2)
    plans = [
        *(make_plan(keys), make_plan(keys, place=1), make_plan(keys, bits=31), make_plan(keys, names="abc")),
        *(make_plan(make_keys(run="other")), make_plan(make_keys(n=5)), make_plan(make_keys(attempt="second"))),
    ]
    masks = [pair_mask(plan, own, "a", "b", public_key(other)) for plan in plans]
    masks.append(pair_mask(plans[0], own, "a", "c", public_key(other)))
    assert len({mask.tobytes() for mask in masks}) == len(masks) == 8
    back = pair_mask(plans[0], other, "b", "a", public_key(own))
    assert not (masks[0] + back).any()


def test_keys_that_seal_differ_by_direction_pair_and_agreement() -> None:
    own, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    plans = make_keys(), make_keys(attempt="second")
    keys = [seal_key(plan, own, public_key(other), *pair) for plan in plans for pair in ("ab", "ba", "ac")]
    assert len(set(keys)) == 6
    assert seal_key(plans[0], other, public_key(own), "a", "b") == keys[0]
