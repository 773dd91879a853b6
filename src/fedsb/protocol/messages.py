"""What a coordinator and a site say to each other: a verb, some facts, and envelopes.

    4 bytes: length of the header | header, JSON: {"verb", "facts", "parts": lengths} | the parts, end to end

A round, seen from the coordinator (site/handle.py answers):

    look    the run's settings, versions              ->  rows, the labels among them, the table's fingerprint
    open    the classes, the base model's and the
            tokenizer's fingerprints                  ->  rows to train on, rows held out, what is cut or left out
    start   every site's rows                         ->  hash of what the site holds in common; it may now train
    sums    (basis core)                              ->  an envelope, S of this site
    basis   an envelope, the basis or a part of it    ->  hash of what the site holds in common
    hold    an envelope, all that is held in common   ->  hash; where a site's own derivation differs in its last bits
    round   an envelope, the broadcast                ->  an envelope, the update; or "behind"
    sum     a phase of a secure sum, its message      ->  the site's message (privacy/secure_sum.py)
    finish  an envelope, the last broadcast           ->  the site's own score; it writes the adapter for itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsb.protocol.payload import PayloadError

HEADER_LIMIT = 1 << 24  # bytes


@dataclass(frozen=True)
class Note:
    verb: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[bytes] = ()


def pack_note(note: Note) -> bytes:
    """The same bytes for the same note: a repeated request is known by its hash."""
    head = {"verb": note.verb, "facts": note.facts, "parts": [len(part) for part in note.parts]}
    header = json.dumps(head, sort_keys=True, separators=(",", ":")).encode()
    return b"".join([len(header).to_bytes(4, "big"), header, *note.parts])


def read_note(data: bytes) -> Note:
    """Raises PayloadError for bytes that are no note."""
    length = int.from_bytes(data[:4], "big")
    if length > min(HEADER_LIMIT, len(data) - 4):
        raise PayloadError(f"not a message of fedsb ({len(data)} bytes): its header claims {length} bytes")
    try:
        head = json.loads(data[4 : 4 + length])
        verb, facts, sizes = head["verb"], head["facts"], head["parts"]
        whole = isinstance(verb, str) and isinstance(facts, dict) and all(type(n) is int and n >= 0 for n in sizes)
    except (ValueError, TypeError, KeyError) as error:
        raise PayloadError(f"not a message of fedsb ({len(data)} bytes): {error}") from error
    if not whole or 4 + length + sum(sizes) != len(data):
        raise PayloadError(f"not a message of fedsb: {len(data)} bytes, its header says {sizes!r:.80}")
    parts, at = [], 4 + length
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    return Note(verb=verb, facts=facts, parts=tuple(parts))


Rows = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Real = Annotated[float, Field(allow_inf_nan=False)]


class Facts(BaseModel):
    """What a site says in answer to a request; a coordinator believes its form only after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    verb: ClassVar[str]
    envelopes: ClassVar[tuple[int, ...]] = (0,)  # how many may come with it
    parts: tuple[bytes, ...] = Field((), exclude=True)

    def pack(self) -> bytes:
        return pack_note(Note(self.verb, self.model_dump(mode="json"), self.parts))


class Looked(Facts):
    verb = "look"
    rows: Rows | None  # None: not told, in a private run; less the rows to train on it is how many are left out
    labels: list[str | int | bool]
    fingerprint: str


class Opened(Facts):
    verb = "open"
    rows: Rows
    held_out: Count
    cut: Count | None  # None: not told, in a private run
    unused: Count | None
    labels: dict[str, int] | None


class Started(Facts):
    verb = "start"
    holds: str | None  # None: a basis has to come


class Summed(Facts):
    verb = "sums"
    envelopes = (1,)
    rows: Annotated[Real, Field(gt=0)]
    entries: list[dict[str, Any]]  # of the site's ledger


class Told(Facts):
    verb = "basis"
    holds: str


class Held(Facts):
    verb = "hold"
    holds: str


class Trained(Facts):
    verb = "round"
    envelopes = (0, 1)
    entries: list[dict[str, Any]]
    loss: Real | None = None
    left: str | None = None  # why it does not go into the sum


class Behind(Facts):
    """In answer to a round, of a site that lacks what the broadcast adds to."""

    verb = "behind"
    holds: str


class Phase(Facts):
    verb = "sum"
    envelopes = (1,)


class Finished(Facts):
    verb = "finish"
    score: Real | None
    held_out: Count
    entries: list[dict[str, Any]]


F = TypeVar("F", bound=Facts)


def read_answer(data: bytes, kind: type[F]) -> F | Behind:
    """Raises PayloadError for anything but an answer of that kind, or, to a round, Behind."""
    note = read_note(data)
    wanted: type[F | Behind] = Behind if kind is Trained and note.verb == Behind.verb else kind
    if note.verb != wanted.verb or len(note.parts) not in wanted.envelopes:
        raise PayloadError(f"an answer {note.verb!r:.40} with {len(note.parts)} envelopes to the request {kind.verb!r}")
    try:
        return wanted.model_validate({**note.facts, "parts": note.parts})
    except ValidationError as error:
        where = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors()[:3])
        raise PayloadError(f"its answer to {kind.verb!r} is not one: {where}") from error
