"""What runs the clients. Every engine has the same few verbs and gives back the same types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.data.sites import Site
from fedsb.federation.client import LocalTraining
from fedsb.federation.server import Dropped
from fedsb.methods.contract import Method, State
from fedsb.privacy.setup import Promise
from fedsb.settings import Choice, Config

SUM = "the sum"
Direction = Literal["up", "down"]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One message of one client, as counted."""

    round: int  # as users count: 1 is the first; 0 is before it
    client: str
    direction: Direction
    kind: Literal["round", "basis"]
    values: int
    head_values: int
    bytes: int  # of the values, as their codec makes them
    wire_bytes: int  # with the envelope


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What comes back from a client."""

    client: str
    envelope: bytes | None  # its update, not yet checked; None where it is known in a sum only
    kept: Tensors  # its own state, which stays with it
    loss: float | None  # mean training loss; None where the client keeps it to itself
    own: float | None = None  # its trained model's score on its held-out rows
    sent: Sequence[Sent]


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
        self.sent: list[Sent] = []
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


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over some examples, or over several clients' own models: their mean.

    Beside it stand other figures of the same examples, by name: floats are metrics, ints count answers that went wrong.
    """

    value: float
    count: int
    beside: Mapping[str, float] = field(default_factory=dict)
    by_client: Mapping[str, float] = field(default_factory=dict)
    confusion: list[list[int]] | None = None  # rows of each true class by predicted class; of one model, with classes


def mean_of(scores: Mapping[str, Score]) -> Score:
    """The mean of clients' scores on the same rows, and of what stands beside them; counts are sums."""
    one, *_ = scores.values()
    beside = {name: [score.beside[name] for score in scores.values()] for name in one.beside}
    return Score(
        value=sum(score.value for score in scores.values()) / len(scores),
        count=one.count,
        beside={k: sum(v) if isinstance(v[0], int) else sum(v) / len(v) for k, v in beside.items()},
        by_client={name: score.value for name, score in scores.items()},
    )


class Engine(Protocol):
    """The clients, their data and the base model, wherever they are."""

    @property
    def config(self) -> Config: ...

    @property
    def method(self) -> Method: ...

    @property
    def run(self) -> str: ...

    @property
    def promise(self) -> Promise: ...

    @property
    def sites(self) -> Sequence[Site]: ...

    @property
    def local(self) -> LocalTraining: ...

    @property
    def shapes(self) -> Shapes: ...

    @property
    def head(self) -> Tensors: ...

    @property
    def ranks(self) -> Mapping[str, int]: ...

    @property
    def choices(self) -> Sequence[Choice]: ...

    def build_basis(self, method: Method, state: State | None = None) -> tuple[Basis | None, Sequence[Sent]]: ...

    def train(
        self, method: Method, state: State, cohort: Sequence[str], kept: Mapping[str, Tensors], late: Set[str]
    ) -> Replies: ...

    def score(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> Score | None: ...

    def score_sites(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> dict[str, Score]: ...
