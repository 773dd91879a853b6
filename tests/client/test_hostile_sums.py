"""A hostile coordinator in secure aggregation: no request, in any order, gives it a second sum of a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsb.client.store import DiskStore
from fedsb.privacy.mechanism import PrivacyBudgetExceededError
from fedsb.protocol.messages import NoKeys, SecAggPhase, Start, SumRequest
from fedsb.secagg.messages import MessageError, SumError
from fedsb.utils.errors import RefusalError
from support.hostile import CLIENT, SHARED, SUMS, Hostile, Settings, moved


def test_a_sum_with_strangers_fails_before_it_starts(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(SUMS), start=False)
    broadcast = world.broadcast(0)
    with pytest.raises(RefusalError, match="Secure aggregation with stranger"):
        world.ask("a", Start, rows={**world.rows(), "stranger": 5})
    with pytest.raises(RefusalError, match="has not started"):
        world.train(0, "a", broadcast)


def test_a_single_update_does_not_leave(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))
    with pytest.raises(RefusalError, match="the request asks for a single update"):
        world.train(0, "a")
    assert world.train(0, "a", sum=SumRequest(attempt="1", cohort=["a", "b", "c"])) == [NoKeys()]
    world.agree()
    with pytest.raises(RefusalError, match="the request asks for a single update"):
        world.train(0, "a", sum=None)


def test_an_update_that_is_not_masked_is_not_sent_as_if_it_was(settings: Settings, tmp_path: Path) -> None:
    """The site's rules would not have been applied to it."""
    world = Hostile(tmp_path, megabytes=0.0001)
    world.open(settings())
    with pytest.raises(RefusalError, match="secure_aggregation = false, but the request asks for a masked update"):
        world.train(0, "a", sum=SumRequest(attempt="1", cohort=["a", "b"]))
    with pytest.raises(RefusalError, match=r"allowed are 0.0001 MB"):
        world.train(0, "a")


@pytest.mark.parametrize("cohort", ["", "a", "bc", "abcd"])
def test_a_sum_of_others_or_of_too_few_is_refused_before_a_row_is_drawn(
    cohort: str, settings: Settings, tmp_path: Path
) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SHARED))
    world.agree()
    with pytest.raises(RefusalError, match=r"takes no part in a sum of|Secure aggregation with d: not in this site's"):
        world.train(0, "a", sum=SumRequest(attempt="1", cohort=list(cohort)))
    assert world.ledgers("a") == []


def test_keys_are_not_used_for_rounds_that_they_are_not_for(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SHARED, rounds=3))
    world.agree(round=1)
    for round in (0, 2):
        with pytest.raises(RefusalError, match="are not for round"):
            world.train(round, "a")
        world.agree(round=1)
    assert world.ledgers("a") == []


def test_a_sum_for_other_clients_with_used_keys_charges_no_noise(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, CLIENT))
    world.agree()
    world.train(0, "abc")
    with pytest.raises(SumError, match="are used up"):
        world.train(0, "a", sum=world.request("ab"))
    assert world.ledgers("a") == [1]
    assert len(world.unmask(world.masked(0, "abc")))


def test_a_round_is_summed_for_one_broadcast(settings: Settings, tmp_path: Path) -> None:
    """The coordinator could else choose the difference of two sums of one round."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))
    first = world.sum(0, "abc")
    assert np.array_equal(world.sum(0, "abc"), first)
    with pytest.raises(RefusalError, match="was done here for another broadcast"):
        world.train(0, "abc", world.broadcast(0, moved))


def test_a_sum_with_shares_of_noise_is_booked_at_the_site_and_begun_again_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    """The mean of many sums of one change would have no noise left."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, CLIENT))
    first = world.sum(0, "abc")
    assert np.array_equal(world.sum(0, "abc"), first)
    for name in world.sites:
        assert world.ledgers(name) == [1]
        world.restart(name)
    assert np.array_equal(world.sum(0, "abc"), first)


def test_another_change_in_the_same_round_is_beyond_the_promise(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, CLIENT))
    world.sum(0, "abc")
    stored = DiskStore.stored_round

    def doubled(self: DiskStore, round: int) -> Any:
        done = stored(self, round)
        assert done is not None and done.change is not None
        return replace(done, change=done.change * 2)

    monkeypatch.setattr(DiskStore, "stored_round", doubled)
    with pytest.raises(PrivacyBudgetExceededError):
        world.sum(0, "abc")


def test_sites_that_were_told_other_things_have_no_sum(settings: Settings, tmp_path: Path) -> None:
    """With rows, or a learning rate, by which the others count for nothing the sum would be one site's update."""
    server = {**SUMS["server"], "weighting": "samples"}

    def told(name: str, rows: dict[str, int], lr: float) -> None:
        world.describe(name, settings(server=server, train={"local_steps": 1, "lr": lr}))
        world.prepare(name)
        world.start(name, rows)

    for number, (rows, lr) in enumerate([({"a": 30, "b": 10**9, "c": 30}, 0.02), ({"a": 30, "b": 30, "c": 30}, 1e-12)]):
        world = Hostile(tmp_path / str(number), "abc")
        told("a", dict.fromkeys("abc", 30), 0.02)
        told("b", dict.fromkeys("abc", 30), 0.02)
        told("c", rows, lr)
        with pytest.raises(MessageError, match="belongs to a plan with different"):
            world.sum(0, "abc")


def test_changes_against_other_broadcasts_have_no_sum(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))
    world.agree()
    world.train(0, "c", world.broadcast(0, moved))
    server = world.masked(0, "ab")
    (reply,) = world.train(0, "c", world.broadcast(0, moved))
    with pytest.raises(MessageError, match="belongs to a plan with different"):
        server.receive("c", reply.payload)


def test_a_site_that_leaves_a_sum_tells_no_number(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(server={**SUMS["server"], "secagg_clip": 1e-9}))
    world.agree()
    (reply,) = world.train(0, "a")
    assert reply.left == "its change is not finite, or above server.secagg_clip; its own terminal says more"
    assert reply.parts == ()


def test_a_round_between_two_phases_changes_no_sum(settings: Settings, tmp_path: Path) -> None:
    """The record of who was in a sum is that of the sum's own round, and what goes in is of that round."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, rounds=2))
    world.agree(rounds=2)
    server = world.masked(0, "abc")
    world.train(1, "abc")
    with pytest.raises(SumError, match="This site has nothing in this sum"):
        world.unmask(server)
    wanted = world.sum(0, "abc")
    other = Hostile(tmp_path / "other", "abc")
    other.open(settings(SUMS, rounds=2))
    assert np.allclose(other.sum(0, "abc"), wanted, atol=1e-6)
    for again in (world, other):
        with pytest.raises(SumError, match="is already in a sum"):
            again.sum(0, "ab")


def test_shares_that_are_not_due_leave_the_sum_as_it_is(settings: Settings, tmp_path: Path) -> None:
    """Nothing is noted of who was in a sum before this site gives its shares for it."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))

    def ask_for_shares() -> None:
        for name in world.sites:
            with pytest.raises(SumError):
                world.phase(name, "shares", b"", str(world.attempts), 0)

    fields = {"attempt": "0", "round": 0, "rounds": 0, "cohort": ["a", "b", "c"]}
    for phase in ("sealed", "held", "confirm", "shares"):  # before the agreement
        assert world.ask("a", SecAggPhase, b"", phase=phase, **fields) == NoKeys()
    world.agree()
    ask_for_shares()  # before the masked change
    first = world.sum(0, "abc", ask_for_shares)
    ask_for_shares()  # once more
    assert np.array_equal(world.sum(0, "abc"), first)
