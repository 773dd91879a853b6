"""A coordinator that sends a site any request, in any order: each request by itself must be safe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import labelled_rows, set_all, write_rows
from fedsb.adapters.basis import basis_hash
from fedsb.client import policy
from fedsb.client.checks import refuse_basis
from fedsb.client.round import ClientView
from fedsb.client.session import DescribedClient
from fedsb.client.store import DiskStore
from fedsb.config.load import load_config
from fedsb.data.sources import load_table
from fedsb.methods.base import State
from fedsb.models.tokenizer import tokenizer_fingerprint
from fedsb.privacy.accounting import Release
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.mechanism import DPMechanism, PrivacyBudgetExceededError
from fedsb.protocol.messages import (
    BasisGradient,
    CompareShared,
    Describe,
    DescribeReply,
    Finish,
    GetShared,
    Prepare,
    PrepareReply,
    Refresh,
    Request,
    SecAggPhase,
    SetBasis,
    SetShared,
    Stale,
    Start,
    Train,
    TrainReply,
    read_reply,
)
from fedsb.protocol.payload import Payload, pack, unpack
from fedsb.secagg.messages import MessageError, SumError
from fedsb.secagg.server import SumServer
from fedsb.training.trainer import Trainer
from fedsb.utils.environment import versions
from fedsb.utils.errors import RefusalError, UserError
from fedsb.utils.tensors import Tensors
from laws.test_channels import remote_of
from support.sites import Federation

RUN = "abc1"
CLASSES = ["blue", "green", "red"]
OUTSIDE = {"out": True, "compare": True, "data": {"train", "test"}}
EXAMPLE = {"privacy": {"unit": "example", "epsilon": 3.0, "clip_norm": 1.0}, "basis": {"share_samples": 0}}
CLIENT = {"privacy": {"unit": "client", "noise_multiplier": 2.0, "clip_norm": 0.5, "delta": 1e-3}}
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
    """Sends requests to sites with 30 rows each, without any check that a coordinator makes for itself."""

    def __init__(self, folder: Path, names: str = "ab", rows: list[dict[str, Any]] | None = None, **allow: Any) -> None:
        own = {name: rows or labelled_rows(30, number) for number, name in enumerate(names)}
        self.federation, self.folder = Federation(folder, own, {"allow": allow}), folder
        self.sites = {name: self.federation.restarted(name) for name in names}
        self.base: dict[str, str] = {}

    def ask(self, name: str, kind: type[Request[Any]], *parts: bytes, **fields: Any) -> Any:
        request = kind(run=RUN, parts=parts, **fields)
        return read_reply(self.sites[name](request.pack()), request)

    def restart(self, name: str) -> None:
        self.sites[name].close()
        self.sites[name] = self.federation.restarted(name)

    def describe(self, name: str, config: dict[str, Any]) -> DescribeReply:
        reply: DescribeReply = self.ask(name, Describe, config=config, versions=versions())
        return reply

    def prepare(self, name: str) -> PrepareReply:
        if not self.base:
            described = self.client(name)
            assert isinstance(described, DescribedClient)
            trainer = described.prepare(CLASSES, None).trainer
            self.base = {"model": trainer.base.fingerprint, "tokenizer": tokenizer_fingerprint(trainer.tokenizer)}
        reply: PrepareReply = self.ask(name, Prepare, label_names=CLASSES, class_names=None, **self.base)
        return reply

    def open(self, config: dict[str, Any], *, start: bool = True) -> None:
        for name in self.sites:
            self.describe(name, config)
            self.prepare(name)
            if start:
                self.ask(name, Start, rows=self.rows())

    def rows(self) -> dict[str, int]:
        return dict.fromkeys(self.sites, 30)

    def client(self, name: str) -> Any:
        """The site's client, in whatever stage it is."""
        client = self.sites[name].client
        assert client is not None
        return client

    def state(self) -> State:
        """The state at the start, where the basis is not made of rows."""
        trainer = self.client("a").trainer
        core = trainer.method.adapter == "core" and trainer.config.basis.kind != "core"
        return trainer.start_state(trainer.data_free_basis(0) if core else None)  # type: ignore[no-any-return]

    def broadcast(self, round: int, change: Callable[[Tensors], Tensors] = lambda message: message) -> bytes:
        state = self.state()
        message = change(self.client("a").trainer.method.broadcast(state))
        payload = Payload.of(message, kind="broadcast", run=RUN, round=round)
        return pack(replace(payload, basis=basis_hash(state.shared)))

    def train(self, round: int, names: str, broadcast: bytes | None = None) -> list[TrainReply]:
        broadcast = broadcast or self.broadcast(round)
        fields = {"total_rank": None, "state_round": 0, "versions": versions()}
        return [self.ask(name, Train, broadcast, **fields) for name in names]

    def sum(self, round: int, names: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """The values of a sum of `names`, of a cohort of all."""
        client, cohort = self.client("a"), sorted(self.sites)
        pending = client.store.pending()
        terms = client.secagg._sums.terms(round, pending.shared, self.federation.directory, pending.against)
        plan = terms.plan(len(pending.change))
        server, messages = SumServer(plan), dict.fromkeys(names, b"")
        closes = (server.roster, server.inboxes, server.survivors_lists, server.confirmations, dict)
        for phase, close in zip(("advert", "sealed", "masked", "confirm", "shares"), closes, strict=True):
            for name, message in messages.items():
                reply = self.ask(name, SecAggPhase, message, phase=phase, attempt="1", cohort=cohort)
                server.receive(name, reply.payload)
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


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (BasisGradient, {"round": 0}),
        (SetBasis, {"round": 0}),
        (CompareShared, {"shared": "a"}),
        (GetShared, {}),
        (SetShared, {}),
        (Refresh, {}),
        (Train, {"total_rank": None, "state_round": 0, "versions": versions()}),
        (SecAggPhase, {"phase": "advert", "attempt": "1", "cohort": ["a"]}),
        (Finish, {"card": {}}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_nothing_is_made_of_a_row_before_the_start(
    kind: type[Request[Any]], fields: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE), start=False)
    parts = [world.broadcast(0)] if kind.payloads == (1,) else []
    with pytest.raises(RefusalError, match="has not started this run"):
        world.ask("a", kind, *parts, **fields)


def test_a_start_that_failed_leaves_no_run_without_a_policy(settings: Settings, tmp_path: Path) -> None:
    """The shared state exists and the ledger does not, as after a loss of it: the site stays refused."""
    world = Hostile(tmp_path, epsilon=3.0)
    world.open(settings(EXAMPLE), start=False)
    DiskStore(tmp_path / "a" / "runs" / RUN).save_start(ClientView(world.state().shared), 0)
    broadcast = world.broadcast(0)
    with pytest.raises(Exception, match="is missing, and with it the record of what 'a' has released"):
        world.ask("a", Start, rows=world.rows())
    with pytest.raises(RefusalError, match="has not started this run"):
        world.train(0, "a", broadcast)
    assert world.ledgers("a") == []


def test_a_sum_with_strangers_fails_before_it_starts(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(SUMS), start=False)
    broadcast = world.broadcast(0)
    with pytest.raises(RefusalError, match="Secure aggregation with stranger"):
        world.ask("a", Start, rows={**world.rows(), "stranger": 5})
    with pytest.raises(RefusalError, match="has not started"):
        world.train(0, "a", broadcast)


@pytest.mark.parametrize("said", [1, 31, None])
def test_a_site_counts_its_own_rows(said: int | None, settings: Settings, tmp_path: Path) -> None:
    """One epoch of one row is one step in the plan, and thirty on the rows."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, train={"local_epochs": 1, "local_steps": None}), start=False)
    with pytest.raises(RefusalError, match="another number of rows"):
        world.ask("a", Start, rows={"a": said, "b": 30} if said else {"b": 30})


def test_what_is_charged_is_what_runs(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[int] = []
    mean = DPMechanism.mean
    monkeypatch.setattr(DPMechanism, "mean", lambda *args: sums.append(1) or mean(*args))
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
    """With a head for each row, (b, m, n), every row's own gradient would have all rows in it."""

    def crafted(message: Tensors) -> Tensors:
        wanted = [key for key in message if key.endswith(("weight", "bias") if also else (".R", ".A", ".s"))]
        assert wanted
        return {key: torch.stack([x] * 4) if key == wanted[0] else x for key, x in message.items()}

    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, method={"name": method, "rank": 4}))
    with pytest.raises(RefusalError, match="The broadcast does not belong to this run"):
        world.train(0, "a", world.broadcast(0, crafted))
    assert world.ledgers("a") == []


def test_a_private_run_looks_at_no_row_for_a_score(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that overflow on some rows would reveal them by whether the answer comes, as often as it is requested."""
    world = Hostile(tmp_path)
    config = settings(EXAMPLE)
    world.open(set_all(config, clients={**config["clients"], "holdout_fraction": 0.2}), start=False)
    looked: list[str] = []
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: looked.append("score"))
    monkeypatch.setattr(Trainer, "logits", lambda *_: looked.append("probe"))
    data = world.client("a").data
    world.ask("a", Start, rows={"a": data.rows, "b": 24})
    assert data.held_out
    broadcast = world.broadcast(0)
    scored = {"score": True, "total_rank": None, "state_round": 0, "versions": versions()}
    assert world.ask("a", Train, broadcast, **scored).score is None
    assert world.ask("a", Finish, broadcast, card={}).score is None
    assert looked == []


def test_a_site_that_keeps_its_scores_to_itself_makes_none(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Hostile(tmp_path, losses=False)
    config = settings()
    world.open(set_all(config, clients={**config["clients"], "holdout_fraction": 0.2}), start=False)
    looked: list[str] = []
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: looked.append("score"))
    world.ask("a", Start, rows={"a": world.client("a").data.rows, "b": 24})
    scored = {"score": True, "total_rank": None, "state_round": 0, "versions": versions()}
    reply = world.ask("a", Train, world.broadcast(0), **scored)
    assert (reply.score, reply.loss, looked) == (None, None, [])


def test_a_run_keeps_what_it_began_with(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, epsilon=3.0)
    world.open(settings(EXAMPLE))
    with pytest.raises(RefusalError, match="began here with different row counts of the clients"):
        world.ask("a", Start, rows={"a": 30, "b": 300})
    with pytest.raises(RefusalError, match="began here with different labels"):
        world.ask("a", Prepare, label_names=["red", "blue", "green"], class_names=None, model="", tokenizer="")
    with pytest.raises(RefusalError, match="began here with different settings"):
        world.describe("a", settings(EXAMPLE, rounds=2))


def test_a_basis_requested_again_and_again_is_the_same_and_charged_once(settings: Settings, tmp_path: Path) -> None:
    """The mean of many noised sums of the same rows would have little noise left."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, {"basis": {"kind": "core", "samples": 6, "share_samples": 0}}))
    first = world.ask("a", BasisGradient, round=0)
    world.restart("a")
    for _ in range(3):
        assert world.ask("a", BasisGradient, round=0) == first
    assert world.ledgers("a") == [0]


@pytest.mark.parametrize("changes", [{}, EXAMPLE], ids=["plain", "private"])
def test_a_basis_gradient_is_made_once_for_each_basis_of_the_run(
    changes: dict[str, Any], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator could else have gradients of the same rows for many weights of its choice."""
    monkeypatch.setattr(policy, "refuse_what_needs_one_place", lambda *_: None)  # which refuses basis.refresh
    world = Hostile(tmp_path)
    basis = {"kind": "core", "samples": 6, "refresh": 2, "share_samples": 0}
    world.open(settings(changes, {"basis": basis, "rounds": 3}))
    first = world.ask("a", BasisGradient, round=0)
    trainer, inner = world.client("a").trainer, {}
    for key, S in unpack(first.payload).tensors.items():
        inner |= {key[:-1] + "P": torch.eye(len(S))[:, :4], key[:-1] + "Q": torch.eye(len(S))[:4]}
    payload = pack(Payload.of(inner, kind="basis-down", run=RUN, round=0))
    for round in (1, 3, 10**9):
        with pytest.raises(RefusalError, match="No new basis is made before round"):
            world.ask("a", BasisGradient, round=round)
        with pytest.raises(RefusalError, match="No new basis is made before round"):
            world.ask("a", SetBasis, payload, round=round)
    with pytest.raises(RefusalError, match="The broadcast does not belong to this run"):
        world.ask("a", SetBasis, first.payload, round=0)
    world.ask("a", SetBasis, payload, round=0)
    tensors = {f"{layer}.R": torch.ones(1, 4, 4) for layer in trainer.shapes} | trainer.head
    refreshes = [
        pack(Payload.of({key: x * scale for key, x in tensors.items()}, kind="broadcast", run=RUN, round=2))
        for scale in (0.1, 0.2)
    ]
    world.ask("a", Refresh, refreshes[0])
    second = world.ask("a", BasisGradient, round=2)
    assert second != first
    world.ask("a", Refresh, refreshes[1])
    assert world.ask("a", BasisGradient, round=2) == second
    assert world.ask("a", BasisGradient, round=0).parts == first.parts
    assert world.ledgers("a") == ([0, 3] if changes else [])


@pytest.mark.parametrize("changes", [{}, EXAMPLE], ids=["plain", "private"])
def test_a_broadcast_for_another_shared_state_trains_nothing(
    changes: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    """The site asks for the shared state: R has no meaning in a basis that it does not have."""
    world = Hostile(tmp_path)
    world.open(settings(changes, {"rounds": 2}))
    for other in (replace(unpack(world.broadcast(0)), basis="0" * 32), replace(unpack(world.broadcast(0)), basis="")):
        (reply,) = world.train(0, "a", pack(other))
        assert isinstance(reply, Stale) and reply.shared == basis_hash(world.state().shared)
        assert not world.ledgers("a")
    (reply,) = world.train(0, "a")
    assert isinstance(reply, TrainReply)


@pytest.mark.parametrize("changes", [{}, EXAMPLE], ids=["plain", "private"])
def test_a_round_is_done_once_and_for_one_broadcast(
    changes: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    """Several updates of the same rows, for weights of the coordinator's choice, reveal more of the rows than one."""
    world = Hostile(tmp_path)
    world.open(settings(changes, {"rounds": 2}))
    broadcast, next_round = world.broadcast(0), world.broadcast(1)
    other = world.broadcast(0, lambda message: {key: x + 0.01 for key, x in message.items()})
    first = world.train(0, "a", broadcast)
    for restart in (False, True):
        if restart:
            world.restart("a")
        assert world.train(0, "a", broadcast) == first
        with pytest.raises(RefusalError, match="Round 1 was done here for another broadcast"):
            world.train(0, "a", other)
    world.train(1, "a", next_round)
    assert world.ledgers("a") == ([1, 2] if changes else [])


def test_a_round_that_was_interrupted_is_done_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same broadcast, and without a second charge if the first one did not reach the disk."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    broadcast = world.broadcast(0)
    other = world.broadcast(0, lambda message: {key: x + 0.01 for key, x in message.items()})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            world.train(0, "a", broadcast)
    world.restart("a")
    with pytest.raises(RefusalError, match="was done here for another broadcast"):
        world.train(0, "a", other)
    assert isinstance(world.train(0, "a", broadcast)[0], TrainReply) and world.ledgers("a") == [1]


@pytest.mark.parametrize("changes", [{}, EXAMPLE], ids=["plain", "private"])
def test_a_round_is_not_done_again_when_its_answer_is_not_stored_any_more(
    changes: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    """In place of the last round, a coordinator could have a second update of the first one, with other noise."""
    world = Hostile(tmp_path)
    world.open(settings(changes, {"rounds": 4}))
    broadcasts = [world.broadcast(round) for round in range(3)]
    answers = [world.train(round, "a", broadcast) for round, broadcast in enumerate(broadcasts)]
    with pytest.raises(RefusalError, match="Round 1 was done here, and its answer is not stored any more"):
        world.train(0, "a", broadcasts[0])
    for round in (1, 2):  # a coordinator may fall back to the round before
        assert world.train(round, "a", broadcasts[round])[0].parts == answers[round][0].parts
    assert world.ledgers("a") == ([1, 2, 3] if changes else [])


def test_a_round_is_summed_for_one_broadcast(settings: Settings, tmp_path: Path) -> None:
    """The coordinator could else choose the difference of two sums of one round."""
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


@pytest.mark.parametrize("round", [1, 7, -1])
def test_there_are_no_more_rounds_than_the_run_has(round: int, settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    with pytest.raises(Exception, match=r"Round .* of a run of 1 rounds"):
        world.train(round, "a")
    assert world.ledgers("a") == []


# --- privacy's terms ---


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
        world.restart(name)
        world.train(0, name, broadcast)  # the same change again, after a kill
    assert np.array_equal(world.sum(0, "abc"), first)


def test_another_change_in_the_same_round_is_beyond_the_promise(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS, CLIENT))
    world.train(0, "abc")
    world.sum(0, "abc")
    store = world.client("a").store
    pending = store.pending()
    store.save_pending(replace(pending, change=pending.change * 2))
    with pytest.raises(PrivacyBudgetExceededError):
        world.sum(0, "abc")


def test_sites_that_were_told_other_things_have_no_sum(settings: Settings, tmp_path: Path) -> None:
    """With rows, or a learning rate, by which the others count for nothing the sum would be one site's update."""
    server = {**SUMS["server"], "weighting": "samples"}

    def told(name: str, rows: dict[str, int], lr: float) -> None:
        world.describe(name, settings(server=server, train={"local_steps": 1, "lr": lr}))
        world.prepare(name)
        world.ask(name, Start, rows=rows)

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
    (reply,) = world.train(0, "a")
    assert reply.left == "its change is not finite, or above server.secagg_clip; its own terminal says more"


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
    with pytest.raises(SumError, match="is already in a sum"):
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
    shared = world.state().shared
    changed = Payload.of({key: change(x) for key, x in shared.items()}, kind="broadcast", run=RUN, round=0)
    with pytest.raises(RefusalError, match=words):
        world.ask("a", SetShared, pack(changed))
    whole = pack(Payload.of(shared, kind="broadcast", run=RUN, round=0))
    assert world.ask("a", SetShared, whole).shared == basis_hash(shared)


@pytest.mark.parametrize("scale", [2e-22, 1e5, float("nan")])
def test_a_core_basis_has_no_scale(scale: float, settings: Settings, tmp_path: Path) -> None:
    """The coordinator chooses directions within the outer basis, and the site orthonormalises them."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, {"basis": {"kind": "core", "samples": 6, "share_samples": 0}}))
    inner = {}
    for key, S in unpack(world.ask("a", BasisGradient, round=0).payload).tensors.items():
        inner |= {key[:-1] + "P": scale * torch.eye(len(S))[:, :4], key[:-1] + "Q": scale * torch.eye(len(S))[:4]}
    payload = pack(Payload.of(inner, kind="basis-down", run=RUN, round=0))
    if scale == scale:
        world.ask("a", SetBasis, payload, round=0)
        client = world.client("a")
        refuse_basis(client.start_view().shared, client.trainer.shapes)
    else:
        with pytest.raises(RefusalError, match="NaN, infinite or above"):
            world.ask("a", SetBasis, payload, round=0)


def test_a_basis_is_sent_only_to_a_coordinator_without_the_base_model(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    with pytest.raises(RefusalError, match="derives the basis itself"):
        world.ask("a", GetShared)


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


def test_shares_that_are_not_due_leave_the_sum_as_it_is(settings: Settings, tmp_path: Path) -> None:
    """Nothing is noted of who was in a sum before this site gives its shares for it."""
    world = Hostile(tmp_path, "abc")
    world.open(settings(SUMS))
    world.train(0, "abc")
    for early in ("before", "in the middle"):

        def ask_for_shares() -> None:
            for name in world.sites:
                with pytest.raises(SumError):
                    world.ask(name, SecAggPhase, b"", phase="shares", attempt="1", cohort=["a", "b", "c"])

        if early == "before":
            world.ask("a", SecAggPhase, b"", phase="advert", attempt="1", cohort=["a", "b", "c"])
            ask_for_shares()
            world.sum(0, "abc")
        else:
            world.sum(0, "abc", ask_for_shares)


def test_a_private_run_does_not_tell_how_many_rows_a_site_has_read(settings: Settings, tmp_path: Path) -> None:
    """Less the rows to train on it is how many have nothing to learn within the coordinator's max_tokens."""
    world = Hostile(tmp_path)
    assert world.describe("a", settings(EXAMPLE)).rows is None
    assert Hostile(tmp_path / "plain").describe("a", settings()).rows == 30
