"""The server refuses every bad message with its reason, and the round continues to the right sum."""

from __future__ import annotations

import re

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sums import ANSWERS, HEADERS, IDENTITIES, LOW_ORDER, OF_SUM, SHAPES, WHOLE, Sum, flip, make_keys, make_plan, spoil

from fedsb.secagg.keys import Keys, pack_advert, public_key, sign_survivors
from fedsb.secagg.messages import MessageError, Phase, SumError, pack
from fedsb.secagg.server import SumServer


@pytest.mark.parametrize("phase", ANSWERS)
def test_the_server_refuses_a_bad_message_and_the_round_continues(phase: Phase) -> None:
    world = Sum().to(phase)
    good = world.answer("a")
    for changes, match in HEADERS:
        with pytest.raises(MessageError, match=re.escape(match)):
            world.server.receive("a", spoil(good, **changes))
    for change, match in SHAPES:
        with pytest.raises(MessageError, match=match):
            world.server.receive("a", change(good))
    with pytest.raises(MessageError, match="the round 8; expected 7"):  # a replay from a different round
        world.server.receive("a", Sum(make_plan(make_keys(round=8))).to(phase).answer("a"))
    with pytest.raises(MessageError, match="different sites, threshold"):  # and from a different agreement
        world.server.receive("a", Sum(make_plan(make_keys(attempt="second"))).to(phase).answer("a"))
    with pytest.raises(MessageError, match="the sender 'a'; expected 'b'"):  # in the name of a different client
        world.server.receive("b", good)
    with pytest.raises(MessageError, match="'z', which is not one of its clients"):
        world.server.receive("z", good)
    world.server.receive("a", good)
    with pytest.raises(MessageError, match=f"a second message '{phase}' from a"):
        world.server.receive("a", good)
    world.deliver(gone=["a"])
    total = world.sums.total() if phase == "shares" else (world.close(), world.finish())[1]
    assert total.tolist() == WHOLE


@pytest.mark.parametrize("phase", [phase for phase in ANSWERS if phase not in ("advert", "masked")])
def test_the_server_refuses_a_message_of_an_earlier_phase_and_of_a_client_that_left(phase: Phase) -> None:
    before = ANSWERS[ANSWERS.index(phase) - 1]
    world = Sum().to(before)
    late = world.answer("d")
    world.to(phase, {"d": before})
    with pytest.raises(MessageError, match="'d', which has left this round"):
        world.server.receive("d", late)
    with pytest.raises(MessageError, match=f"the phase '{before}'; expected '{phase}'"):
        world.server.receive("a", world.sent[before, "a"])
    assert world.finish().tolist() == (WHOLE if phase == "shares" else [1 + 2 + 3] * 6)


def test_the_server_of_a_sum_refuses_messages_of_the_keys_and_of_clients_without_them() -> None:
    world = Sum().to("held")
    late = world.answer("d")
    world.to("masked", {"d": "held"})
    with pytest.raises(MessageError, match="the phase 'held'; expected 'masked'"):
        world.server.receive("a", world.sent["held", "a"])
    with pytest.raises(MessageError, match="'d', which is not one of its clients"):
        world.server.receive("d", late)
    with pytest.raises(MessageError, match="but the sum is over"):
        world.key_server.receive("d", late)
    assert world.finish().tolist() == [1 + 2 + 3] * 6


def test_the_server_refuses_messages_when_it_is_over() -> None:
    world = Sum()
    world.finish()
    with pytest.raises(MessageError, match="but the sum is over"):
        world.server.receive("a", world.sent["shares", "a"])
    with pytest.raises(SumError, match="it is over"):
        world.sums.total()


def test_the_server_closes_its_phases_in_order() -> None:
    world = Sum()
    world.deliver()
    for close in (world.key_server.inboxes, world.key_server.close):
        with pytest.raises(SumError, match="it is in 'advert'"):
            close()
    world.close()
    with pytest.raises(SumError, match="it is in 'sealed'"):
        world.key_server.roster()
    world.to("masked").deliver()
    for close in (world.sums.confirmations, world.sums.total):
        with pytest.raises(SumError, match="it is in 'masked'"):
            close()
    world.close()
    with pytest.raises(SumError, match="it is in 'confirm'"):
        world.sums.survivors_lists()
    assert world.finish().tolist() == WHOLE


@pytest.mark.parametrize("phase", ["advert", "sealed", "held"])
def test_a_sum_cannot_begin_before_its_keys_are_agreed_on(phase: Phase) -> None:
    world = Sum().to(phase)
    world.deliver()
    with pytest.raises(SumError, match="the sum is with a, b, c, d, which has no keys in this agreement"):
        SumServer(world.plan, world.key_server)


def test_a_sum_cannot_use_keys_of_a_different_agreement() -> None:
    world = Sum().to("masked")
    with pytest.raises(SumError, match="from a different agreement"):
        SumServer(make_plan(make_keys(attempt="second")), world.key_server)


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_server_refuses_keys_that_are_not_the_sites_or_hide_nothing(rounds: int) -> None:
    world = Sum(make_plan(make_keys(rounds=rounds)))
    world.server.receive("b", world.answer("b"))
    plan, theirs = world.plan.keys, world.public("b")
    fresh, *new = (public_key(X25519PrivateKey.generate()) for _ in range(rounds + 1))
    first = tuple(new[:-1])
    for signer, keys, match in [
        ("c", Keys(fresh, tuple(new)), "the keys of a are not signed by that site"),
        ("a", Keys(fresh, (*first, fresh)), "a key twice"),
        ("a", Keys(fresh, (*first, theirs.masks[0])), "that of a different client"),
        ("a", Keys(theirs.seal, tuple(new)), "that of a different client"),
        ("a", Keys(fresh, (*first, theirs.seal)), "that of a different client"),
        ("a", Keys(LOW_ORDER, tuple(new)), "low order"),
        ("a", Keys(fresh, (*first, LOW_ORDER)), "low order"),
    ]:
        with pytest.raises(MessageError, match=match):
            world.server.receive("a", pack(plan, "advert", "a", pack_advert(plan, "a", IDENTITIES[signer], keys)))
    for other in (make_keys(rounds=rounds, round=8), make_keys(rounds=rounds, attempt="second")):
        signed_elsewhere = pack_advert(other, "a", IDENTITIES["a"], Keys(fresh, tuple(new)))
        with pytest.raises(MessageError, match="not signed"):
            world.server.receive("a", pack(plan, "advert", "a", signed_elsewhere))
    world.deliver(gone=["b"])
    world.close()
    assert world.finish().tolist() == WHOLE


def test_the_server_refuses_a_signature_of_other_survivors() -> None:
    world = Sum().to("confirm")
    roster = world.key_server.roster_message
    for signature in (
        sign_survivors(world.plan, "a", IDENTITIES["a"], "abc", roster),
        sign_survivors(world.plan, "a", IDENTITIES["b"], "abcd", roster),
        sign_survivors(world.plan, "b", IDENTITIES["a"], "abcd", roster),
        sign_survivors(world.plan, "a", IDENTITIES["a"], "abcd", flip(roster, -1)),
        sign_survivors(make_plan(make_keys(round=8)), "a", IDENTITIES["a"], "abcd", roster),
    ):
        with pytest.raises(MessageError, match="'confirm' from a is not a valid signature of the survivors"):
            world.server.receive("a", pack(world.plan, "confirm", "a", signature))
    assert world.finish().tolist() == WHOLE


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("share", "owner"), [(0, "a"), (3, "d")])  # of a's own mask; of the key of d, which left
def test_a_false_share_ends_the_round_without_a_sum(share: int, owner: str, signed: bool) -> None:
    world = Sum(make_plan(make_keys(signed=signed))).to("shares", {"d": "masked"})
    world.server.receive("b", flip(world.answer("b"), -16 * (4 - share)))
    world.deliver(gone=["b"])
    with pytest.raises(SumError, match=f"the shares of {owner}'s seed do not fit.*a, b, c"):
        world.sums.total()


def test_a_sum_that_fails_leaves_the_keys_of_the_next_round() -> None:
    world = Sum(make_plan(make_keys(rounds=2))).to("shares")
    world.server.receive("b", flip(world.answer("b"), -1))
    world.deliver(gone=["b"])
    with pytest.raises(SumError, match="do not fit"):
        world.sums.total()
    later = world.following()
    assert later.finish().tolist() == WHOLE
    assert {phase for phase, _ in later.sent} == set(OF_SUM)
