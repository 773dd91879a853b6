"""Many sums with one agreement of keys: right, independent of each other, and each with keys that are used once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sums import OF_SUM, WHOLE, Sum, body, is_uniform, make_keys, make_plan

from fedsb.secagg.client import SumClient
from fedsb.secagg.keys import advert_bytes, mask_private, pair_mask, public_key, sealed_bytes
from fedsb.secagg.messages import SERVER, MessageError, SumError, SumPlan, pack_list, read_list
from fedsb.secagg.primitives import SEED_BYTES, combine
from fedsb.utils.errors import UserError

LARGE = 50_000  # values where a test looks at the bytes' distribution
BOTH = pytest.mark.parametrize("signed", [True, False])


def first(rounds: int = 3, *, n: int = 4, threshold: int = 3, size: int = 5, signed: bool = True) -> Sum:
    """Returns the first sum of an agreement for several rounds."""
    return Sum(make_plan(make_keys(n, threshold, rounds, signed=signed), size=size))


@BOTH
def test_the_sums_of_many_rounds_are_right_and_a_client_that_left_returns(signed: bool) -> None:
    world = first(5, n=5, signed=signed)
    assert world.finish().tolist() == [1 + 2 + 3 + 4 + 5] * 6
    phases = {phase for phase in world.answers if phase in OF_SUM}
    for place, gone in enumerate([{"a": "masked", "e": "masked"}, {"b": "shares"}, {"c": "masked"}, {}], start=1):
        later = world.following(place)
        for k, name in enumerate("abcde"):
            later.vectors[name][:] = 10**place * (k + 1)
        stay = [name for name in "abcde" if gone.get(name) != "masked"]
        assert later.finish(gone).tolist() == [10**place * sum("abcde".index(name) + 1 for name in stay)] * 6
        assert later.sums.survivors == tuple(stay)
        assert {phase for phase, _ in later.sent} == phases  # keys are not agreed on again


@BOTH
def test_rounds_may_be_skipped_and_come_in_any_order(signed: bool) -> None:
    world = Sum(make_plan(make_keys(rounds=4, signed=signed), place=2))
    assert world.finish({"d": "masked"}).tolist() == [6] * 6
    assert world.following(0).finish().tolist() == WHOLE
    assert world.following(3).finish({"a": "masked"}).tolist() == [9] * 6


def test_the_masks_of_rounds_are_independent() -> None:
    world = first(2, size=LARGE - 1)
    world.finish()
    later = world.following()
    later.finish()
    for name in "abcd":  # the vectors are the same in both rounds
        assert np.array_equal(world.vectors[name], later.vectors[name])
        assert is_uniform(world.masked(name) - later.masked(name))
        assert is_uniform(world.masked(name) + later.masked(name))
        assert is_uniform(world.own_mask(name) - later.own_mask(name))
        for peer in set("abcd") - {name}:
            assert is_uniform(world.pairs(name, peer) - later.pairs(name, peer))
    assert is_uniform(world.pairs("a", "b") - later.pairs("a", "c"))


def test_one_sum_may_have_fewer_clients_than_the_agreement() -> None:
    world = first(3, n=5)
    world.finish()
    for place, names in ((1, "abd"), (2, "bcde")):
        later = Sum(make_plan(world.plan.keys, place=place, names=names), world)
        assert later.finish().tolist() == [sum("abcde".index(name) + 1 for name in names)] * 6


# --- the keys of a round are used once ---


def plans_of_the_same_round(plan: SumPlan) -> list[SumPlan]:
    few = {name: plan.sites[name] for name in "abc"}
    return [
        plan,
        replace(plan, size=plan.size + 1),
        replace(plan, context="different settings"),
        replace(plan, sites=few, grid=replace(plan.grid, clients=3)),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_the_keys_of_a_round_are_used_once(kind: int) -> None:
    """Otherwise a server would ask for the other seed of a peer in a second sum."""
    world = first(2).to("masked")
    plan = plans_of_the_same_round(world.plan)[kind]
    world.client("a")
    with pytest.raises(SumError, match="a: the keys of round 8 are used up"):
        SumClient(plan, world.keys["a"])
    assert world.finish().tolist() == WHOLE
    with pytest.raises(SumError, match="b: the keys of round 8 are used up"):
        SumClient(plan, world.keys["b"])
    assert world.following().finish().tolist() == WHOLE


def test_a_client_that_was_not_asked_in_a_round_gives_shares_in_one_sum_of_it() -> None:
    world = first(2, n=5)
    late = Sum(make_plan(world.plan.keys, names="abce"), world.to("masked"))
    late.finish()
    for name in "abce":
        with pytest.raises(SumError, match="used up"):
            SumClient(world.plan, world.keys[name])
    SumClient(world.plan, world.keys["d"]).masked(world.vectors["d"])  # alone: too few for any unmasking


def test_a_sum_needs_keys_of_its_own_agreement() -> None:
    world = first(2).to("masked")
    for keys in (make_keys(rounds=2, attempt="second"), make_keys(rounds=2, round=6), make_keys(rounds=3)):
        with pytest.raises(SumError, match="from a different agreement"):
            SumClient(make_plan(keys), world.keys["a"])
    with pytest.raises(SumError, match="the sum of round 8 is without this client"):
        SumClient(make_plan(world.plan.keys, names="bcd"), world.keys["a"])
    assert world.finish().tolist() == WHOLE


@BOTH
def test_a_client_forgets_what_a_round_used_and_keeps_the_rest(signed: bool) -> None:
    world = first(2, signed=signed)
    world.finish({"d": "masked"})
    for name in "abc":
        client, keys = world.clients[name], world.keys[name]
        assert not client._shares and client._secrets is None
        assert keys._seeds[0] is None and not keys._shares[0]
        assert keys._seal_private is None  # what the server recorded cannot be opened later
        assert keys._seeds[1] is not None and set(keys._shares[1]) == set("abcd")
    assert world.following().finish().tolist() == WHOLE


# --- what one round reveals about the next ---


@BOTH
def test_the_seeds_of_one_round_open_nothing_of_the_next(signed: bool) -> None:
    world = first(2, size=LARGE - 1, signed=signed)
    world.finish({"d": "masked"})
    answers, places = {name: body(world.sent["shares", name]) for name in "abc"}, world.plan.keys.places
    seeds = [combine({places[k]: answers[k][SEED_BYTES * i : SEED_BYTES * (i + 1)] for k in "abc"}) for i in range(4)]
    assert seeds == [*(world.seeds[name].self for name in "abc"), world.seeds["d"].key]
    later = world.following()
    later.finish({"a": "masked"})
    public = world.public("d").masks
    own = mask_private(world.plan.keys, "d", seeds[3])
    assert public_key(own) == public[0] != public[1]
    pairs = [pair_mask(later.plan, own, "d", peer, world.public(peer).masks[1]) for peer in "abc"]
    assert is_uniform(later.masked("d") - np.sum(pairs, axis=0, dtype=np.uint32))
    assert all(is_uniform(later.masked(name) + pair) for name, pair in zip("bc", pairs[1:], strict=True))
    assert not {*seeds} & {seed for name in "abcd" for seed in later.seeds[name]}
    given = [{answer[i : i + SEED_BYTES] for i in range(0, len(answer), SEED_BYTES)} for answer in answers.values()]
    again = [body(later.sent["shares", name]) for name in "bcd"]
    assert not set.union(*given) & {answer[i : i + SEED_BYTES] for answer in again for i in range(0, 64, SEED_BYTES)}


# --- a malicious server ---


def test_a_threshold_below_half_of_all_clients_with_shares_is_refused() -> None:
    """With 8 clients and t = 3, a server could read the vector of a.

    It names a, b, c, d as the members of a sum to these and a, e, f, g, h to those. b, c and d answer that a stayed,
    and e, f, g and h that it left. Signatures do not help: each list has three of them.
    """
    with pytest.raises(UserError, match="threshold of 3 for 8 clients is invalid"):
        make_keys(n=8, threshold=3, rounds=2)
    of_four = make_keys(n=4, threshold=3)  # an agreement of the cohort alone
    assert Sum(make_plan(of_four)).finish().tolist() == WHOLE


def test_a_client_is_in_no_sum_with_one_whose_shares_it_lacks() -> None:
    """The server shows a an inbox without d, and names d as a member of the sum."""
    world = first().to("held")
    width = sealed_bytes(world.plan.keys)
    items = read_list(world.now, world.mail["a"], "inbox", width, "a")
    world.keys["a"].receive(pack_list(world.now, "inbox", SERVER, "abc", [items["b"], items["c"]]))
    assert world.keys["a"].members == set("abc")
    with pytest.raises(SumError, match="the sum is with d, which has no keys in this agreement"):
        SumClient(world.plan, world.keys["a"])


def test_keys_of_an_earlier_agreement_with_the_same_plan_open_nothing() -> None:
    """The server repeats a plan, and shows a the keys that b had in the first agreement."""
    old, new = first().to("held"), first().to("sealed")
    assert old.plan.digest == new.plan.digest
    width = sealed_bytes(new.plan.keys)
    adverts = read_list(new.now, new.mail["a"], "roster", advert_bytes(new.plan.keys))
    adverts["b"] = body(old.sent["advert", "b"])  # signed by b, for this very plan
    new.answer("a", pack_list(new.now, "roster", SERVER, "abcd", adverts.values()))
    sealed = {
        "new": body(new.answer("b"))[:width],
        "old": read_list(old.now, old.mail["a"], "inbox", width, "a")["b"],
    }
    new.phase = "held"
    for for_a in sealed.values():
        with pytest.raises(MessageError, match="the shares that b sealed for this client cannot be decrypted"):
            new.answer("a", pack_list(new.now, "inbox", SERVER, "abc", [for_a, bytes(width)]))


def test_a_signature_of_one_round_is_not_valid_in_the_next() -> None:
    world = first(2).to("shares")
    later = world.following().to("confirm")
    old = [body(world.sent["confirm", name]) for name in "abcd"]
    later.deliver()
    later.phase = "shares"
    with pytest.raises(MessageError, match="a did not sign the survivors"):
        later.answer("a", pack_list(later.plan, "confirmed", SERVER, "abcd", old))


def test_clients_of_different_agreements_do_not_understand_each_other() -> None:
    """A client that requires signatures opens nothing from one that does not."""
    world, other = first().to("sealed"), first(signed=False).to("sealed")
    adverts = read_list(world.now, world.mail["a"], "roster", advert_bytes(world.plan.keys))
    adverts["b"] = body(other.sent["advert", "b"])
    with pytest.raises(MessageError, match="the keys of b are not signed by that site"):
        world.answer("a", pack_list(world.now, "roster", SERVER, "abcd", adverts.values()))
