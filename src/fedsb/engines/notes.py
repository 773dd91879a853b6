"""What a coordinator and a site say to each other: a verb, some facts, and envelopes.

    4 bytes: length of the header | header, JSON: {"verb", "facts", "parts": lengths} | the parts, end to end

A round, seen from the coordinator (site/handle.py answers):

    look    the run's settings                        ->  rows, the labels among them, versions
    open    the classes                               ->  the base model's and the tokenizer's fingerprints, rows
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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsb.federation.payload import PayloadError

HEADER_LIMIT = 1 << 24  # bytes
TEXT, WHOLE, NUMBER, LIST, TABLE, NOTHING = (str,), (int,), (int, float), (list,), (dict,), (type(None),)
# What an answer must say, by its verb: facts with their types, and the envelopes with it.
ANSWERS: Mapping[str, tuple[Mapping[str, tuple[type, ...]], Sequence[int]]] = {
    "look": ({"labels": LIST, "rows": WHOLE, "fingerprint": TEXT}, (0,)),
    "open": ({"rows": WHOLE, "held_out": WHOLE, "cut": WHOLE, "labels": TABLE + NOTHING}, (0,)),
    "start": ({"holds": TEXT + NOTHING}, (0,)),
    "sums": ({"rows": NUMBER, "entries": LIST}, (1,)),
    "basis": ({"holds": TEXT}, (0,)),
    "hold": ({"holds": TEXT}, (0,)),
    "round": ({"entries": LIST, "loss": NUMBER + NOTHING, "left": TEXT + NOTHING}, (0, 1)),
    "behind": ({"holds": TEXT}, (0,)),
    "sum": ({}, (1,)),
    "finish": ({"score": NUMBER + NOTHING, "rows": WHOLE, "entries": LIST}, (0,)),
}


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
    parts, at = list[bytes](), 4 + length
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    return Note(verb=verb, facts=facts, parts=tuple(parts))


def read_answer(data: bytes, verb: str) -> Note:
    """A site's answer to this verb. Raises PayloadError for bytes that are none: a site may send anything."""
    note = read_note(data)
    if note.verb != verb and (verb, note.verb) != ("round", "behind"):
        raise PayloadError(f"an answer to {note.verb!r:.40}, and {verb!r} was asked")
    facts, parts = ANSWERS[note.verb]
    for key, types in facts.items():
        value = note.facts.get(key)  # what is not said is None, where that may be
        least = -math.inf if key in ("loss", "score") else -1
        if type(value) not in types or (isinstance(value, int | float) and not least < value < math.inf):
            raise PayloadError(f"its answer to {verb!r} says {key} = {value!r:.60}, which cannot be")
    if len(note.parts) not in parts:
        raise PayloadError(f"its answer to {verb!r} has {len(note.parts)} envelopes, wanted {parts[-1]}")
    return note
