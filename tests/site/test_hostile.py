"""A coordinator that asks a site for what it likes, in whatever order: each request by itself must be safe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import labelled_rows, set_all, write_rows
from engines.in_process import Federation
from fedsb.adapters.basis import basis_hash
from fedsb.config.load import load_config
from fedsb.data.sources import load_table
from fedsb.models.tokenizer import tokenizer_fingerprint
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.mechanism import DPMechanism, PrivacyBudgetExceededError
from fedsb.protocol.messages import Note, Phase, pack_note, read_answer, read_note
from fedsb.protocol.payload import Payload, pack
from fedsb.protocol.tensors import to_arrays
from fedsb.secagg.protocol import MessageError, SumError, SumServer
from fedsb.training.trainer import Trainer
from fedsb.utils.environment import versions
from fedsb.utils.errors import RefusalError, UserError
from laws.test_engines import remote_of

RUN = "abc1"
OUTSIDE = {"out": True, "compare": True, "data": {"train", "test"}}
EXAMPLE = {"privacy": {"unit": "example", "epsilon": 3.0, "clip": 1.0}, "basis": {"share_samples": 0}}
CLIENT = {"privacy": {"unit": "client", "noise_multiplier": 2.0, "clip": 0.5, "delta": 1e-3}}
SUMS = {"server": {"weighting": "uniform", "secure_aggregation": True, "min_clients": 2}}

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tiny_config: dict[str, Any]) -> Settings:
    """A run's settings as they travel."""

    def make(*changes: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        config = set_all(remote_of(tiny_config, {"rounds": 1, "clients": {"holdout_fraction": 0.0}}), **more)
        for change in changes:
            config = set_all(config, **change)
        return load_config(config).config.model_dump(mode="json", exclude=OUTSIDE)

    return make


class Hostile:
    """Speaks to sites with 30 rows each, past all that a coordinator checks for itself."""

    def __init__(self, folder: Path, names: str = "ab", rows: list[dict[str, Any]] | None = None, **allow: Any) -> None:
        own = {name: rows or labelled_rows(30, number) for number, name in enumerate(names)}
        self.federation, self.folder = Federation(folder, own, {"allow": allow}), folder
        self.sites = {name: self.federation.restarted(name) for name in names}

    def ask(self, name: str, verb: str, *parts: bytes, **facts: Any) -> Note:
        return read_note(self.sites[name](pack_note(Note(verb, {"run": RUN, **facts}, parts))))

    def look(self, name: str, config: dict[str, Any]) -> Note:
        return self.ask(name, "look", config=config, versions=versions())

    def open(self, config: dict[str, Any], *, start: bool = True) -> None:
        for name in self.sites:
            self.look(name, config)
            part = self.part(name)
            part.open(["blue", "green", "red"])
            own = {"model": part.trainer.base.fingerprint, "tokenizer": tokenizer_fingerprint(part.tokenizer)}
            self.ask(name, "open", label_names=["blue", "green", "red"], **own)
            if start:
                self.ask(name, "start", rows=self.rows())

    def rows(self) -> dict[str, int]:
        return dict.fromkeys(self.sites, 30)

    def part(self, name: str) -> Any:
        part = self.sites[name].part
        assert part is not None
        return part

    def broadcast(self, round: int, change: Callable[[Any], Any] = lambda message: message) -> bytes:
        part = self.part("a")
        state = part._state(part._derived())
        message = change(to_arrays(part.method.broadcast(state)))
        return pack(Payload(kind="broadcast", run=RUN, round=round, basis=basis_hash(state.shared), tensors=message))

    def train(self, round: int, names: str, broadcast: bytes | None = None) -> None:
        for name in names:
            self.ask(name, "round", broadcast or self.broadcast(round), rank=None, versions=versions())

    def sum(self, round: int, names: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """The values of a sum of `names`, of a cohort of all."""
        part, cohort = self.part("a"), sorted(self.sites)
        pending = part.sums._pending()
        plan = part.sums._sums.terms(round, pending.basis, self.federation.directory, pending.against).plan(
            len(pending.change)
        )
        server, messages = SumServer(plan), dict.fromkeys(names, b"")
        closes = (server.roster, server.inboxes, server.survivors_lists, server.confirmations, dict)
        for phase, close in zip(("advert", "sealed", "masked", "confirm", "shares"), closes, strict=True):
            for name, message in messages.items():
                note = pack_note(Note("sum", {"run": RUN, "phase": phase, "cohort": cohort}, (message,)))
                answer = read_answer(self.sites[name](note), Phase)
                server.receive(name, answer.parts[0])
            if phase == "masked":
                meanwhile()
            messages = close()
        return plan.grid.decode(server.total())[0]

    def ledgers(self, name: str) -> list[int]:
        """The rounds that the ledgers of a site were charged for."""
        return [
            entry.round for path in sorted((self.folder / name).glob("runs/*/privacy/*")) for entry in read_ledger(path)
        ]


# --- before the start ---


@pytest.mark.parametrize("verb", ["sums", "basis", "hold", "round", "sum", "finish"])
def test_nothing_is_made_of_a_row_before_the_start(verb: str, settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE), start=False)
    facts = {"rank": None, "versions": versions(), "phase": "advert", "cohort": ["a"], "card": {}}
    with pytest.raises(RefusalError, match="has not started this run"):
        world.ask("a", verb, world.broadcast(0), **facts)


def test_a_start_that_failed_leaves_no_run_without_a_promise(settings: Settings, tmp_path: Path) -> None:
    """`common` is there and no ledger, as after a loss of it: the site stays refused."""
    world = Hostile(tmp_path, epsilon=3.0)
    world.open(settings(EXAMPLE), start=False)
    part = world.part("a")
    part.store.save_common(part._state(part._derived()).shared)
    broadcast = world.broadcast(0)
    with pytest.raises(Exception, match="is gone, and with it the record of what 'a' has released"):
        world.ask("a", "start", rows=world.rows())
    with pytest.raises(RefusalError, match="has not started this run"):
        world.ask("a", "round", broadcast, rank=None, versions=versions())
    assert world.ledgers("a") == []


def test_a_sum_with_strangers_fails_before_it_starts(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(SUMS), start=False)
    broadcast = world.broadcast(0)
    with pytest.raises(RefusalError, match="a secure sum with stranger"):
        world.ask("a", "start", rows={**world.rows(), "stranger": 5})
    with pytest.raises(RefusalError, match="has not started"):
        world.ask("a", "round", broadcast, rank=None, versions=versions())


@pytest.mark.parametrize("said", [1, 31, None])
def test_a_site_counts_its_own_rows(said: int | None, settings: Settings, tmp_path: Path) -> None:
    """One epoch of one row is one step in the plan, and thirty on the rows."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, train={"local_epochs": 1, "local_steps": None}), start=False)
    with pytest.raises(RefusalError, match="another number of rows"):
        world.ask("a", "start", rows={"a": said, "b": 30} if said else {"b": 30})


def test_what_is_charged_is_what_runs(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[int] = []
    mean = DPMechanism.mean
    monkeypatch.setattr(
        DPMechanism, "mean", lambda mechanism, total, rows: sums.append(1) or mean(mechanism, total, rows)
    )
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, train={"local_epochs": 1, "local_steps": None}))
    world.train(0, "a")
    (ledger,) = (tmp_path / "a").glob("runs/*/privacy/*.jsonl")
    assert [entry.count for entry in read_ledger(ledger)] == [len(sums)]


@pytest.mark.parametrize("method", ["fed-sb", "fedit", "ravan"])
@pytest.mark.parametrize("also", [False, True])
def test_a_broadcast_of_other_shapes_is_refused_before_a_row_is_drawn(
    method: str, also: bool, settings: Settings, tmp_path: Path
) -> None:
    """A head for each row, (b, m, n), is broadcast: every row's own gradient would then have all rows in it."""

    def crafted(message: dict[str, Any]) -> dict[str, Any]:
        wanted = [key for key in message if key.endswith(("weight", "bias") if also else (".R", ".A", ".s"))]
        assert wanted
        return {key: np.stack([x] * 4) if key == wanted[0] else x for key, x in message.items()}

    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, method={"name": method, "rank": 4}))
    with pytest.raises(RefusalError, match="a broadcast that is none of this run's"):
        world.train(0, "a", world.broadcast(0, crafted))
    assert world.ledgers("a") == []


def test_the_end_of_a_private_run_looks_at_no_row(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that overflow on some rows would tell of them by whether the answer comes, as often as one asks."""
    world = Hostile(tmp_path)
    world.open(
        set_all(settings(EXAMPLE), clients={**settings(EXAMPLE)["clients"], "holdout_fraction": 0.2}), start=False
    )
    looked: list[str] = []
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: looked.append("score"))
    monkeypatch.setattr(Trainer, "logits", lambda *_: looked.append("probe"))
    part = world.part("a")
    world.ask("a", "start", rows={"a": part.site.rows, "b": 24})
    assert part.site.held_out
    answer = world.ask("a", "finish", world.broadcast(0), card={})
    assert answer.facts["score"] is None and looked == []


def test_a_run_keeps_what_it_began_with(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, epsilon=3.0)
    world.open(settings(EXAMPLE))
    with pytest.raises(RefusalError, match="began here with other rows"):
        world.ask("a", "start", rows={"a": 30, "b": 300})
    with pytest.raises(RefusalError, match="began here with other label_names"):
        world.ask("a", "open", label_names=["red", "blue", "green"], model="", tokenizer="")
    with pytest.raises(RefusalError, match="began here with other config"):
        world.look("a", settings(EXAMPLE, rounds=2))


def test_a_basis_asked_for_again_and_again_is_the_same_and_charged_once(settings: Settings, tmp_path: Path) -> None:
    """The mean of many noised sums of the same rows would have little noise left."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, {"basis": {"kind": "core", "samples": 6, "share_samples": 0}}))
    first = world.ask("a", "sums")
    world.sites["a"]._let_go()
    world.sites["a"] = world.federation.restarted("a")
    for _ in range(3):
        again = world.ask("a", "sums")
        assert again.parts == first.parts and again.facts == first.facts
    assert world.ledgers("a") == [0]


@pytest.mark.parametrize("changes", [{}, EXAMPLE], ids=["plain", "private"])
def test_a_round_is_done_once_and_for_one_broadcast(
    changes: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    """Several updates of the same rows, for weights of the coordinator's choice, tell more of the rows than one."""
    world = Hostile(tmp_path)
    world.open(settings(changes, {"rounds": 2}))
    facts = {"rank": None, "versions": versions()}
    broadcast, next_round = world.broadcast(0), world.broadcast(1)
    other = world.broadcast(0, lambda told: {key: x + 0.01 for key, x in told.items()})
    first = world.ask("a", "round", broadcast, **facts)
    for restart in (False, True):
        if restart:
            world.sites["a"]._let_go()
            world.sites["a"] = world.federation.restarted("a")
        again = world.ask("a", "round", broadcast, **facts)
        assert again.parts == first.parts and again.facts == first.facts
        with pytest.raises(RefusalError, match="round 1 was done here for another broadcast"):
            world.ask("a", "round", other, **facts)
    world.train(1, "a", next_round)
    assert world.ledgers("a") == ([1, 2] if changes else [])


def test_a_round_is_summed_for_one_broadcast(settings: Settings, tmp_path: Path) -> None:
    """The difference of two sums of one round would be the coordinator's to choose."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))
    world.train(0, "abc")
    first = world.sum(0, "abc")
    world.train(0, "abc")
    assert np.array_equal(world.sum(0, "abc"), first)
    with pytest.raises(RefusalError, match="was done here for another broadcast"):
        world.train(0, "abc", world.broadcast(0, lambda message: {key: x + 0.1 for key, x in message.items()}))


# --- what is asked for ---


def test_a_column_of_the_coordinators_choice_stays_where_rules_say_so(settings: Settings, tmp_path: Path) -> None:
    rows = [{**row, "name": f"patient {i}"} for i, row in enumerate(labelled_rows(30, 0))]
    world = Hostile(tmp_path, rows=rows, columns=["text", "label"], labels=["blue", "green", "red"])
    assert world.look("a", settings()).facts["labels"] == ["blue", "green", "red"]
    with pytest.raises(RefusalError, match="it reads name, allowed are text, label"):
        world.look("a", settings(task={"label": "name"}))


def test_a_column_that_is_not_allowed_is_not_even_kept(settings: Settings, tmp_path: Path) -> None:
    """Some tasks read more where it is there."""
    rows = [{**row, "input": "secret"} for row in labelled_rows(30, 0)]
    world = Hostile(tmp_path, rows=rows, columns=["text", "label"])
    world.look("a", settings())
    assert all(set(row) == {"text", "label"} for row in world.part("a").table.rows)


def test_another_revision_of_an_allowed_model_is_another_model(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    model = config["model"]["name"]
    elsewhere = {**config, "model": {**config["model"], "revision": "refs/pr/7"}}
    assert Hostile(tmp_path / "a", models=[model]).look("a", config)
    with pytest.raises(RefusalError, match=r"the base model .*@refs/pr/7', allowed are"):
        Hostile(tmp_path / "b", models=[model]).look("a", elsewhere)


def test_numbers_are_no_classes(settings: Settings, tmp_path: Path) -> None:
    rows = [{**row, "label": i / 7} for i, row in enumerate(labelled_rows(30, 0))]
    answer = Hostile(tmp_path, rows=rows).look("a", settings(task={"kind": "regression"}))
    assert answer.facts["labels"] == []


def test_a_pattern_that_never_ends_is_refused(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    config["model"]["target_modules"] = "((?:[a-z]|[a-z.]|[a-z0-9.])+)+[A-Z]"
    world = Hostile(tmp_path)
    world.look("a", config)
    with pytest.raises(UserError, match="takes too long to match"):
        world.part("a").open(["blue", "green", "red"])


def test_a_value_that_is_no_label_of_the_rules_is_not_told(settings: Settings, tmp_path: Path) -> None:
    rows = [{**row, "name": f"patient {i}"} for i, row in enumerate(labelled_rows(30, 0))]
    world = Hostile(tmp_path, rows=rows, labels=["blue", "green", "red"])
    with pytest.raises(RefusalError, match=r"none of allow.labels") as refused:
        world.look("a", settings(task={"label": "name"}))
    assert "patient" not in str(refused.value)


def test_a_column_without_classes_is_told_by_nobody(settings: Settings, tmp_path: Path) -> None:
    """Without any rule of the site's own."""
    rows = [{**row, "name": f"patient {i}"} for i, row in enumerate(labelled_rows(30, 0))]
    with pytest.raises(RefusalError, match="a value of its own in nearly every row") as refused:
        Hostile(tmp_path, rows=rows).look("a", settings(task={"label": "name"}))
    assert "patient" not in str(refused.value)
    named = Hostile(tmp_path / "named", rows=rows, labels=[row["name"] for row in rows])
    assert len(named.look("a", settings(task={"label": "name"})).facts["labels"]) == 30


def test_rows_are_not_counted_by_other_columns(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    assert world.look("a", settings(data={"exclude": {"label": "red"}})).facts["rows"] < 30
    with pytest.raises(RefusalError, match=r"data.exclude = text: how many rows are left would tell"):
        world.look("a", settings(data={"exclude": {"text": "red1 red2"}}))


@pytest.mark.parametrize("changes", [{}, SUMS, SUMS | CLIENT])
def test_no_sums_but_of_a_core_basis(changes: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(changes, basis={"kind": "random", "samples": 1}))
    with pytest.raises(RefusalError, match="'random' looks at no row"):
        world.ask("a", "sums")


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
        Hostile(tmp_path).look("a", settings(changes))


@pytest.mark.parametrize("round", [1, 7, -1])
def test_there_are_no_more_rounds_than_the_run_has(round: int, settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    with pytest.raises(Exception, match=r"round .* of a run of 1|its round is"):
        world.train(round, "a")
    assert world.ledgers("a") == []


# --- privacy's terms ---


def test_epsilon_is_for_the_sites_own_delta(settings: Settings, tmp_path: Path) -> None:
    """At a delta of 0.03 an epsilon of 3 is cheap; at 1e-5 it is another number."""
    lax = {"privacy": {"unit": "example", "epsilon": 3.0, "clip": 1.0, "delta": 0.03}, "basis": {"share_samples": 0}}
    world = Hostile(tmp_path, epsilon=3.0)
    world.open(settings(lax), start=False)
    with pytest.raises(RefusalError, match="at this site's delta of 1e-05"):
        world.ask("a", "start", rows=world.rows())


@pytest.mark.parametrize("allow", [{"epsilon": 5.0}, {"losses": False}])
def test_what_may_not_leave_is_not_released(allow: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    released = {**EXAMPLE, "privacy": {**EXAMPLE["privacy"], "release": ["loss"]}}
    with pytest.raises(RefusalError, match="neither losses nor scores may leave"):
        Hostile(tmp_path, **allow).look("a", settings(released))
    assert Hostile(tmp_path / "b", epsilon=5.0, losses=True).look("a", settings(released))


def test_a_private_run_tells_no_counts_of_rows(settings: Settings, tmp_path: Path) -> None:
    """How many are cut at a max_tokens of the coordinator's choice is how many are longer."""
    world = Hostile(tmp_path)
    world.look("a", settings(EXAMPLE))
    part = world.part("a")
    part.open(["blue", "green", "red"])
    own = {"model": part.trainer.base.fingerprint, "tokenizer": tokenizer_fingerprint(part.tokenizer)}
    facts = world.ask("a", "open", label_names=["blue", "green", "red"], **own).facts
    assert (facts["cut"], facts["unused"], facts["labels"]) == (None, None, None)


# --- secure sums ---


def test_a_sum_with_shares_of_noise_is_booked_at_the_site_and_begun_again_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    """The mean of many sums of one change would have no noise left."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, CLIENT))
    world.train(0, "abc")
    broadcast, first = world.broadcast(0), world.sum(0, "abc")
    assert np.array_equal(world.sum(0, "abc"), first)
    for name in world.sites:
        assert world.ledgers(name) == [1]
        world.sites[name]._let_go()
        world.sites[name] = world.federation.restarted(name)
        world.train(0, name, broadcast)  # the same change again, after a kill
    assert np.array_equal(world.sum(0, "abc"), first)


def test_another_change_in_the_same_round_is_beyond_the_promise(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, CLIENT))
    world.train(0, "abc")
    world.sum(0, "abc")
    pending = world.part("a").sums._pending()
    world.part("a").store.save_pending(replace(pending, change=pending.change * 2))
    with pytest.raises(PrivacyBudgetExceededError):
        world.sum(0, "abc")


def test_sites_that_were_told_other_things_have_no_sum(settings: Settings, tmp_path: Path) -> None:
    """With rows, or a learning rate, by which the others count for nothing the sum would be one site's update."""
    server = {**SUMS["server"], "weighting": "samples"}

    def told(name: str, rows: dict[str, int], lr: float) -> None:
        world.look(name, settings(server=server, train={"local_steps": 1, "lr": lr}))
        world.part(name).open(["blue", "green", "red"])
        world.ask(name, "start", rows=rows)

    for number, (rows, lr) in enumerate([({"a": 30, "b": 10**9, "c": 30}, 0.02), ({"a": 30, "b": 30, "c": 30}, 1e-12)]):
        world = Hostile(tmp_path / str(number), "abc")
        told("a", dict.fromkeys("abc", 30), 0.02)
        told("b", dict.fromkeys("abc", 30), 0.02)
        told("c", rows, lr)
        world.train(0, "abc")
        with pytest.raises(MessageError, match="belongs to a plan with different"):
            world.sum(0, "abc")


def test_changes_against_other_broadcasts_have_no_sum(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))
    world.train(0, "ab")
    world.train(0, "c", world.broadcast(0, lambda message: {key: x + 0.1 for key, x in message.items()}))
    with pytest.raises(MessageError, match="belongs to a plan with different"):
        world.sum(0, "abc")


def test_a_site_that_leaves_a_sum_tells_no_number(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(server={**SUMS["server"], "secagg_clip": 1e-9}))
    answer = world.ask("a", "round", world.broadcast(0), rank=None, versions=versions())
    assert answer.facts["left"] == "its change is not finite, or above server.secagg_clip; its own terminal says more"


def test_a_round_between_two_phases_changes_no_sum(settings: Settings, tmp_path: Path) -> None:
    """The record of who was in a sum is that of the sum's own round, and what went in is of that round."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, rounds=2))
    world.train(0, "abc")
    wanted = world.sum(0, "abc")
    other = Hostile(tmp_path / "other", "abc")
    other.open(settings(SUMS, rounds=2))
    other.train(0, "abc")
    assert np.allclose(other.sum(0, "abc", lambda: other.train(1, "abc")), wanted, atol=1e-6)
    other.train(0, "ab")
    with pytest.raises(SumError, match="is in a sum already"):
        other.sum(0, "ab")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_a_broadcast_out_of_range_is_refused_before_a_row_is_drawn(
    bad: float, settings: Settings, tmp_path: Path
) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    with pytest.raises(RefusalError, match=r"NaN, infinite or above 1e\+06"):
        world.train(0, "a", world.broadcast(0, lambda message: {key: x + bad for key, x in message.items()}))
    assert world.ledgers("a") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x * 2e-22, "is not orthonormal"),
        (lambda x: x * 3, "is not orthonormal"),
        (lambda x: x[:, 1:], "do not fit layer"),
        (lambda x: x * np.nan, "NaN, infinite or above"),
    ],
)
def test_a_basis_of_another_scale_is_refused(
    change: Callable[[Any], Any], words: str, settings: Settings, tmp_path: Path
) -> None:
    """It would scale every row's gradient, down to where a clip in float32 does nothing."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    part = world.part("a")
    common = to_arrays(part._state(part._derived()).shared)
    told = pack(Payload(kind="basis-down", run=RUN, round=0, tensors={key: change(x) for key, x in common.items()}))
    with pytest.raises(RefusalError, match=words):
        world.ask("a", "hold", told)
    whole = pack(Payload(kind="basis-down", run=RUN, round=0, tensors=common))
    assert world.ask("a", "hold", whole).facts["holds"] == basis_hash(part._state(part._derived()).shared)


def test_a_site_tells_no_private_loss(settings: Settings, tmp_path: Path) -> None:
    """Without a rule of its own it tells a loss in a plain run, and in a private one where the run releases it."""
    released = {**EXAMPLE, "privacy": {**EXAMPLE["privacy"], "release": ["loss"]}}
    for number, (changes, told) in enumerate([(EXAMPLE, False), (released, True), ({}, True)]):
        world = Hostile(tmp_path / str(number))
        world.open(settings(changes))
        answer = world.ask("a", "round", world.broadcast(0), rank=None, versions=versions())
        assert (answer.facts["loss"] is not None) is told


def test_a_sites_fingerprint_confirms_no_guess_and_shows_the_site_a_change(settings: Settings, tmp_path: Path) -> None:
    rows = labelled_rows(30, 0)
    world = Hostile(tmp_path, rows=rows)
    told = {name: world.look(name, settings()).facts["fingerprint"] for name in "ab"}
    plain = load_table(str(tmp_path / "a" / "rows.jsonl")).fingerprint
    assert len({plain, *told.values()}) == 3  # the sites have the same rows
    assert world.look("a", settings()).facts["fingerprint"] == told["a"]
    world.open(settings())
    broadcast = world.broadcast(0)
    write_rows(tmp_path / "a" / "rows.jsonl", [{**rows[0], "text": "green1 green2"}, *rows[1:]])
    world.sites["a"]._let_go()
    world.sites["a"] = world.federation.restarted("a")
    with pytest.raises(RefusalError, match="this run began here with other data"):
        world.train(0, "a", broadcast)


def test_shares_that_are_not_due_leave_the_sum_as_it_is(settings: Settings, tmp_path: Path) -> None:
    """Nothing is noted of who was in a sum before this site gives its shares for it."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))
    world.train(0, "abc")
    for early in ("before", "in the middle"):

        def ask_for_shares() -> None:
            for name in world.sites:
                with pytest.raises(SumError):
                    world.ask(name, "sum", b"", phase="shares", cohort=["a", "b", "c"])

        if early == "before":
            world.ask("a", "sum", b"", phase="advert", cohort=["a", "b", "c"])
            ask_for_shares()
            world.sum(0, "abc")
        else:
            world.sum(0, "abc", ask_for_shares)


def test_a_private_run_does_not_tell_how_many_rows_a_site_has_read(settings: Settings, tmp_path: Path) -> None:
    """Less the rows to train on it is how many have nothing to learn within the coordinator's max_tokens."""
    world = Hostile(tmp_path)
    assert world.look("a", settings(EXAMPLE)).facts["rows"] is None
    assert Hostile(tmp_path / "plain").look("a", settings()).facts["rows"] == 30
