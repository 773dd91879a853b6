"""A hostile coordinator in a run with shared noise: a site adds a share of the noise once per round, to one sum."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsb.privacy.mechanism import PrivacyBudgetExceededError
from fedsb.protocol.messages import Start
from fedsb.reporting.run_directory import read_rows
from fedsb.secagg.messages import MessageError, SumError, pack_list
from fedsb.secagg.server import SumServer
from fedsb.utils.errors import RefusalError
from support.hostile import SHARED, Hostile, Settings, moved

FORCED = {**SHARED["privacy"], "noise": "shared"}


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> Hostile:
    """Three sites that have agreed on keys."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SHARED, rounds=2))
    world.agree()
    return world


def lists(world: Hostile, names: str) -> bytes:
    """The server's list of survivors in the first round's sum."""
    return pack_list(world.plan(0), "survivors", "", list(names))


@pytest.mark.parametrize(
    ("allow", "said"),
    [
        ({"epsilon_shared": 20.0}, None),
        ({"epsilon": 1000.0}, None),
        ({"epsilon": 1000.0, "epsilon_shared": 20.0}, None),
        ({"epsilon": 20.0}, "by allow.epsilon, which counts this site's own share of the noise alone, it spends"),
        ({"epsilon": 20.0, "epsilon_shared": 1000.0}, "allow.epsilon_shared limits that"),
        ({"epsilon": 1000.0, "epsilon_shared": 5.0}, "by allow.epsilon_shared it spends epsilon"),
    ],
)
def test_a_sites_two_limits_of_epsilon(
    allow: dict[str, Any], said: str | None, settings: Settings, tmp_path: Path
) -> None:
    """The run states an epsilon of at most 20 against the server; a share of the noise alone gives more."""
    privacy = {"unit": "example", "epsilon": 20.0, "clip_norm": 1.0, "delta": 1e-3}
    world = Hostile(tmp_path, "abc", delta=1e-3, **allow)
    world.open(settings(SHARED, {"privacy": privacy}, rounds=2), start=False)
    if said is None:
        assert world.ask("a", Start, rows=world.rows())
    else:
        with pytest.raises(RefusalError, match=re.escape(said)):
            world.ask("a", Start, rows=world.rows())
        assert world.ledgers("a") == []


def test_a_request_without_a_sum_draws_no_row(world: Hostile) -> None:
    with pytest.raises(RefusalError, match="but the request asks for a single update"):
        world.train(0, "a", sum=None)
    assert world.ledgers("a") == []


@pytest.mark.parametrize("restart", [False, True])
def test_a_repeated_broadcast_gets_the_stored_answer(restart: bool, world: Hostile) -> None:
    """With keys that are known, also the same bytes. What is masked is drawn and charged once."""
    server = world.masked(0, "abc")
    (first,) = world.train(0, "a")
    assert world.train(0, "a") == [first]
    values = world.unmask(server)
    if restart:
        for name in world.sites:
            world.restart(name)
    again = world.sum(0, "abc")  # with new keys
    (reply,) = world.train(0, "a")
    assert reply.parts != first.parts and reply.survivors == ["a", "b", "c"]
    assert np.array_equal(again, values)
    for name in world.sites:
        assert world.ledgers(name) == [1]


def test_sites_with_different_second_moments_have_no_sum(settings: Settings, tmp_path: Path) -> None:
    """Else a coordinator could suppress chosen values at all sites but one, whose gradients it would then have."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SHARED, {"privacy": {**SHARED["privacy"], "scale_then_privatize": True}}, rounds=2))
    world.agree()
    size = sum(x.numel() for x in world.state().tensors.values())
    all_alike, others = bytes([100] * size), bytes([100] * (size - 1) + [180])
    assert world.keys is not None
    server = SumServer(world.plan(0, moments=all_alike), world.keys)
    for name in "bc":
        (reply,) = world.train(0, name, moments=(all_alike,))
        server.receive(name, reply.payload)
    (reply,) = world.train(0, "a", moments=(others,))
    with pytest.raises(MessageError, match="belongs to a plan with different sites, threshold, size, clip"):
        server.receive("a", reply.payload)
    with pytest.raises(RefusalError, match="Round 1 was done here for another broadcast"):
        world.train(0, "a", moments=(all_alike,))


@pytest.mark.parametrize("scaled", [False, True])
def test_second_moments_that_do_not_fit_draw_no_row(scaled: bool, settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SHARED, {"privacy": {**SHARED["privacy"], "scale_then_privatize": scaled}}, rounds=2))
    size = sum(x.numel() for x in world.state().tensors.values())
    wrong = [(), (bytes(size - 1),), (b"",)] if scaled else [(bytes(size),)]
    for moments in wrong:
        world.agree()  # a site forgets its keys when it has refused a request
        with pytest.raises(RefusalError, match=f"bytes of second moments. Expected: {size * scaled}."):
            world.train(0, "a", moments=moments)
    assert world.ledgers("a") == []
    world.agree()
    world.train(0, "a", moments=(bytes(size),) * scaled)
    assert world.ledgers("a") == [1]


def test_a_repeated_broadcast_for_other_clients_gets_nothing(world: Hostile) -> None:
    world.train(0, "a")
    for cohort in ("ab", "ac"):
        with pytest.raises(RefusalError, match="takes no part in a sum of a, "):
            world.train(0, "a", sum=world.request(cohort))
        world.agree()
    world.sum(0, "abc")
    world.agree("ab")
    with pytest.raises(SumError, match="is already in a sum, with other clients than a, b"):
        world.unmask(world.masked(0, "ab"))
    assert world.ledgers("a") == world.ledgers("b") == [1]


def test_a_different_broadcast_for_the_same_round_is_refused(world: Hostile) -> None:
    """Also after a restart, with new keys, and if the answer to the first one never arrived."""
    world.train(0, "a")
    for restart in (False, True):
        if restart:
            for name in world.sites:
                world.restart(name)
        world.agree()
        with pytest.raises(RefusalError, match="Round 1 was done here for another broadcast"):
            world.train(0, "a", world.broadcast(0, moved))
    assert world.ledgers("a") == [1]


def test_shares_of_two_lists_are_not_given(world: Hostile) -> None:
    """The difference of two sums would be one site's gradients, with the noise of that site alone."""
    server = world.masked(0, "abc")
    attempt = server.plan.keys.attempt
    world.phase("a", "shares", lists(world, "abc"), attempt, 0)
    for names in ("ab", "abc"):
        with pytest.raises(SumError, match="'survivors' is not due, this client is done"):
            world.phase("a", "shares", lists(world, names), attempt, 0)
    for name in world.sites:
        world.restart(name)
    world.agree()
    world.masked(0, "abc")
    with pytest.raises(SumError, match="is already in a sum, with other clients than a, b"):
        world.phase("a", "shares", lists(world, "ab"), world.keys.plan.attempt, 0)
    assert len(world.phase("b", "shares", lists(world, "ab"), world.keys.plan.attempt, 0))  # its first list
    assert world.ledgers("a") == [1]


@pytest.mark.parametrize("names", ["bc", "a"])
def test_a_list_without_the_site_or_below_the_threshold_gets_no_share(names: str, world: Hostile) -> None:
    world.masked(0, "abc")
    with pytest.raises(MessageError, match=r"lacks this client|lists 1 clients; the threshold is 2"):
        world.phase("a", "shares", lists(world, names), world.keys.plan.attempt, 0)
    assert len(world.phase("a", "shares", lists(world, "abc"), world.keys.plan.attempt, 0))


def test_more_rounds_than_planned_are_beyond_the_budget(world: Hostile) -> None:
    """A site whose stored answers are lost draws again, and pays again."""
    world.agree(rounds=2)
    world.train(0, "a")
    for path in (world.folder / "a").glob("runs/*/rounds/*"):
        path.unlink()
    world.agree(rounds=2)
    world.train(0, "a")
    with pytest.raises(PrivacyBudgetExceededError):
        world.train(1, "a")
    assert world.ledgers("a") == [1, 1]


# --- another noise ---


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": {**SHARED["privacy"], "noise": "local"}},
        {"privacy": {**SHARED["privacy"], "noise_multiplier": 0.1}},
        {"privacy": {**SHARED["privacy"], "colluding_clients": 1}},
        {"server": {**SHARED["server"], "min_clients": 3}},
    ],
)
def test_a_run_keeps_its_noise(changes: dict[str, Any], world: Hostile, settings: Settings) -> None:
    with pytest.raises(RefusalError, match="began here with different settings"):
        world.describe("a", settings(SHARED, changes, rounds=2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"server": {"secure_aggregation": False}}, "Set server.secure_aggregation = true"),
        ({"train": {"local_steps": 2}}, "a round must be one step"),
        ({"server": {"secure_aggregation": True, "clients_per_round": 1}}, "impossible with 1 clients per round"),
        ({"privacy": {**FORCED, "colluding_clients": 3}}, "which 3 must stay and 3 may collude"),
    ],
)
def test_noise_that_cannot_be_shared_is_refused(
    changes: dict[str, Any], match: str, settings: Settings, tmp_path: Path
) -> None:
    world = Hostile(tmp_path, "abc")
    with pytest.raises(Exception, match=match):
        world.open(settings(SHARED, {"privacy": FORCED}, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": {**SHARED["privacy"], "noise": "local"}},
        {"privacy": {**SHARED["privacy"], "noise_multiplier": 4.0}},
        {"train": {**SHARED["train"], "batch_size": 2}},
        {"server": {**SHARED["server"], "min_clients": 3}},
    ],
)
def test_sites_with_different_noise_have_no_sum(changes: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    """The sum would have less noise than the ledgers of the others state, or one site's gradients in it."""
    world = Hostile(tmp_path, "abc")
    for name in "abc":
        world.describe(name, settings(SHARED, changes if name == "c" else {}))
        world.prepare(name)
        world.start(name, world.rows())
    with pytest.raises(MessageError, match="belongs to a plan with different"):
        world.sum(0, "abc")
    for name in "abc":
        with pytest.raises(SumError):
            world.phase(name, "shares", b"", str(world.attempts), 0)


def test_a_site_that_allows_only_larger_sums_takes_no_part(settings: Settings, tmp_path: Path) -> None:
    """Without signatures a server can learn sums of fewer clients than the threshold: of five, with three, two."""
    world = Hostile(tmp_path, "abcde", sum_clients=3)
    world.open(settings(SHARED, {"server": {**SHARED["server"], "min_clients": 3}}), start=False)
    with pytest.raises(RefusalError, match="it is of 2 clients at least, allowed are 3 or more"):
        world.ask("a", Start, rows=world.rows())
    other = Hostile(tmp_path / "four", "abcde", sum_clients=3)
    other.open(settings(SHARED, {"server": {**SHARED["server"], "min_clients": 4}}))


def test_a_site_states_no_private_loss_and_records_what_leaves(world: Hostile) -> None:
    (reply,) = world.train(0, "a", score=True)
    assert (reply.loss, reply.score, reply.left) == (None, None, None)
    last = read_rows(world.folder / "a" / "outbox.jsonl")[-1]
    assert last["what"] == "train: masked" and last["epsilon"] > 0
