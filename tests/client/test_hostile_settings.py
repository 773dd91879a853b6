"""A coordinator whose settings ask for more than a site allows, or for facts about its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import labelled_rows, write_rows
from fedsb.data.sources import load_table
from fedsb.privacy.accounting import Release
from fedsb.privacy.mechanism import PrivacyBudgetExceededError
from fedsb.protocol.messages import BasisGradient, Describe, Start, read_reply
from fedsb.utils.environment import versions
from fedsb.utils.errors import RefusalError, UserError
from support.hostile import CLASSES, CLIENT, EXAMPLE, SUMS, Hostile, Settings


def test_a_column_of_the_coordinators_choice_stays_where_rules_say_so(settings: Settings, tmp_path: Path) -> None:
    rows = [{**row, "name": f"patient {i}"} for i, row in enumerate(labelled_rows(30, 0))]
    world = Hostile(tmp_path, rows=rows, columns=["text", "label"], labels=["blue", "green", "red"])
    assert world.describe("a", settings()).labels == ["blue", "green", "red"]
    with pytest.raises(RefusalError, match="it reads name, allowed are text, label"):
        world.describe("a", settings(task={"label": "name"}))


def test_a_column_that_is_not_allowed_is_not_even_kept(settings: Settings, tmp_path: Path) -> None:
    """Some tasks read more where it is there."""
    rows = [{**row, "input": "secret"} for row in labelled_rows(30, 0)]
    world = Hostile(tmp_path, rows=rows, columns=["text", "label"])
    world.describe("a", settings())
    assert all(set(row) == {"text", "label"} for row in world.client("a").table.rows)


def test_another_revision_of_an_allowed_model_is_another_model(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    model = config["model"]["name"]
    elsewhere = {**config, "model": {**config["model"], "revision": "refs/pr/7"}}
    assert Hostile(tmp_path / "a", models=[model]).describe("a", config)
    with pytest.raises(RefusalError, match=r"the base model .*@refs/pr/7', allowed are"):
        Hostile(tmp_path / "b", models=[model]).describe("a", elsewhere)


def test_numbers_are_no_classes(settings: Settings, tmp_path: Path) -> None:
    rows = [{**row, "label": i / 7} for i, row in enumerate(labelled_rows(30, 0))]
    reply = Hostile(tmp_path, rows=rows).describe("a", settings(task={"kind": "regression"}))
    assert reply.labels == []


def test_a_pattern_that_never_ends_is_refused(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    config["model"]["target_modules"] = "((?:[a-z]|[a-z.]|[a-z0-9.])+)+[A-Z]"
    world = Hostile(tmp_path)
    world.describe("a", config)
    with pytest.raises(UserError, match="takes too long to match"):
        world.client("a").prepare(CLASSES, None)


def test_a_value_that_is_no_label_of_the_rules_is_not_told(settings: Settings, tmp_path: Path) -> None:
    rows = [{**row, "name": f"patient {i}"} for i, row in enumerate(labelled_rows(30, 0))]
    world = Hostile(tmp_path, rows=rows, labels=["blue", "green", "red"])
    with pytest.raises(RefusalError, match=r"none of allow.labels") as refused:
        world.describe("a", settings(task={"label": "name"}))
    assert "patient" not in str(refused.value)


def test_a_column_without_classes_is_told_by_nobody(settings: Settings, tmp_path: Path) -> None:
    """Without any rule of the site's own."""
    rows = [{**row, "name": f"patient {i}"} for i, row in enumerate(labelled_rows(30, 0))]
    with pytest.raises(RefusalError, match="a value of its own in nearly every row") as refused:
        Hostile(tmp_path, rows=rows).describe("a", settings(task={"label": "name"}))
    assert "patient" not in str(refused.value)
    named = Hostile(tmp_path / "named", rows=rows, labels=[row["name"] for row in rows])
    assert len(named.describe("a", settings(task={"label": "name"})).labels) == 30


def test_rows_are_not_counted_by_other_columns(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    assert world.describe("a", settings(data={"exclude": {"label": "red"}})).rows < 30
    with pytest.raises(RefusalError, match=r"data.exclude = text: the number of rows that remain would reveal"):
        world.describe("a", settings(data={"exclude": {"text": "red1 red2"}}))


@pytest.mark.parametrize("changes", [{}, SUMS, SUMS | CLIENT])
def test_no_sums_but_of_a_core_basis(changes: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(changes, basis={"kind": "random", "samples": 1}))
    with pytest.raises(RefusalError, match="'random' reads no row"):
        world.ask("a", BasisGradient, round=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"basis": {"kind": "core"}, **SUMS}, "every client sends the server something of its own"),
        ({"basis": {"kind": "core"}, **CLIENT, "server": {"weighting": "uniform"}}, "reads private rows"),
        ({**EXAMPLE, "train": {"dropout": 0.1}}, "train.dropout = 0.1 is not supported in a private run"),
        ({"basis": {"kind": "update-pooled"}}, "pools raw rows"),
    ],
)
def test_a_site_refuses_what_a_coordinator_should_have(
    changes: dict[str, Any], said: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(RefusalError, match=said):
        Hostile(tmp_path).describe("a", settings(changes))


def test_epsilon_is_for_the_sites_own_delta(settings: Settings, tmp_path: Path) -> None:
    """At a delta of 0.03 an epsilon of 3 is cheap; at 1e-5 it is another number."""
    lax = {
        "privacy": {"unit": "example", "epsilon": 3.0, "clip_norm": 1.0, "delta": 0.03},
        "basis": {"share_samples": 0},
    }
    world = Hostile(tmp_path, epsilon=3.0)
    world.open(settings(lax), start=False)
    with pytest.raises(RefusalError, match="at this site's delta of 1e-05"):
        world.ask("a", Start, rows=world.rows())


def test_the_cap_is_enforced_at_each_charge(settings: Settings, tmp_path: Path) -> None:
    """And not only at the start, for the plan: a run can deviate from it."""
    world = Hostile(tmp_path, epsilon=6.0, delta=1e-7)
    world.open(settings(EXAMPLE, {"rounds": 2}))
    rare = Release(sigma=0.05, q=2e-6)  # costs nothing at the plan's delta, and much at the site's own
    world.client("a").policy.mechanisms["a"].ledger.charge(rare, round=0, clip=1.0)
    with pytest.raises(PrivacyBudgetExceededError, match=r"at a delta of 1e-07. This site allows 6"):
        world.train(0, "a")
    assert world.ledgers("a") == [0]


def test_a_restarted_site_counts_its_own_run_once(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, epsilon=3.0)
    world.open(settings(EXAMPLE, {"rounds": 2}))
    broadcasts = [world.broadcast(0), world.broadcast(1)]
    for broadcast in broadcasts:
        world.train(0, "a", broadcast)
        world.restart("a")
    assert world.ledgers("a") == [1, 2]


@pytest.mark.parametrize("allow", [{"epsilon": 5.0}, {"losses": False}])
def test_what_may_not_leave_is_not_released(allow: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    released = {**EXAMPLE, "privacy": {**EXAMPLE["privacy"], "release": ["loss"]}}
    with pytest.raises(RefusalError, match="neither losses nor scores may leave"):
        Hostile(tmp_path, **allow).describe("a", settings(released))
    assert Hostile(tmp_path / "b", epsilon=5.0, losses=True).describe("a", settings(released))


def test_a_private_run_tells_no_counts_of_rows(settings: Settings, tmp_path: Path) -> None:
    """How many are cut at a max_tokens of the coordinator's choice is how many are longer."""
    world = Hostile(tmp_path)
    world.describe("a", settings(EXAMPLE))
    reply = world.prepare("a")
    assert (reply.cut, reply.unused, reply.labels) == (None, None, None)


def test_a_private_run_does_not_tell_how_many_rows_a_site_has_read(settings: Settings, tmp_path: Path) -> None:
    """Less the rows to train on it is how many have nothing to learn within the coordinator's max_tokens."""
    world = Hostile(tmp_path)
    assert world.describe("a", settings(EXAMPLE)).rows is None
    assert Hostile(tmp_path / "plain").describe("a", settings()).rows == 30


def test_a_site_tells_no_private_loss(settings: Settings, tmp_path: Path) -> None:
    """Without a rule of its own it tells a loss in a plain run, and in a private one where the run releases it."""
    released = {**EXAMPLE, "privacy": {**EXAMPLE["privacy"], "release": ["loss"]}}
    for number, (changes, told) in enumerate([(EXAMPLE, False), (released, True), ({}, True)]):
        world = Hostile(tmp_path / str(number))
        world.open(settings(changes))
        (reply,) = world.train(0, "a")
        assert (reply.loss is not None) is told


def test_a_sites_fingerprint_confirms_no_guess_and_shows_the_site_a_change(settings: Settings, tmp_path: Path) -> None:
    rows = labelled_rows(30, 0)
    world = Hostile(tmp_path, rows=rows)
    told = {name: world.describe(name, settings()).fingerprint for name in "ab"}
    plain = load_table(str(tmp_path / "a" / "rows.jsonl")).fingerprint
    assert len({plain, *told.values()}) == 3  # the sites have the same rows
    assert world.describe("a", settings()).fingerprint == told["a"]
    elsewhere = Describe(run="other", config=settings(), versions=versions())
    assert read_reply(world.sites["a"](elsewhere.pack()), elsewhere).fingerprint != told["a"]
    world.open(settings())
    broadcast = world.broadcast(0)
    write_rows(tmp_path / "a" / "rows.jsonl", [{**rows[0], "text": "green1 green2"}, *rows[1:]])
    world.restart("a")
    with pytest.raises(RefusalError, match="This run began here with different rows of this site"):
        world.train(0, "a", broadcast)
