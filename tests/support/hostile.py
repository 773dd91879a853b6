"""A coordinator that sends sites any request, in any order, without the checks that an honest one makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conftest import labelled_rows, set_all
from fedsb.adapters.basis import basis_hash
from fedsb.adapters.layout import Layout
from fedsb.client.round import ClientRound, ClientView
from fedsb.client.session import DescribedClient
from fedsb.config.load import load_config
from fedsb.methods.base import State
from fedsb.models.tokenizer import tokenizer_fingerprint
from fedsb.privacy.ledger import read_ledger
from fedsb.protocol.messages import (
    Describe,
    DescribeReply,
    Prepare,
    PrepareReply,
    Request,
    SecAggPhase,
    Start,
    SumRequest,
    Train,
    TrainReply,
    read_reply,
)
from fedsb.protocol.payload import Payload, pack
from fedsb.secagg.messages import SumPlan
from fedsb.secagg.server import KeyServer, SumServer
from fedsb.utils.environment import versions
from fedsb.utils.tensors import Tensors
from laws.test_channels import remote_of
from support.sites import Federation

RUN = "abc1"
CLASSES = ["blue", "green", "red"]
OUTSIDE = {"out": True, "compare": True, "data": {"train", "test"}}
EXAMPLE = {"privacy": {"unit": "example", "epsilon": 3.0, "clip_norm": 1.0}, "basis": {"share_samples": 0}}
CLIENT = {"privacy": {"unit": "client", "noise_multiplier": 2.0, "clip_norm": 0.5, "delta": 1e-3}}
SUMS = {"server": {"weighting": "uniform", "secure_aggregation": True, "min_clients": 2}}
SHARED = {
    "privacy": {"unit": "example", "noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-3},
    "server": {"secure_aggregation": True, "min_clients": 2},
    "train": {"local_steps": 1, "batch_size": 4, "lr": 0.02},
    "basis": {"kind": "random", "share_samples": 0},
}

Settings = Callable[..., dict[str, Any]]
Change = Callable[[Tensors], Tensors]


def run_settings(tiny_config: dict[str, Any], *changes: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Returns a run's settings as they travel."""
    config = set_all(remote_of(tiny_config, {"rounds": 1, "clients": {"holdout_fraction": 0.0}}), **more)
    for change in changes:
        config = set_all(config, **change)
    return load_config(config).config.model_dump(mode="json", exclude=OUTSIDE)


def same(message: Tensors) -> Tensors:
    return message


def moved(message: Tensors) -> Tensors:
    """A different broadcast."""
    return {key: x + 0.1 for key, x in message.items()}


class Hostile:
    """Sends requests to sites with 30 rows each.

    With secure aggregation `keys` is the newest agreement, of the rounds from `round` on.
    """

    def __init__(self, folder: Path, names: str = "ab", rows: list[dict[str, Any]] | None = None, **allow: Any) -> None:
        own = {name: rows or labelled_rows(30, number) for number, name in enumerate(names)}
        self.federation, self.folder = Federation(folder, own, {"allow": allow}), folder
        self.sites = {name: self.federation.restarted(name) for name in names}
        self.base: dict[str, str] = {}
        self.trainer: Any = None  # of site a
        self.sums: Any = None  # its SecureSums
        self.attempts = 0
        self.keys: KeyServer | None = None

    def ask(self, name: str, kind: type[Request[Any]], *parts: bytes, **fields: Any) -> Any:
        request = kind(run=RUN, parts=parts, **fields)
        return read_reply(self.sites[name](request.pack()), request)

    def restart(self, name: str) -> None:
        self.sites[name].close()
        self.sites[name] = self.federation.restarted(name)

    # --- before the first round ---

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
        if name == "a":
            self.trainer = self.client("a").trainer
        return reply

    def open(self, config: dict[str, Any], *, start: bool = True) -> None:
        for name in self.sites:
            self.describe(name, config)
            self.prepare(name)
            if start:
                self.start(name, self.rows())

    def start(self, name: str, rows: dict[str, int]) -> None:
        self.ask(name, Start, rows=rows)
        if name == "a" and (secagg := self.client("a").secagg) is not None:
            self.sums = secagg._sums

    def rows(self) -> dict[str, int]:
        return dict.fromkeys(self.sites, 30)

    def client(self, name: str) -> Any:
        """The site's client, in whatever stage it is."""
        client = self.sites[name].client
        assert client is not None
        return client

    # --- rounds ---

    def state(self) -> State:
        """The state at the start, where the basis is not made of rows."""
        core = self.trainer.method.adapter == "core" and self.trainer.config.basis.kind != "core"
        state: State = self.trainer.start_state(self.trainer.data_free_basis(0) if core else None)
        return state

    def broadcast(self, round: int, change: Change = same) -> bytes:
        state = self.state()
        message = change(self.trainer.method.broadcast(state))
        payload = Payload.of(message, kind="broadcast", run=RUN, round=round)
        return pack(replace(payload, basis=basis_hash(state.shared)))

    def train(
        self,
        round: int,
        names: str,
        broadcast: bytes | None = None,
        moments: tuple[bytes, ...] = (),
        **fields: Any,
    ) -> list[TrainReply]:
        """The replies of `names`; with secure aggregation for a sum of all, unless `sum` is given."""
        broadcast = broadcast or self.broadcast(round)
        every = {"total_rank": None, "state_round": 0, "versions": versions(), "sum": self.request(), **fields}
        return [self.ask(name, Train, broadcast, *moments, **every) for name in names]

    # --- secure sums ---

    def agree(self, names: str = "", round: int = 0, rounds: int = 1) -> KeyServer:
        """A new agreement of keys among `names`, by default all."""
        self.attempts += 1
        names, attempt = names or "".join(self.sites), str(self.attempts)
        directory = {name: self.federation.directory[name] for name in names}
        plan = self.sums.key_plan(round, rounds, directory, attempt)
        server, messages = KeyServer(plan), dict.fromkeys(names, b"")
        fields = {"attempt": attempt, "round": round, "rounds": rounds, "cohort": sorted(names)}
        for phase, close in (("advert", server.roster), ("sealed", server.inboxes), ("held", dict)):
            for name, message in messages.items():
                server.receive(name, self.ask(name, SecAggPhase, message, phase=phase, **fields).payload)
            messages = close()
        server.close()
        self.keys = server
        return server

    def phase(self, name: str, phase: str, message: bytes, attempt: str, round: int) -> bytes:
        """A site's answer to a phase of a sum, with the keys of this attempt."""
        fields = {"attempt": attempt, "round": round, "rounds": 0, "cohort": sorted(self.sites)}
        return bytes(self.ask(name, SecAggPhase, message, phase=phase, **fields).payload)

    def request(self, cohort: str = "") -> SumRequest | None:
        """The sum of `cohort`, by default of all with keys; None without an agreement."""
        if self.keys is None:
            return None
        return SumRequest(attempt=self.keys.plan.attempt, cohort=sorted(cohort or self.keys.members))

    def plan(self, round: int, cohort: str = "", change: Change = same, moments: bytes | None = None) -> SumPlan:
        """The plan of a sum with the newest keys."""
        assert self.keys is not None
        method, state = self.trainer.method, self.state()
        message = change(method.broadcast(state))
        shared = ClientRound(method, ClientView(state.shared), message, round, basis_hash(state.shared), moments)
        directory = {name: self.federation.directory[name] for name in cohort or self.keys.members}
        terms = self.sums.terms(round, shared.shared_hash, directory, self.keys.plan, shared.against)
        return terms.plan(Layout.of(shared.trained).size if terms.step else shared.layout.size)

    def masked(self, round: int, names: str) -> SumServer:
        """Trains for a round. Returns the server of its sum, with the masked changes of `names`."""
        assert self.keys is not None
        server = SumServer(self.plan(round), self.keys)
        for name, reply in zip(names, self.train(round, names), strict=True):
            server.receive(name, reply.payload)
        return server

    def unmask(self, server: SumServer) -> np.ndarray:
        """The values of a sum, from the masked changes on."""
        assert self.keys is not None
        messages, round = server.survivors_lists(), server.plan.round
        phases = ["confirm", "shares"] if server.plan.signed else ["shares"]
        for phase in phases:
            for name, message in messages.items():
                server.receive(name, self.phase(name, phase, message, self.keys.plan.attempt, round))
            messages = server.confirmations() if phase == "confirm" else {}
        return server.plan.grid.decode(server.total())[0]

    def sum(self, round: int, names: str, meanwhile: Callable[[], None] = lambda: None) -> np.ndarray:
        """The values of a sum of `names`, of a cohort of all, with new keys; `meanwhile` is before its shares."""
        self.agree(round=round)
        server = self.masked(round, names)
        meanwhile()
        return self.unmask(server)

    def ledgers(self, name: str) -> list[int]:
        """The rounds that the ledgers of a site were charged for."""
        return [
            entry.round for path in sorted((self.folder / name).glob("runs/*/privacy/*")) for entry in read_ledger(path)
        ]
