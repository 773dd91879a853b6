"""Laws 4, 5, 6 and 9 over a basis that is made anew on the way (`basis.refresh`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import adapter_bytes, set_all
from fedsb.adapters.basis import Basis, basis_hash, make_basis, random_pair
from fedsb.adapters.residual import is_residual
from fedsb.config.load import load_config
from fedsb.methods.base import Method, State
from fedsb.methods.central import Central
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.ravan import Ravan
from fedsb.reporting.report import summary
from fedsb.reporting.run_directory import read_manifest
from fedsb.runs.estimate import estimate
from fedsb.runs.record import Record
from fedsb.runs.run import federate, resume
from fedsb.server.basis import BasisRound
from fedsb.server.server import Server
from fedsb.utils.errors import UserError
from laws.test_aggregation import SHAPES, deltas, received, round_of, start, worst
from laws.test_codecs import StopAfterOne
from support.server import started

METHODS = [
    pytest.param(FedSB(rank=3), id="fed-sb"),
    pytest.param(FedSB(rank=2, blocks=2, tied=True), id="fed-sb, two blocks, tied"),
    pytest.param(Ravan(rank=2, blocks=2), id="ravan"),
    pytest.param(Central(rank=3), id="central"),
]


def refreshed(method: Method, state: State, seed: int) -> State:
    pairs = [(layer, random_pair(m, n, method.total_rank, seed, layer)) for layer, (m, n) in SHAPES.items()]
    return method.refresh(state, SHAPES, make_basis("random", pairs), seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_refresh_changes_the_basis_and_nothing_else(method: Method) -> None:
    """Over so many that the carried factors become one dense matrix; rounds go on from there."""
    state, hashes = start(method), set()
    for refresh in range(1, 5):
        state = round_of(method, state, seeds=[refresh, 9])
        before, head = deltas(method, received(method, state)), state.tensors["head.weight"]
        state = refreshed(method, state, seed=refresh)
        assert worst(before, deltas(method, received(method, state))) < 1e-5  # the basis is float32
        assert min(float(delta.norm()) for delta in before.values()) > 1
        assert state.tensors["head.weight"] is head
        assert not any(bool(R.any()) for key, R in state.tensors.items() if key.endswith(".R"))
        assert not any(is_residual(key) for key in method.broadcast(state, missed_last_round=True))
        hashes.add(basis_hash(state.shared))
    assert len(hashes) == 4
    assert {key.rpartition(".")[2] for key in state.shared if is_residual(key)} == {"residual_D"}


def test_moments_of_the_head_go_on_and_those_of_the_core_do_not() -> None:
    method = FedSB(rank=3)
    state = start(method)
    keys = ["m.head.weight", *(f"m.{layer}.R" for layer in SHAPES)]
    moments = {key: torch.ones_like(state.tensors[key[2:]]) for key in keys}
    after = refreshed(method, State(round=3, tensors=state.tensors, shared=state.shared, server=moments), seed=1)
    assert set(after.server) == {"m.head.weight"}
    assert after.round == 3


def basis_at(server: Server, state: State) -> Basis:
    round = BasisRound(server, state)
    round.send_state()
    return round.make()


@pytest.mark.parametrize("kind", ["random", "core"])
def test_the_new_basis_looks_from_where_the_run_has_come(tiny_config: dict[str, Any], kind: str) -> None:
    """`core` sees another gradient, `random` is another draw; both at the same point make the same basis again."""
    server, state = started(set_all(tiny_config, basis={"kind": kind, "refresh": 2, "share_samples": 0}))
    moved = {key: torch.randn_like(x) if key.endswith(".R") else x for key, x in state.tensors.items()}
    there = State(round=2, tensors=moved, shared=state.shared)
    first, again = (basis_at(server, there) for _ in range(2))
    assert basis_hash(first.tensors) == basis_hash(again.tensors) != basis_hash(state.shared)


CASES = [
    pytest.param({"method": {"name": "fed-sb", "rank": 4}}, {"kind": "core"}, id="core"),
    pytest.param({"method": {"name": "fed-sb", "rank": 2, "blocks": 2}}, {"kind": "random"}, id="random, blocks"),
    pytest.param({"method": {"name": "ravan", "rank": 2, "blocks": 2}}, {"kind": "update-pooled"}, id="update-pooled"),
    pytest.param({"method": {"name": "central", "rank": 3}}, {"kind": "core", "R0": "step"}, id="central"),
]


@pytest.mark.parametrize(("what", "basis"), CASES)
@pytest.mark.parametrize(
    "codec", ["float32", "int4", *(pytest.param(codec, marks=pytest.mark.long) for codec in ("int8", "int2"))]
)
def test_laws_4_and_5(tiny_config: dict[str, Any], tmp_path: Path, what: Any, basis: Any, codec: str) -> None:
    """Cut off behind every round, before a refresh and after one, and resumed: bit for bit, and priced to the byte.

    Two of three clients a round, so that some hold moments and errors of a basis that is gone.
    """
    config = set_all(tiny_config, **what, rounds=5, basis={**basis, "refresh": 2, "share_samples": 0})
    config |= {"server": {"clients_per_round": 2, "codec": codec, "optimizer": "momentum"}}
    config["train"] = {**tiny_config["train"], "local_steps": 2, "persist_optimizer_state": True}
    whole = federate(load_config(set_all(config, out=str(tmp_path / "whole")))).folder
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(set_all(config, out=str(tmp_path / "broken"))), StopAfterOne())
    broken = tmp_path / "broken" / "tiny"
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            resume(broken, StopAfterOne())
    resume(broken)
    assert adapter_bytes(whole) == adapter_bytes(broken)
    for ledger in ("rounds.jsonl", "traffic.jsonl"):
        rows = [[{**row, "seconds": 0} for row in Record(path, {}).rows(ledger)] for path in (whole, broken)]
        assert rows[0] == rows[1]
    measured, mine = summary(whole)["bytes"]["federation"], read_manifest(whole)["prices"][0]
    assert estimate(load_config(config))["prices"][0] == mine
    for part in ("one_off", "up", "down", "total"):
        assert measured["with_head"][part] == mine[f"{part}_bytes"], part
    assert measured["without_head"]["total"] == mine["total_bytes_without_head"]


def test_what_cannot_be_refreshed_is_refused(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"refresh has no effect with kind = 'weights'"):
        load_config(set_all(tiny_config, basis={"kind": "weights", "refresh": 2}))
    config = set_all(tiny_config, method={"name": "local", "rank": 2}, basis={"kind": "random", "refresh": 2})
    with pytest.raises(UserError, match=r"its fact own_models is true"):
        federate(load_config(config))
