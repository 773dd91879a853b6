"""The server refuses every bad message by name, and the round goes on to the right sum."""

from __future__ import annotations

import re

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sums import ANSWERS, HEADERS, IDENTITIES, LOW_ORDER, SHAPES, WHOLE, Sum, flip, make_plan, spoil

from fedsb.secagg.keys import Keys, pack_advert, public_key, sign_survivors
from fedsb.secagg.messages import MessageError, Phase, SumError, pack


@pytest.mark.parametrize("phase", ANSWERS)
def test_the_server_refuses_a_bad_message_and_the_round_goes_on(phase: Phase) -> None:
    world = Sum().to(phase)
    good = world.answer("a")
    for changes, match in HEADERS:
        with pytest.raises(MessageError, match=re.escape(match)):
            world.server.receive("a", spoil(good, **changes))
    for change, match in SHAPES:
        with pytest.raises(MessageError, match=match):
            world.server.receive("a", change(good))
    with pytest.raises(MessageError, match="the round 8; expected 7"):  # a replay from another round
        world.server.receive("a", Sum(make_plan(round=8)).to(phase).answer("a"))
    with pytest.raises(MessageError, match="the sender 'a'; expected 'b'"):  # in another's name
        world.server.receive("b", good)
    with pytest.raises(MessageError, match="'z', which is not one of its clients"):
        world.server.receive("z", good)
    world.server.receive("a", good)
    with pytest.raises(MessageError, match=f"a second message '{phase}' from a"):
        world.server.receive("a", good)
    world.deliver(gone=["a"])
    total = world.server.total() if phase == "shares" else (world.close(), world.finish())[1]
    assert total.tolist() == WHOLE


@pytest.mark.parametrize("phase", ANSWERS[1:])
def test_the_server_refuses_a_message_of_an_earlier_phase_and_of_one_who_left(phase: Phase) -> None:
    before = ANSWERS[ANSWERS.index(phase) - 1]
    world = Sum().to(before)
    late = world.answer("d")
    world.to(phase, {"d": before})
    with pytest.raises(MessageError, match="'d', which has left this round"):
        world.server.receive("d", late)
    with pytest.raises(MessageError, match=f"the phase '{before}'; expected '{phase}'"):
        world.server.receive("a", world.sent[before, "a"])
    assert world.finish().tolist() == ([1 + 2 + 3] if phase in ("sealed", "masked", "confirm") else WHOLE[:1]) * 6


def test_the_server_refuses_messages_when_it_is_over() -> None:
    world = Sum()
    world.finish()
    with pytest.raises(MessageError, match="but the sum is over"):
        world.server.receive("a", world.sent["shares", "a"])
    with pytest.raises(SumError, match="it is over"):
        world.server.total()


def test_the_server_closes_its_phases_in_order() -> None:
    world = Sum()
    world.deliver()
    for close in (world.server.inboxes, world.server.survivors_lists, world.server.confirmations, world.server.total):
        with pytest.raises(SumError, match="it is in 'advert'"):
            close()
    world.close()
    with pytest.raises(SumError, match="it is in 'sealed'"):
        world.server.roster()
    assert world.finish().tolist() == WHOLE


def test_the_server_refuses_keys_that_are_not_the_sites_or_hide_nothing() -> None:
    world = Sum()
    world.server.receive("b", world.answer("b"))
    plan, theirs = world.plan, world.clients["b"]._keys
    fresh = [public_key(X25519PrivateKey.generate()) for _ in range(2)]
    for signer, keys, match in [
        ("c", Keys(*fresh), "the keys of a are not signed by that site"),
        ("a", Keys(fresh[0], fresh[0]), "a key twice"),
        ("a", Keys(fresh[0], theirs.mask), "that of a different client"),
        ("a", Keys(theirs.seal, fresh[0]), "that of a different client"),
        ("a", Keys(fresh[0], theirs.seal), "that of a different client"),
        ("a", Keys(LOW_ORDER, fresh[0]), "low order"),
        ("a", Keys(fresh[0], LOW_ORDER), "low order"),
    ]:
        with pytest.raises(MessageError, match=match):
            world.server.receive("a", pack(plan, "advert", "a", pack_advert(plan, "a", IDENTITIES[signer], keys)))
    signed_for_another_round = pack_advert(make_plan(round=8), "a", IDENTITIES["a"], Keys(*fresh))
    with pytest.raises(MessageError, match="not signed"):
        world.server.receive("a", pack(plan, "advert", "a", signed_for_another_round))
    world.deliver(gone=["b"])
    world.close()
    assert world.finish().tolist() == WHOLE


def test_the_server_refuses_a_signature_of_other_survivors() -> None:
    world = Sum().to("confirm")
    for signature in (
        sign_survivors(world.plan, "a", IDENTITIES["a"], "abc", world.server._roster),
        sign_survivors(world.plan, "a", IDENTITIES["b"], "abcd", world.server._roster),
        sign_survivors(world.plan, "b", IDENTITIES["a"], "abcd", world.server._roster),
        sign_survivors(make_plan(round=8), "a", IDENTITIES["a"], "abcd", world.server._roster),
    ):
        with pytest.raises(MessageError, match="'confirm' from a is not a valid signature of the survivors"):
            world.server.receive("a", pack(world.plan, "confirm", "a", signature))
    assert world.finish().tolist() == WHOLE


@pytest.mark.parametrize(("share", "owner"), [(0, "a"), (3, "d")])  # of a's own mask; of the key of d, who left
def test_a_false_share_ends_the_round_without_a_sum(share: int, owner: str) -> None:
    world = Sum().to("shares", {"d": "masked"})
    world.server.receive("b", flip(world.answer("b"), -16 * (4 - share)))
    world.deliver(gone=["b"])
    with pytest.raises(SumError, match=f"the shares of {owner}'s seed do not fit.*a, b, c"):
        world.server.total()
