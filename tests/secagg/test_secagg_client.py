"""A client refuses every bad message with its reason, and gives out one of a peer's two seeds, once."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sums import (
    ANSWERS,
    HEADERS,
    IDENTITIES,
    LISTS,
    LOW_ORDER,
    SHAPES,
    WHOLE,
    Sum,
    body,
    flip,
    make_keys,
    make_plan,
    spoil,
)

from fedsb.secagg.keys import Keys, advert_bytes, pack_advert, public_key, sealed_bytes, sign_survivors
from fedsb.secagg.messages import SERVER, MessageError, Phase, SumError, members_bits, pack, pack_list, read_list

ANSWERS_TO_LISTS = tuple(LISTS)


# --- bad messages ---


@pytest.mark.parametrize("phase", ANSWERS_TO_LISTS)
def test_a_client_refuses_a_bad_message_and_the_round_continues(phase: Phase) -> None:
    world = Sum().to(phase)
    good = world.mail["a"]
    for changes, match in HEADERS:
        match = match.replace("the sender 'b'", "the sender 'b'; expected ''")
        with pytest.raises(MessageError, match=re.escape(match)):
            world.answer("a", spoil(good, **changes))
    for change, match in SHAPES:
        with pytest.raises(MessageError, match=match):
            world.answer("a", change(good))
    with pytest.raises(MessageError, match="the round 8; expected 7"):  # a replay from a different round
        world.answer("a", Sum(make_plan(make_keys(round=8))).to(phase).mail["a"])
    with pytest.raises(MessageError, match="different sites, threshold"):  # a replay from a different agreement
        world.answer("a", Sum(make_plan(make_keys(attempt="second"))).to(phase).mail["a"])
    with pytest.raises(MessageError, match=r"the phase '\w+'; expected"):  # reordered: a client's message, reflected
        world.answer("a", pack(world.now, ANSWERS[ANSWERS.index(phase) - 1], "a", body(good)))
    start = len(pack(world.now, LISTS[phase], SERVER, b""))
    with pytest.raises(MessageError, match="more clients than the plan's 4"):
        world.answer("a", flip(good, start))  # the last of 8 bits
    with pytest.raises(MessageError, match="torn"):
        world.answer("a", good[:start])
    assert world.finish().tolist() == WHOLE


@pytest.mark.parametrize("phase", ANSWERS_TO_LISTS)
@pytest.mark.parametrize(
    ("members", "match"),
    [("bcd", "lacks this client"), ("ab", "lists 2 clients; the threshold is 3"), ("", "lacks this client")],
)
def test_a_client_refuses_a_list_without_it_or_below_the_threshold(phase: Phase, members: str, match: str) -> None:
    world = Sum().to(phase)
    listed = LISTS[phase]
    own = "a" if listed == "inbox" else ""
    items = read_list(world.now, world.mail["a"], listed, world.width(listed), own)
    lie = pack_list(world.now, listed, SERVER, members, [items[name] for name in members])
    with pytest.raises(MessageError, match=match):
        world.answer("a", lie)
    assert world.finish().tolist() == WHOLE


@pytest.mark.parametrize(("phase", "gone"), [("held", "advert"), ("shares", "masked")])
def test_a_client_refuses_a_list_with_one_that_was_not_on_the_last(phase: Phase, gone: Phase) -> None:
    world = Sum().to(phase, {"d": gone})
    listed = LISTS[phase]
    owners = 3 if listed == "inbox" else 4
    with pytest.raises(MessageError, match=f"'{listed}' lists d, missing in the previous list"):
        world.answer("a", pack_list(world.now, listed, SERVER, "abcd", [bytes(world.width(listed))] * owners))
    assert world.finish().tolist() == [1 + 2 + 3] * 6


def test_a_client_refuses_survivors_that_are_not_in_the_sum() -> None:
    """A client without keys has no place in the lists of a sum."""
    world = Sum().to("confirm", {"d": "sealed"})
    assert world.plan.names == ("a", "b", "c")
    start = len(pack(world.plan, "survivors", SERVER, b""))
    with pytest.raises(MessageError, match="more clients than the plan's 3"):
        world.answer("a", world.mail["a"][:start] + b"\xf0")
    assert world.finish().tolist() == [1 + 2 + 3] * 6


def roster(world: Sum, **changes: bytes) -> bytes:
    """Returns the roster with different adverts for some clients."""
    adverts = read_list(world.now, world.mail["a"], "roster", advert_bytes(world.plan.keys)) | changes
    return pack_list(world.now, "roster", SERVER, adverts, adverts.values())


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_client_refuses_a_roster_with_keys_that_are_not_the_sites(rounds: int) -> None:
    world = Sum(make_plan(make_keys(rounds=rounds))).to("sealed")
    plan, mine, theirs = world.plan.keys, world.public("a"), world.public("b")
    new = [public_key(X25519PrivateKey.generate()) for _ in range(rounds + 1)]
    fresh = Keys(new[0], tuple(new[1:]))

    def advert(name: str, signer: str, keys: Keys) -> bytes:
        return pack_advert(plan, name, IDENTITIES[signer], keys)

    def last(keys: Keys, key: bytes) -> Keys:
        return Keys(keys.seal, (*keys.masks[:-1], key))

    others = make_keys(rounds=rounds, round=8), make_keys(rounds=rounds, attempt="second")
    for change, match in [
        ({"b": advert("b", "c", fresh)}, "keys of b are not signed"),  # the server's, in b's place
        ({"b": body(world.sent["advert", "c"])}, "keys of b are not signed"),
        *(
            ({"b": pack_advert(other, "b", IDENTITIES["b"], fresh)}, "keys of b are not signed")  # replays
            for other in others
        ),
        ({"a": advert("a", "a", fresh)}, "different keys under this client's name"),  # of an earlier attempt of a's
        ({"b": advert("b", "b", last(theirs, mine.masks[0]))}, "one key twice"),
        ({"b": advert("b", "b", theirs._replace(seal=mine.seal))}, "one key twice"),
        ({"c": advert("c", "c", fresh._replace(seal=theirs.seal))}, "one key twice"),
        ({"c": advert("c", "c", last(fresh, fresh.seal))}, "one key twice"),
        ({"b": advert("b", "b", fresh._replace(seal=LOW_ORDER))}, "low order"),
        ({"b": advert("b", "b", last(fresh, LOW_ORDER))}, "low order"),
    ]:
        with pytest.raises(MessageError, match=match):
            world.answer("a", roster(world, **change))
    assert world.finish().tolist() == WHOLE


def test_a_client_refuses_shares_that_were_not_sealed_for_it_by_their_sender_in_this_agreement() -> None:
    world = Sum(make_plan(make_keys(rounds=2))).to("held")
    width = sealed_bytes(world.plan.keys)
    items = read_list(world.now, world.mail["a"], "inbox", width, "a")
    b_for_c = read_list(world.now, world.mail["c"], "inbox", width, "c")["b"]
    from_a = read_list(world.now, world.mail["b"], "inbox", width, "b")["a"]
    again = Sum(world.plan).to("held")  # a different agreement with the same plan
    for changes, bad in [
        ({"b": flip(items["b"], 0)}, "b"),  # the nonce
        ({"c": flip(items["c"], 20)}, "c"),
        ({"d": flip(items["d"], -1)}, "d"),  # the tag
        ({"b": items["c"], "c": items["b"]}, "[bc]"),
        ({"b": b_for_c}, "b"),
        ({"b": from_a}, "b"),  # what a sealed for b, reflected
        ({"b": read_list(again.now, again.mail["a"], "inbox", width, "a")["b"]}, "b"),
    ]:
        lie = items | changes
        with pytest.raises(MessageError, match=f"the shares that {bad} sealed for this client cannot be decrypted"):
            world.answer("a", pack_list(world.now, "inbox", SERVER, lie, [lie[k] for k in "bcd"]))
    assert not world.keys["a"].members
    assert world.finish().tolist() == WHOLE


def test_shares_do_not_open_where_the_server_showed_two_rosters() -> None:
    world = Sum().to("sealed")
    width = sealed_bytes(world.plan.keys)
    adverts = read_list(world.now, world.mail["a"], "roster", advert_bytes(world.plan.keys))
    short = pack_list(world.now, "roster", SERVER, "abc", [adverts[k] for k in "abc"])
    answers = {"a": world.answer("a"), "b": world.answer("b", short)}
    for_a = body(answers["b"])[:width]  # a is the first of b's two peers
    world.phase = "held"
    inbox = pack_list(world.now, "inbox", SERVER, "abc", [for_a, bytes(width)])
    with pytest.raises(MessageError, match="the shares that b sealed for this client cannot be decrypted"):
        world.answer("a", inbox)


@pytest.mark.parametrize("vector", [np.zeros(5, np.uint32), np.zeros(7, np.uint32), np.zeros(6, np.int64)])
def test_a_client_refuses_a_vector_of_a_different_shape_or_type(vector: np.ndarray) -> None:
    world = Sum().to("masked")
    with pytest.raises(ValueError, match=r"expected uint32 \(6,\)"):
        world.client("a").masked(vector)
    assert world.finish().tolist() == WHOLE


# --- a client gives out one of two seeds, once ---


def test_a_client_answers_each_message_once_and_in_order() -> None:
    world = Sum()
    mails: dict[Phase, bytes] = {}
    for phase in ANSWERS:
        world.to(phase)
        mails[phase] = world.mail["a"]
        for due in ANSWERS:  # none but this one, before it
            if due != phase:
                with pytest.raises(SumError, match=r"a: '\w+' is not due, this client|has no keys in this agreement"):
                    world.ask(due, "a", mails.get(due, mails[phase]))
    world.finish()
    for due in ANSWERS:
        with pytest.raises(SumError, match="is not due, this client is done"):
            world.ask(due, "a", mails[due])


def test_a_client_cannot_be_asked_for_the_other_seed_of_a_peer() -> None:
    world = Sum().to("confirm")
    client, roster_sent = world.clients["a"], world.key_server.roster_message
    first = pack_list(world.plan, "survivors", SERVER, "abcd")
    second = pack_list(world.plan, "survivors", SERVER, "abc")  # d, which stayed, is said to have left
    client.confirm(first)
    with pytest.raises(SumError, match="'survivors' is not due"):
        client.confirm(second)
    signatures = [sign_survivors(world.plan, k, IDENTITIES[k], "abcd", roster_sent) for k in "abcd"]
    answer = client.unmask(pack_list(world.plan, "confirmed", SERVER, "abcd", signatures))
    assert len(body(answer)) == 16 * 4
    others = [sign_survivors(world.plan, k, IDENTITIES[k], "abc", roster_sent) for k in "abc"]
    with pytest.raises(SumError, match="done"):
        client.unmask(pack_list(world.plan, "confirmed", SERVER, "abc", others))


def test_a_server_with_two_lists_of_survivors_gets_no_shares() -> None:
    """n = 5, t = 3: answers to these would bring the server below a sum of three."""
    world = Sum(make_plan(make_keys(n=5, threshold=3))).to("confirm")
    lists = {"a": "ace", "b": "bce", "c": "cde", "d": "ade", "e": "bde"}
    signatures = {}
    for name, listed in lists.items():
        message = world.answer(name, pack_list(world.plan, "survivors", SERVER, listed))
        signatures[name] = body(message)
    world.phase = "shares"
    for name, listed in lists.items():
        with pytest.raises(MessageError, match="lists 1 clients; the threshold is 3"):
            world.answer(name, pack_list(world.plan, "confirmed", SERVER, name, [signatures[name]]))
        with pytest.raises(MessageError, match="did not sign the survivors"):
            world.answer(name, pack_list(world.plan, "confirmed", SERVER, listed, [signatures[k] for k in listed]))


@pytest.mark.parametrize("attempt", ["first", "second"])
def test_a_signature_of_one_agreement_is_not_valid_in_another(attempt: str) -> None:
    """Otherwise a server that repeats a plan collects signatures of many lists in sums that it gives up.

    It could then show each client a different list in the last one.
    """
    first, second = (Sum(make_plan(make_keys(n=5, threshold=3, attempt=a))).to("confirm") for a in ("first", attempt))
    listed = pack_list(first.plan, "survivors", SERVER, "abc")
    old = [body(first.answer(name, listed)) for name in "abc"]
    listed = pack_list(second.plan, "survivors", SERVER, "abc")
    new = [body(second.answer(name, listed)) for name in "abc"]
    second.phase = "shares"
    with pytest.raises(MessageError, match="b did not sign the survivors"):
        second.answer("a", pack_list(second.plan, "confirmed", SERVER, "abc", [new[0], old[1], new[2]]))
    assert second.answer("a", pack_list(second.plan, "confirmed", SERVER, "abc", new))


def test_a_client_gives_no_shares_on_forged_signatures() -> None:
    world = Sum().to("shares", {"d": "masked"})
    good = read_list(world.plan, world.mail["a"], "confirmed", 64)
    roster_sent = world.key_server.roster_message
    for bad in (
        bytes(64),
        good["c"],
        sign_survivors(world.plan, "b", IDENTITIES["b"], "abcd", roster_sent),
        sign_survivors(world.plan, "b", IDENTITIES["c"], "abc", roster_sent),
        sign_survivors(world.plan, "b", IDENTITIES["b"], "abc", flip(roster_sent, -1)),
        sign_survivors(make_plan(make_keys(round=8)), "b", IDENTITIES["b"], "abc", roster_sent),
        sign_survivors(make_plan(make_keys(attempt="second")), "b", IDENTITIES["b"], "abc", roster_sent),
    ):
        with pytest.raises(MessageError, match="b did not sign the survivors that this client received"):
            world.answer("a", pack_list(world.plan, "confirmed", SERVER, "abc", [good["a"], bad, good["c"]]))
    assert world.finish().tolist() == [6] * 6


def test_a_list_has_as_many_items_as_its_bits_say() -> None:
    plan = make_keys()
    width = advert_bytes(plan)
    message = pack(plan, "roster", SERVER, members_bits(plan, "abcd") + bytes(width * 3))
    with pytest.raises(MessageError, match="torn"):
        read_list(plan, message, "roster", width)
    with pytest.raises(MessageError, match="oversized"):
        read_list(plan, message, "roster", width - 33)
