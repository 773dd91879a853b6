"""Sums without signatures of the survivors: one exchange less, one list per client, and every client in every sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sums import LISTS, WHOLE, Sum, body, make_keys, make_plan

from fedsb.secagg.client import SumClient
from fedsb.secagg.keys import sealed_bytes
from fedsb.secagg.messages import SERVER, MessageError, Phase, SumError, pack_list, read_list
from fedsb.secagg.server import SumServer


def unsigned(n: int = 4, threshold: int = 3, rounds: int = 2) -> Sum:
    return Sum(make_plan(make_keys(n, threshold, rounds, signed=False)))


def test_a_sum_takes_one_exchange_less() -> None:
    world = unsigned()
    assert world.finish().tolist() == WHOLE
    later = world.following()
    assert later.finish().tolist() == WHOLE
    assert [phase for phase, name in later.sent if name == "a"] == ["masked", "shares"]
    with pytest.raises(SumError, match="cannot close 'confirm'"):
        later.sums.confirmations()


@pytest.mark.parametrize("gone", ["", "a", "e", "ae", "bc"])
@pytest.mark.parametrize("silent", ["", "b", "d"])
def test_clients_may_vanish_before_masked_and_before_shares(gone: str, silent: str) -> None:
    world = unsigned(n=7, threshold=4)
    total = world.finish(dict.fromkeys(silent, "shares") | dict.fromkeys(gone, "masked"))
    stay = [name for name in "abcdefg" if name not in gone]
    assert total.tolist() == [sum("abcdefg".index(name) + 1 for name in stay)] * 6
    assert world.sums.survivors == tuple(stay)
    assert world.following().finish({"f": "masked"}).tolist() == [1 + 2 + 3 + 4 + 5 + 7] * 6


@pytest.mark.parametrize("phase", ["advert", "masked", "shares"])
def test_below_the_threshold_the_round_fails(phase: Phase) -> None:
    with pytest.raises(SumError, match=rf"2 of 4 clients sent '{phase}'; the threshold is 3.*Missing: b, d"):
        unsigned().finish(dict.fromkeys("bd", phase))


@pytest.mark.parametrize("phase", ["sealed", "held"])
def test_a_client_that_leaves_with_half_of_its_keys_ends_the_agreement(phase: Phase) -> None:
    world = unsigned(n=5, threshold=3).to(phase, {"e": "advert"})
    world.deliver(gone=["c"])
    with pytest.raises(SumError, match=rf"3 of 5 clients sent '{phase}'; without signatures all 4 with keys must.*: c"):
        world.close()
    world.server.receive("c", world.answer("c"))  # late, but not too late
    world.close()
    assert world.finish().tolist() == [1 + 2 + 3 + 4] * 6


# --- one list per client ---


def test_a_client_answers_exactly_one_list() -> None:
    world = unsigned().to("shares")
    answer = world.answer("a", pack_list(world.plan, "survivors", SERVER, "abc"))
    assert len(body(answer)) == 16 * 4
    assert world.clients["a"].survivors == ("a", "b", "c")
    for members in ("abc", "abcd", "abd"):
        with pytest.raises(SumError, match="'survivors' is not due, this client is done"):
            world.answer("a", pack_list(world.plan, "survivors", SERVER, members))
    for plan in (world.plan, replace(world.plan, context="again")):
        with pytest.raises(SumError, match="used up"):
            SumClient(plan, world.keys["a"])


def test_a_client_answers_no_phase_of_signed_sums() -> None:
    world = unsigned().to("shares")
    for _ in range(2):
        with pytest.raises(SumError, match="'confirm' is not due, this sum is without signatures"):
            world.clients["a"].confirm(world.mail["a"])
    signed = Sum().to("confirm")
    with pytest.raises(SumError, match="'confirmed' is not due"):  # signatures cannot be skipped
        signed.clients["a"].unmask(signed.mail["a"])
    with pytest.raises(MessageError, match="different sites, threshold"):  # of an agreement with signatures
        world.answer("a", Sum(make_plan(make_keys(rounds=2))).to("confirm").mail["a"])
    assert world.finish().tolist() == WHOLE


def test_a_client_refuses_bad_lists_and_then_answers_the_right_one() -> None:
    world = unsigned().to("shares")
    later = unsigned().to("masked")
    later.finish()
    for members, match in [("bcd", "lacks this client"), ("ab", "lists 2 clients; the threshold is 3")]:
        with pytest.raises(MessageError, match=match):
            world.answer("a", pack_list(world.plan, "survivors", SERVER, members))
    with pytest.raises(MessageError, match="the round 8; expected 7"):  # of the next round
        world.answer("a", later.following().to("shares").mail["a"])
    assert world.finish().tolist() == WHOLE


# --- all clients with keys are in every sum ---


def test_a_client_refuses_an_inbox_without_a_client_of_the_roster() -> None:
    """Otherwise a server could bring clients to different members of one sum. See test_threshold.py."""
    world = unsigned().to("held")
    items = read_list(world.now, world.mail["a"], LISTS["held"], sealed_bytes(world.plan.keys), "a")
    with pytest.raises(MessageError, match="'inbox' lists 3 clients; without signatures it is all 4"):
        world.answer("a", pack_list(world.now, "inbox", SERVER, "abc", [items["b"], items["c"]]))
    assert world.finish().tolist() == WHOLE


def test_a_sum_without_one_of_the_clients_is_refused_by_the_others_and_by_the_server() -> None:
    world = unsigned().to("masked")
    few = make_plan(world.plan.keys, names="abc")
    with pytest.raises(SumError, match=r"the sum is without d\. Without signatures it is among all clients"):
        SumClient(few, world.keys["a"])
    with pytest.raises(SumError, match="the sum is without d"):
        SumServer(few, world.key_server)
    assert world.finish().tolist() == WHOLE


def test_a_site_that_was_offline_for_the_agreement_is_not_missed() -> None:
    world = unsigned(n=5, threshold=3)
    assert world.finish({"b": "advert"}).tolist() == [1 + 3 + 4 + 5] * 6
    assert world.following().finish({"c": "masked"}).tolist() == [1 + 4 + 5] * 6
