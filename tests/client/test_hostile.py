"""A coordinator that sends a site any request, in any order: each request by itself must be safe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import set_all
from fedsb.adapters.basis import basis_hash
from fedsb.client.round import ClientView
from fedsb.client.store import DiskStore
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.mechanism import DPMechanism
from fedsb.protocol.messages import (
    BasisGradient,
    CompareShared,
    Finish,
    GetShared,
    Prepare,
    Refresh,
    Request,
    SecAggPhase,
    SetBasis,
    SetShared,
    Stale,
    Start,
    SumRequest,
    Train,
    TrainReply,
)
from fedsb.protocol.payload import pack, unpack
from fedsb.training.trainer import Trainer
from fedsb.utils.environment import versions
from fedsb.utils.errors import RefusalError
from fedsb.utils.tensors import Tensors
from support.hostile import EXAMPLE, RUN, Hostile, Settings

SUM = SumRequest(attempt="1", cohort=["a", "b"])


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
        (Train, {"total_rank": None, "state_round": 0, "versions": versions(), "sum": SUM}),
        (SecAggPhase, {"phase": "advert", "attempt": "1", "round": 0, "rounds": 1, "cohort": ["a", "b"]}),
        (Finish, {"card": {}}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_nothing_is_made_of_a_row_before_the_start(
    kind: type[Request[Any]], fields: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE), start=False)
    parts = [world.broadcast(0)] if 1 in kind.payloads else []
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


@pytest.mark.parametrize("round", [1, 7, -1])
def test_there_are_no_more_rounds_than_the_run_has(round: int, settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    with pytest.raises(Exception, match=r"Round .* of a run of 1 rounds"):
        world.train(round, "a")
    assert world.ledgers("a") == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_a_broadcast_out_of_range_is_refused_before_a_row_is_drawn(
    bad: float, settings: Settings, tmp_path: Path
) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    with pytest.raises(RefusalError, match=r"NaN, infinite or above 1e\+06"):
        world.train(0, "a", world.broadcast(0, lambda message: {key: x + bad for key, x in message.items()}))
    assert world.ledgers("a") == []
