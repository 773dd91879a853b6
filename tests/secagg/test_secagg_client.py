"""A client refuses every bad message by name, and gives out one of a peer's two seeds, once."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sums import ANSWERS, HEADERS, IDENTITIES, LOW_ORDER, SHAPES, WHOLE, Sum, body, flip, make_plan, spoil

from fedsb.secagg.client import SumClient
from fedsb.secagg.keys import ADVERT_BYTES, SEALED_BYTES, Keys, pack_advert, public_key, sign_survivors
from fedsb.secagg.messages import SERVER, MessageError, Phase, SumError, members_bits, pack, pack_list, read_list

PHASES_TOLD: dict[Phase, Phase] = {"sealed": "roster", "masked": "inbox", "confirm": "survivors", "shares": "confirmed"}


# --- bad messages ---


@pytest.mark.parametrize("phase", ANSWERS[1:])
def test_a_client_refuses_a_bad_message_and_the_round_goes_on(phase: Phase) -> None:
    world = Sum().to(phase)
    good = world.mail["a"]
    for changes, match in HEADERS:
        match = match.replace("the sender 'b'", "the sender 'b'; expected ''")
        with pytest.raises(MessageError, match=re.escape(match)):
            world.answer("a", spoil(good, **changes))
    for change, match in SHAPES:
        with pytest.raises(MessageError, match=match):
            world.answer("a", change(good))
    with pytest.raises(MessageError, match="the round 8; expected 7"):  # a replay from another round
        world.answer("a", Sum(make_plan(round=8)).to(phase).mail["a"])
    with pytest.raises(MessageError, match=r"the phase '\w+'; expected"):  # reordered: a client's message, reflected
        world.answer("a", world.sent[ANSWERS[ANSWERS.index(phase) - 1], "a"])
    start = len(pack(world.plan, PHASES_TOLD[phase], SERVER, b""))
    with pytest.raises(MessageError, match="more clients than the plan's 4"):
        world.answer("a", flip(good, start))  # the last of 8 bits
    with pytest.raises(MessageError, match="torn"):
        world.answer("a", good[:start])
    assert world.finish().tolist() == WHOLE


@pytest.mark.parametrize("phase", ANSWERS[1:])
@pytest.mark.parametrize(
    ("members", "match"),
    [("bcd", "lacks this client"), ("ab", "lists 2 clients; the threshold is 3"), ("", "lacks this client")],
)
def test_a_client_refuses_a_list_without_it_or_below_the_threshold(phase: Phase, members: str, match: str) -> None:
    world = Sum().to(phase)
    told = PHASES_TOLD[phase]
    width = {"roster": ADVERT_BYTES, "inbox": SEALED_BYTES, "survivors": 0, "confirmed": 64}[told]
    items = read_list(world.plan, world.mail["a"], told, width, "a" if told == "inbox" else "")
    lie = pack_list(world.plan, told, SERVER, members, [items[name] for name in members])
    with pytest.raises(MessageError, match=match):
        world.answer("a", lie)
    assert world.finish().tolist() == WHOLE


@pytest.mark.parametrize(("phase", "gone"), [("masked", "advert"), ("confirm", "sealed"), ("shares", "masked")])
def test_a_client_refuses_a_list_with_one_who_was_not_on_the_last(phase: Phase, gone: Phase) -> None:
    world = Sum().to(phase, {"d": gone})
    told = PHASES_TOLD[phase]
    width = {"inbox": SEALED_BYTES, "survivors": 0, "confirmed": 64}[told]
    owners = 3 if told == "inbox" else 4
    with pytest.raises(MessageError, match=f"'{told}' lists d, missing in the previous list"):
        world.answer("a", pack_list(world.plan, told, SERVER, "abcd", [bytes(width)] * owners))
    assert world.finish().tolist() == [1 + 2 + 3] * 6


def roster(world: Sum, **changes: bytes) -> bytes:
    """The roster with other adverts for some."""
    adverts = read_list(world.plan, world.mail["a"], "roster", ADVERT_BYTES) | changes
    return pack_list(world.plan, "roster", SERVER, adverts, adverts.values())


def test_a_client_refuses_a_roster_with_keys_that_are_not_the_sites() -> None:
    world = Sum().to("sealed")
    plan, mine, theirs = world.plan, world.clients["a"]._keys, world.clients["b"]._keys
    fresh = [public_key(X25519PrivateKey.generate()) for _ in range(2)]

    def advert(name: str, signer: str, *keys: bytes) -> bytes:
        return pack_advert(plan, name, IDENTITIES[signer], Keys(*keys))

    for change, match in [
        ({"b": advert("b", "c", *fresh)}, "keys of b are not signed"),  # the server's, in b's place
        ({"b": body(world.sent["advert", "c"])}, "keys of b are not signed"),
        ({"b": pack_advert(make_plan(round=8), "b", IDENTITIES["b"], Keys(*fresh))}, "keys of b are not signed"),
        ({"a": advert("a", "a", *fresh)}, "different keys under this client's name"),  # of an earlier try of a's
        ({"b": advert("b", "b", theirs.seal, mine.mask)}, "one key twice"),
        ({"b": advert("b", "b", mine.seal, theirs.mask)}, "one key twice"),
        ({"c": advert("c", "c", theirs.seal, fresh[0])}, "one key twice"),
        ({"c": advert("c", "c", fresh[0], fresh[0])}, "one key twice"),
        ({"b": advert("b", "b", LOW_ORDER, fresh[0])}, "low order"),
        ({"b": advert("b", "b", fresh[0], LOW_ORDER)}, "low order"),
    ]:
        with pytest.raises(MessageError, match=match):
            world.answer("a", roster(world, **change))
    assert world.finish().tolist() == WHOLE


def test_a_client_refuses_shares_that_were_not_sealed_for_it_by_their_sender_in_this_sum() -> None:
    world = Sum().to("masked")
    items = read_list(world.plan, world.mail["a"], "inbox", SEALED_BYTES, "a")
    b_for_c = read_list(world.plan, world.mail["c"], "inbox", SEALED_BYTES, "c")["b"]
    from_a = read_list(world.plan, world.mail["b"], "inbox", SEALED_BYTES, "b")["a"]
    for changes, bad in [
        ({"b": flip(items["b"], 0)}, "b"),  # the nonce
        ({"c": flip(items["c"], 20)}, "c"),
        ({"d": flip(items["d"], -1)}, "d"),  # the tag
        ({"b": items["c"], "c": items["b"]}, "[bc]"),
        ({"b": b_for_c}, "b"),
        ({"b": from_a}, "b"),  # what a sealed for b, reflected
    ]:
        lie = items | changes
        with pytest.raises(MessageError, match=f"the shares that {bad} sealed for this client cannot be decrypted"):
            world.answer("a", pack_list(world.plan, "inbox", SERVER, lie, [lie[k] for k in "bcd"]))
    assert world.finish().tolist() == WHOLE


def test_shares_do_not_open_where_the_server_showed_two_rosters() -> None:
    world = Sum().to("sealed")
    adverts = read_list(world.plan, world.mail["a"], "roster", ADVERT_BYTES)
    short = pack_list(world.plan, "roster", SERVER, "abc", [adverts[k] for k in "abc"])
    answers = {"a": world.answer("a"), "b": world.answer("b", short)}
    for_a = body(answers["b"])[32 : 32 + SEALED_BYTES]  # a is the first of b's two peers
    world.phase = "masked"
    inbox = pack_list(world.plan, "inbox", SERVER, "abc", [for_a, bytes(SEALED_BYTES)])
    with pytest.raises(MessageError, match="the shares that b sealed for this client cannot be decrypted"):
        world.answer("a", inbox)


@pytest.mark.parametrize("vector", [np.zeros(5, np.uint32), np.zeros(7, np.uint32), np.zeros(6, np.int64)])
def test_a_client_refuses_a_vector_of_another_shape_or_type(vector: np.ndarray) -> None:
    world = Sum().to("masked")
    with pytest.raises(ValueError, match=r"expected uint32 \(6,\)"):
        world.clients["a"].masked(world.mail["a"], vector)
    assert world.finish().tolist() == WHOLE


# --- a client gives out one of two seeds, once ---


def test_a_client_answers_each_message_once_and_in_order() -> None:
    world = Sum()
    mails: dict[Phase, bytes] = {}
    for phase in ANSWERS:
        world.to(phase)
        mails[phase] = world.mail["a"]
        client = world.clients["a"]
        for due in ANSWERS:  # none but this one, before it
            if due != phase:
                with pytest.raises(SumError, match=r"a: '\w+' is not due, this client waits for"):
                    ask(client, due, mails.get(due, mails[phase]), world.vectors["a"])
    world.finish()
    for due in ANSWERS:
        with pytest.raises(SumError, match="is not due, this client is done"):
            ask(client, due, mails[due], world.vectors["a"])


def ask(client: SumClient, phase: Phase, mail: bytes, vector: np.ndarray) -> bytes:
    calls = {"sealed": client.share_keys, "confirm": client.confirm, "shares": client.unmask}
    if phase == "advert":
        return client.advertise()
    return client.masked(mail, vector) if phase == "masked" else calls[phase](mail)


def test_a_client_cannot_be_asked_for_the_other_seed_of_a_peer() -> None:
    world = Sum().to("confirm")
    client = world.clients["a"]
    first = pack_list(world.plan, "survivors", SERVER, "abcd")
    second = pack_list(world.plan, "survivors", SERVER, "abc")  # d, who stayed, is said to have left
    client.confirm(first)
    with pytest.raises(SumError, match="'survivors' is not due"):
        client.confirm(second)
    signatures = [sign_survivors(world.plan, k, IDENTITIES[k], "abcd", world.server._roster) for k in "abcd"]
    answer = client.unmask(pack_list(world.plan, "confirmed", SERVER, "abcd", signatures))
    assert len(body(answer)) == 16 * 4
    others = [sign_survivors(world.plan, k, IDENTITIES[k], "abc", world.server._roster) for k in "abc"]
    with pytest.raises(SumError, match="done"):
        client.unmask(pack_list(world.plan, "confirmed", SERVER, "abc", others))


def test_a_server_that_tells_two_tales_of_who_stayed_gets_no_shares() -> None:
    """n = 5, t = 3: answers to these would bring the server below a sum of three."""
    world = Sum(make_plan(n=5, threshold=3)).to("confirm")
    tales = {"a": "ace", "b": "bce", "c": "cde", "d": "ade", "e": "bde"}
    signatures = {}
    for name, tale in tales.items():
        message = world.answer(name, pack_list(world.plan, "survivors", SERVER, tale))
        signatures[name] = body(message)
    world.phase = "shares"
    for name, tale in tales.items():
        with pytest.raises(MessageError, match="lists 1 clients; the threshold is 3"):
            world.answer(name, pack_list(world.plan, "confirmed", SERVER, name, [signatures[name]]))
        with pytest.raises(MessageError, match="did not sign the survivors"):
            world.answer(name, pack_list(world.plan, "confirmed", SERVER, tale, [signatures[k] for k in tale]))


def test_a_signature_of_one_attempt_is_none_of_another() -> None:
    """Else a server collects those of many tales in sums that it gives up, and tells each client another at last."""
    first, second = (Sum(make_plan(n=5, threshold=3)).to("confirm") for _ in range(2))
    tale = pack_list(first.plan, "survivors", SERVER, "abc")
    old = [body(first.answer(name, tale)) for name in "abc"]
    new = [body(second.answer(name, tale)) for name in "abc"]
    second.phase = "shares"
    with pytest.raises(MessageError, match="b did not sign the survivors"):
        second.answer("a", pack_list(second.plan, "confirmed", SERVER, "abc", [new[0], old[1], new[2]]))
    assert second.answer("a", pack_list(second.plan, "confirmed", SERVER, "abc", new))


def test_a_client_gives_no_shares_on_forged_signatures() -> None:
    world = Sum().to("shares", {"d": "masked"})
    good = read_list(world.plan, world.mail["a"], "confirmed", 64)
    for bad in (
        bytes(64),
        good["c"],
        sign_survivors(world.plan, "b", IDENTITIES["b"], "abcd", world.server._roster),
        sign_survivors(world.plan, "b", IDENTITIES["c"], "abc", world.server._roster),
        sign_survivors(make_plan(round=8), "b", IDENTITIES["b"], "abc", world.server._roster),
    ):
        with pytest.raises(MessageError, match="b did not sign the survivors that this client received"):
            world.answer("a", pack_list(world.plan, "confirmed", SERVER, "abc", [good["a"], bad, good["c"]]))
    assert world.finish().tolist() == [6] * 6


def test_a_list_has_as_many_items_as_its_bits_say() -> None:
    plan = make_plan()
    message = pack(plan, "roster", SERVER, members_bits(plan, "abcd") + bytes(ADVERT_BYTES * 3))
    with pytest.raises(MessageError, match="torn"):
        read_list(plan, message, "roster", ADVERT_BYTES)
    with pytest.raises(MessageError, match="oversized"):
        read_list(plan, message, "roster", ADVERT_BYTES - 33)
