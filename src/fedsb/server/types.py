"""What runs the clients. Every engine has the same few verbs and gives back the same types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData
from fedsb.methods.base import Method, State
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.validation import Dropped
from fedsb.training.local import LocalTraining
from fedsb.training.score import Score

SUM = "the sum"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What comes back from a client."""

    client: str
    envelope: bytes | None  # its update, not yet checked; None where it is known in a sum only
    kept: Tensors  # its own state, which stays with it
    loss: float | None  # mean training loss; None where the client keeps it to itself
    own: float | None = None  # its trained model's score on its held-out rows
    sent: Sequence[TrafficRecord]


@dataclass(frozen=True, kw_only=True)
class Summed:
    """What a secure sum comes to: one update in place of those of all who stayed."""

    envelope: bytes


Answer = Reply | Summed | Dropped


class Replies:
    """What comes back from a cohort, client by client: the envelopes, once; all else adds up as they are taken.

    In a secure sum clients reply without an envelope, and behind them comes their sum, as of a client SUM.
    """

    def __init__(self, replies: Iterable[Answer]) -> None:
        self.each = iter(replies)
        self.kept: dict[str, Tensors] = {}
        self.losses: dict[str, float] = {}
        self.own: dict[str, float] = {}
        self.sent: list[TrafficRecord] = []
        self.dropped: list[Dropped] = []  # who left by itself, or did not answer

    @property
    def envelopes(self) -> Iterator[tuple[str, bytes]]:
        """(client, update), as they come in: none is held here."""
        for reply in self.each:
            if isinstance(reply, Dropped):
                self.dropped.append(reply)
                continue
            if isinstance(reply, Summed):
                yield SUM, reply.envelope
                continue
            self.kept[reply.client] = reply.kept
            if reply.loss is not None:
                self.losses[reply.client] = reply.loss
            self.sent += reply.sent
            if reply.own is not None:
                self.own[reply.client] = reply.own
            if reply.envelope is not None:
                yield reply.client, reply.envelope


class Engine(Protocol):
    """The clients, their data and the base model, wherever they are."""

    @property
    def config(self) -> Config: ...

    @property
    def method(self) -> Method: ...

    @property
    def run(self) -> str: ...

    @property
    def policy(self) -> PrivacyPolicy: ...

    @property
    def sites(self) -> Sequence[ClientData]: ...

    @property
    def local(self) -> LocalTraining: ...

    @property
    def shapes(self) -> Shapes: ...

    @property
    def head(self) -> Tensors: ...

    @property
    def ranks(self) -> Mapping[str, int]: ...

    @property
    def choices(self) -> Sequence[ResolvedSetting]: ...

    def build_basis(
        self, method: Method, state: State | None = None
    ) -> tuple[Basis | None, Sequence[TrafficRecord]]: ...

    def train(
        self, method: Method, state: State, cohort: Sequence[str], kept: Mapping[str, Tensors], late: Set[str]
    ) -> Replies: ...

    def score(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> Score | None: ...

    def score_sites(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> dict[str, Score]: ...
