"""The messages between the server and a client, typed, and their bytes.

    4 bytes: length of the header | header, JSON: {"verb", "fields", "parts": lengths} | the parts, end to end

    Describe        settings, versions                     -> rows, labels, the table's fingerprint
    Prepare         classes, fingerprints of model and     -> rows to train on, rows held out, rows cut or left out,
                    tokenizer                                 the base model's fingerprint and trained modules
    Start           every client's number of rows          -> hash of the client's shared state, None before a basis
    BasisGradient   the round that the basis is for        -> a payload: S of this client
    SetBasis        a payload: the basis, or a part of it  -> hash of the shared state
    Refresh         a payload: the server's tensors, to    -> hash of the shared state, None before a basis
                    be merged into the residual
    GetShared                                              -> a payload: B and A that the client derived from W0
    SetShared       a payload: all of the shared state     -> hash of the shared state
    Train           a payload: the broadcast; and with     -> a payload: the update, or the masked one; or Stale,
                    scaled gradients the second moments       or NoKeys
    SecAggPhase     one phase of secure aggregation        -> the client's message (secagg/protocol.py)
    Finish          a payload: the last broadcast          -> the client's own score; it writes its adapter

A reply is checked against its type before anything reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsb.protocol.payload import PayloadError

HEADER_LIMIT = 1 << 24  # bytes

Rows = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Labels = list[str | int | bool]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
SecAggPhaseName = Literal["advert", "sealed", "held", "confirm", "shares"]


class Message(BaseModel):
    """A message's fields, and with it payloads as bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    verb: ClassVar[str]
    payloads: ClassVar[tuple[int, ...]] = (0,)  # how many payloads may come with it
    parts: tuple[bytes, ...] = Field((), exclude=True)

    @property
    def payload(self) -> bytes:
        """The one payload."""
        (part,) = self.parts
        return part

    def header(self) -> bytes:
        fields = self.model_dump(mode="json")
        head = {"verb": self.verb, "fields": fields, "parts": [len(part) for part in self.parts]}
        return json.dumps(head, sort_keys=True, separators=(",", ":")).encode()

    def pack(self) -> bytes:
        """Returns the same bytes for the same message, so that a repeated request is recognised by its hash."""
        header = self.header()
        return b"".join([len(header).to_bytes(4, "big"), header, *self.parts])

    @property
    def wire_bytes(self) -> int:
        """The length of `pack()`."""
        return 4 + len(self.header()) + sum(map(len, self.parts))


class Reply(Message):
    """A client's reply."""


class Stale(Reply):
    """The reply to Train of a client that lacks the shared state to which the broadcast adds."""

    verb = "stale"
    shared: str


class NoKeys(Reply):
    """The reply of a client that was restarted since the keys of a secure aggregation were agreed on."""

    verb = "no_keys"


class DescribeReply(Reply):
    verb = "describe"
    rows: Rows | None  # None in a private run, where it would show how many rows were left out
    labels: Labels
    fingerprint: str


class PrepareReply(Reply):
    verb = "prepare"
    rows: Rows
    held_out: Count
    cut: Count | None  # None in a private run
    unused: Count | None
    labels: dict[str, int] | None
    model: Fingerprint
    head: list[str]  # modules that are trained in full


class StartReply(Reply):
    verb = "start"
    shared: str | None  # None: a basis has to come first


class BasisGradientReply(Reply):
    verb = "basis_gradient"
    payloads = (1,)
    rows: Annotated[Real, Field(gt=0)]
    entries: list[dict[str, Any]] = []  # of the client's ledger


class SetBasisReply(Reply):
    verb = "set_basis"
    shared: str


class RefreshReply(Reply):
    verb = "refresh"
    shared: str | None


class CompareSharedReply(Reply):
    verb = "compare_shared"
    shared: str


class GetSharedReply(Reply):
    verb = "get_shared"
    payloads = (1,)


class SetSharedReply(Reply):
    verb = "set_shared"
    shared: str


class TrainReply(Reply):
    verb = "train"
    payloads = (0, 1)
    entries: list[dict[str, Any]] = []
    loss: Real | None = None
    score: Real | None = None  # of the trained model on the client's held-out rows
    left: str | None = None  # why the client's change does not go into the secure sum
    survivors: list[str] | None = None  # the clients of this round's sum, if this one has helped to unmask it before


class SecAggReply(Reply):
    verb = "secagg"
    payloads = (1,)


class FinishReply(Reply):
    verb = "finish"
    score: Real | None
    held_out: Count
    entries: list[dict[str, Any]] = []


def finite(value: float | None) -> float | None:
    """Returns a loss or a score as a reply states it: None where it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


R = TypeVar("R", bound=Reply)


class Request(Message, Generic[R]):
    """A server's request."""

    reply: ClassVar[type[Reply]]
    also: ClassVar[tuple[type[Reply], ...]] = ()  # other replies, of a client that lacks something
    run: str


class Describe(Request[DescribeReply]):
    verb, reply = "describe", DescribeReply
    config: dict[str, Any]
    versions: dict[str, str]


class Prepare(Request[PrepareReply]):
    verb, reply = "prepare", PrepareReply
    label_names: list[str]
    class_names: list[str] | None
    model: str | None  # None: the coordinator has no weights, and compares the clients with each other
    tokenizer: str


class Start(Request[StartReply]):
    verb, reply = "start", StartReply
    rows: dict[str, int]


class BasisGradient(Request[BasisGradientReply]):
    verb, reply = "basis_gradient", BasisGradientReply
    round: Count


class SetBasis(Request[SetBasisReply]):
    verb, reply = "set_basis", SetBasisReply
    payloads = (1,)
    round: Count


class Refresh(Request[RefreshReply]):
    verb, reply = "refresh", RefreshReply
    payloads = (1,)


class CompareShared(Request[CompareSharedReply]):
    verb, reply = "compare_shared", CompareSharedReply
    payloads = (1,)
    shared: str  # the hash of the shared state whose sketch is sent


class GetShared(Request[GetSharedReply]):
    verb, reply = "get_shared", GetSharedReply


class SetShared(Request[SetSharedReply]):
    verb, reply = "set_shared", SetSharedReply
    payloads = (1,)


class SumRequest(BaseModel):
    """The secure aggregation of a round."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    attempt: str  # of the agreement of keys
    cohort: list[str]  # all clients that are asked to take part


class Train(Request[TrainReply]):
    verb, reply = "train", TrainReply
    also = Stale, NoKeys
    payloads = (1, 2)
    total_rank: int | None  # of this client; None: the method's
    state_round: Count  # the last round whose update of this client was used: its own state is that after it
    score: bool = False  # whether to score the trained model on the held-out rows
    versions: dict[str, str] = {}
    entries_since: Count = 0  # the reply has the entries of the client's ledger of this round, from 1 on, and later
    sum: SumRequest | None = None  # with secure aggregation

    @property
    def payload(self) -> bytes:
        """The broadcast."""
        return self.parts[0]

    @property
    def second_moments(self) -> bytes | None:
        """Those of the server's optimiser, in one byte each (privacy/scaling.py); None if nothing is scaled by them."""
        return self.parts[1] if len(self.parts) > 1 else None


class SecAggPhase(Request[SecAggReply]):
    verb, reply = "secagg", SecAggReply
    also = (NoKeys,)
    payloads = (1,)
    phase: SecAggPhaseName
    attempt: str  # of the agreement of keys, different for each
    round: Count  # the first for which keys are agreed on, or that of the sum
    rounds: Count  # for which keys are agreed on
    cohort: list[str]  # all clients that are asked to agree on keys


class Finish(Request[FinishReply]):
    verb, reply = "finish", FinishReply
    payloads = (1,)
    card: dict[str, str]
    state_round: Count = 0  # the last round whose update of this client was aggregated


REQUESTS: dict[str, type[Request[Any]]] = {
    kind.verb: kind
    for kind in (
        *(Describe, Prepare, Start, BasisGradient, SetBasis, Refresh),
        *(CompareShared, GetShared, SetShared, Train, SecAggPhase, Finish),
    )
}


def read_request(data: bytes) -> Request[Any]:
    """Raises PayloadError for bytes that are not a request of this version."""
    verb, fields, parts = _split(data)
    if verb not in REQUESTS:
        raise PayloadError(f"Unknown request {verb!r:.40}. The coordinator may run a different fedsb version.")
    return _checked(REQUESTS[verb], fields, parts)


def read_reply(data: bytes, request: Request[R]) -> R | Stale | NoKeys:
    """Raises PayloadError for anything but a reply to this request."""
    verb, fields, parts = _split(data)
    kinds: dict[str, type[Any]] = {kind.verb: kind for kind in (request.reply, *request.also)}
    if verb not in kinds:
        raise PayloadError(f"Its reply to {request.verb!r} has the verb {verb!r:.40}.")
    found: R | Stale | NoKeys = _checked(kinds[verb], fields, parts)
    return found


M = TypeVar("M", bound=Message)


def _checked(kind: type[M], fields: dict[str, Any], parts: tuple[bytes, ...]) -> M:
    if len(parts) not in kind.payloads:
        raise PayloadError(f"A message {kind.verb!r} with {len(parts)} payloads. Expected: {kind.payloads}.")
    try:
        return kind.model_validate({**fields, "parts": parts})
    except ValidationError as error:
        where = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors()[:3])
        raise PayloadError(f"The fields of its message {kind.verb!r} are not valid: {where}.") from error


def _split(data: bytes) -> tuple[str, dict[str, Any], tuple[bytes, ...]]:
    """Returns (verb, fields, parts). Raises PayloadError for bytes that are not a message."""
    length = int.from_bytes(data[:4], "big")
    if length > min(HEADER_LIMIT, len(data) - 4):
        raise PayloadError(f"Not a message of fedsb ({len(data)} bytes): its header claims {length} bytes.")
    try:
        head = json.loads(data[4 : 4 + length])
        verb, fields, sizes = head["verb"], head["fields"], head["parts"]
        valid = isinstance(verb, str) and isinstance(fields, dict) and all(type(n) is int and n >= 0 for n in sizes)
    except (ValueError, TypeError, KeyError) as error:
        raise PayloadError(f"Not a message of fedsb ({len(data)} bytes): {error}.") from error
    if not valid or 4 + length + sum(sizes) != len(data):
        raise PayloadError(f"Not a message of fedsb: {len(data)} bytes, but its header lists {sizes!r:.80}.")
    return verb, fields, _cut(data, 4 + length, sizes)


def _cut(data: bytes, at: int, sizes: Sequence[int]) -> tuple[bytes, ...]:
    parts = []
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    return tuple(parts)
