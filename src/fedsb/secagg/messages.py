"""What the parties of a secure sum agree on before it, and the bytes that they exchange.

A message is 2 bytes of length, a header of JSON, and a body. The header says version, run, round, phase, sender and
plan (a hash of all that the parties agreed on). A reader knows all of these beforehand: it takes only the very header
that it expects, and a body of only the length that it expects, and of another says what is wrong with it.

A list of clients is a bit for each site, in order of their names, so that none is listed twice; items of a fixed width
may follow, one for each that is listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fedsb.secagg.fixed_point import FixedPoint
from fedsb.secagg.primitives import KEY_BYTES
from fedsb.utils.errors import RunError, UserError

VERSION = 2
CLIENTS_LIMIT = 1000
SIZE_LIMIT = 1 << 30  # values; a keystream of ChaCha20 goes on for 2^36
TEXT_LIMIT = 200  # characters of a run's id or a client's name
SERVER = ""  # the sender of the server's messages
Phase = Literal["advert", "roster", "sealed", "inbox", "masked", "survivors", "confirm", "confirmed", "shares"]


class SumError(RunError):
    """A secure sum that cannot go on as it is."""

    may_leave = True


class MessageError(SumError):
    """A message that is refused. Nothing has changed by it: the right one may still come."""


@dataclass(frozen=True, kw_only=True)
class SumPlan:
    """One secure sum. Every party makes it for itself, from what it trusts; `sites` above all.

    Raises UserError for a plan that hides nothing or cannot be carried out.
    """

    run: str
    round: int
    sites: Mapping[str, bytes]  # name -> Ed25519 public key (32 bytes) of every client that may take part
    threshold: int  # t: the sum is over at least so many
    size: int  # values of a client's vector, before its weight is put behind them
    clip: float  # of each value, see fixed_point.py
    told: str = ""  # a hash of what else all must have been told alike, for their sum to be what it seems

    def __post_init__(self) -> None:
        n = len(self.sites)
        if not 2 <= n <= CLIENTS_LIMIT:
            raise UserError(f"a secure sum of {n} clients; it takes 2 to {CLIENTS_LIMIT}: a sum of one hides nothing")
        if not n < 2 * self.threshold <= 2 * n:
            raise UserError(
                f"a threshold of {self.threshold} for {n} clients; it must be above {n}/2 and at most {n}, lest one "
                "half be asked for the key of a client and the other half for its own mask"
            )
        if not 1 <= self.size <= SIZE_LIMIT:
            raise UserError(f"a secure sum of {self.size} values; it takes 1 to {SIZE_LIMIT}")
        if not 0 <= self.round < 1 << 31:
            raise UserError(f"a secure sum in round {self.round}; it must be 0 or more")
        for text in (self.run, *self.sites):
            if not 0 < len(text) <= TEXT_LIMIT:
                raise UserError(f"the name {text!r:.60}; a run or a client has 1 to {TEXT_LIMIT} characters")
        if any(len(key) != KEY_BYTES for key in self.sites.values()) or len(set(self.sites.values())) < n:
            raise UserError(f"the sites' keys must be Ed25519 public keys of {KEY_BYTES} bytes, each site with its own")
        FixedPoint(clients=n, clip=self.clip)
        object.__setattr__(self, "sites", dict(sorted(self.sites.items())))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All clients, sorted. A client's place here is that of its shares."""
        return tuple(self.sites)

    @cached_property
    def places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def grid(self) -> FixedPoint:
        return FixedPoint(clients=len(self.sites), clip=self.clip)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ wherever two plans do."""
        sites = [[name, key.hex()] for name, key in self.sites.items()]
        facts = [VERSION, self.run, self.round, sites, self.threshold, self.size, float(self.clip).hex(), self.told]
        return hashlib.sha256(json.dumps(facts).encode()).digest()


def pack(plan: SumPlan, phase: Phase, sender: str, body: bytes) -> bytes:
    header = json.dumps(_header(plan, phase, sender), separators=(",", ":")).encode()
    return len(header).to_bytes(2, "little") + header + body


def read(plan: SumPlan, data: bytes, phase: Phase, sender: str, size: int) -> bytes:
    """The body, of `size` bytes. Raises MessageError, which names what is wrong."""
    start = _body_start(plan, data, phase, sender)
    _check_length(data, phase, sender, start + size)
    return data[start:]


def pack_list(plan: SumPlan, phase: Phase, sender: str, members: Iterable[str], items: Iterable[bytes] = ()) -> bytes:
    """A message that lists clients; `items` are in order of their names."""
    return pack(plan, phase, sender, members_bits(plan, members) + b"".join(items))


def members_bits(plan: SumPlan, members: Iterable[str]) -> bytes:
    listed = set(members)
    return np.packbits([name in listed for name in plan.names]).tobytes()


def read_list(plan: SumPlan, data: bytes, phase: Phase, width: int, without: str = "") -> dict[str, bytes]:
    """From the server: who is listed, sorted, with an item of `width` bytes each; `without` is listed but has none."""
    start = _body_start(plan, data, phase, SERVER)
    items = start + -(-len(plan.names) // 8)
    if len(data) < items:
        _check_length(data, phase, SERVER, items)
    bits = np.unpackbits(np.frombuffer(data, np.uint8)[start:items])
    if bits[len(plan.names) :].any():
        raise MessageError(f"{_whose(phase, SERVER)} lists more clients than the plan's {len(plan.names)}")
    listed = [name for name, bit in zip(plan.names, bits, strict=False) if bit]
    owners = [name for name in listed if name != without]
    _check_length(data, phase, SERVER, items + width * len(owners))
    found = {name: data[items + width * i : items + width * (i + 1)] for i, name in enumerate(owners)}
    return {name: found.get(name, b"") for name in listed}


def _header(plan: SumPlan, phase: Phase, sender: str) -> dict[str, Any]:
    return {
        "fedsb": "secure-sum",
        "version": VERSION,
        "run": plan.run,
        "round": plan.round,
        "phase": phase,
        "sender": sender,
        "plan": plan.digest.hex(),
    }


def _body_start(plan: SumPlan, data: bytes, phase: Phase, sender: str) -> int:
    expected = pack(plan, phase, sender, b"")
    if data.startswith(expected):
        return len(expected)
    whose = _whose(phase, sender)
    try:
        found = json.loads(data[2 : 2 + int.from_bytes(data[:2], "little")])
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{whose} is torn, or none of a secure sum ({len(data)} bytes)") from error
    if not isinstance(found, dict):
        raise MessageError(f"{whose} is none of a secure sum ({len(data)} bytes)")
    for field, wanted in _header(plan, phase, sender).items():
        if field == "plan" and found.get(field) != wanted:
            raise MessageError(
                f"{whose} is of a plan with other sites, threshold, size or clip bound, or of sites told other things"
            )
        if found.get(field) != wanted:
            raise MessageError(f"{whose} has the {field} {found.get(field)!r:.60}; this is {wanted!r}")
    raise MessageError(f"{whose} has a header that this version does not write")


def _check_length(data: bytes, phase: Phase, sender: str, wanted: int) -> None:
    if len(data) != wanted:
        fault = "torn" if len(data) < wanted else "oversized"
        raise MessageError(f"{_whose(phase, sender)} is {fault}: {len(data)} bytes; it should have {wanted}")


def _whose(phase: Phase, sender: str) -> str:
    return f"the message {phase!r} from {sender or 'the server'}"
