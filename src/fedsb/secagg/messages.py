"""The agreement of the parties of secure aggregation, and the bytes that they exchange.

A message is 2 bytes of length, a JSON header, and a body. The header contains the version, run, round, phase, sender
and plan (a hash of all that the parties agreed on). A reader knows all of these beforehand. It accepts only the exact
header and body length that it expects, and otherwise reports what is wrong.

A list of clients is one bit per site, in order of their names, so that no site is listed twice. Items of a fixed width
may follow, one per listed client.
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
SIZE_LIMIT = 1 << 30  # values; a keystream of ChaCha20 has 2^36
TEXT_LIMIT = 200  # characters of a run's id or a client's name
SERVER = ""  # the sender of the server's messages
Phase = Literal["advert", "roster", "sealed", "inbox", "masked", "survivors", "confirm", "confirmed", "shares"]


class SumError(RunError):
    """Raised if secure aggregation cannot continue."""

    may_leave = True


class MessageError(SumError):
    """Raised for a message that is refused. It changed nothing: the right one may still arrive."""


@dataclass(frozen=True, kw_only=True)
class SumPlan:
    """The plan of one secure aggregation. Every party builds its own from what it trusts, above all `sites`.

    Raises UserError for a plan that hides nothing or cannot be carried out.
    """

    run: str
    round: int
    sites: Mapping[str, bytes]  # name -> Ed25519 public key (32 bytes) of every client that may take part
    threshold: int  # t: the sum is over at least this many clients
    size: int  # values of a client's vector, without its weight
    clip: float  # of each value, see fixed_point.py
    context: str = ""  # a hash of everything else that all clients must have received identically

    def __post_init__(self) -> None:
        n = len(self.sites)
        if not 2 <= n <= CLIENTS_LIMIT:
            raise UserError(
                f"Secure aggregation of {n} clients is impossible. It needs 2 to {CLIENTS_LIMIT}: a sum of one client "
                "hides nothing."
            )
        if not n < 2 * self.threshold <= 2 * n:
            raise UserError(
                f"The threshold of {self.threshold} for {n} clients is invalid. It must be above {n}/2, at most {n}. "
                "Otherwise one half could be asked for a client's key and the other half for its own mask."
            )
        if not 1 <= self.size <= SIZE_LIMIT:
            raise UserError(f"Secure aggregation of {self.size} values is impossible. It needs 1 to {SIZE_LIMIT}.")
        if not 0 <= self.round < 1 << 31:
            raise UserError(f"Secure aggregation in round {self.round} is impossible. The round must be 0 or more.")
        for text in (self.run, *self.sites):
            if not 0 < len(text) <= TEXT_LIMIT:
                raise UserError(
                    f"The name {text!r:.60} is invalid. A run or a client has 1 to {TEXT_LIMIT} characters."
                )
        if any(len(key) != KEY_BYTES for key in self.sites.values()) or len(set(self.sites.values())) < n:
            raise UserError(f"The sites' keys must be different Ed25519 public keys of {KEY_BYTES} bytes each.")
        FixedPoint(clients=n, clip=self.clip)
        object.__setattr__(self, "sites", dict(sorted(self.sites.items())))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All clients, sorted. A client's place here is the place of its shares."""
        return tuple(self.sites)

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each client in `names`."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def grid(self) -> FixedPoint:
        """The grid of the clients' values."""
        return FixedPoint(clients=len(self.sites), clip=self.clip)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ if two plans differ."""
        sites = [[name, key.hex()] for name, key in self.sites.items()]
        facts = [VERSION, self.run, self.round, sites, self.threshold, self.size, float(self.clip).hex(), self.context]
        return hashlib.sha256(json.dumps(facts).encode()).digest()


def pack(plan: SumPlan, phase: Phase, sender: str, body: bytes) -> bytes:
    """Returns a message."""
    header = json.dumps(_header(plan, phase, sender), separators=(",", ":")).encode()
    return len(header).to_bytes(2, "little") + header + body


def read(plan: SumPlan, data: bytes, phase: Phase, sender: str, size: int) -> bytes:
    """Returns the body of `size` bytes. Raises MessageError with what is wrong."""
    start = _body_start(plan, data, phase, sender)
    _check_length(data, phase, sender, start + size)
    return data[start:]


def pack_list(plan: SumPlan, phase: Phase, sender: str, members: Iterable[str], items: Iterable[bytes] = ()) -> bytes:
    """Returns a message that lists clients; `items` are in order of their names."""
    return pack(plan, phase, sender, members_bits(plan, members) + b"".join(items))


def members_bits(plan: SumPlan, members: Iterable[str]) -> bytes:
    """Returns one bit per client of the plan: whether it is a member."""
    listed = set(members)
    return np.packbits([name in listed for name in plan.names]).tobytes()


def read_list(plan: SumPlan, data: bytes, phase: Phase, width: int, without: str = "") -> dict[str, bytes]:
    """Reads a list from the server: the clients, sorted, with an item of `width` bytes each. `without` has no item."""
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
    start = pack(plan, phase, sender, b"")
    if data.startswith(start):
        return len(start)
    whose = _whose(phase, sender)
    try:
        found = json.loads(data[2 : 2 + int.from_bytes(data[:2], "little")])
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{whose} is torn, or not of secure aggregation ({len(data)} bytes)") from error
    if not isinstance(found, dict):
        raise MessageError(f"{whose} is not of secure aggregation ({len(data)} bytes)")
    for field, expected in _header(plan, phase, sender).items():
        if field == "plan" and found.get(field) != expected:
            raise MessageError(
                f"{whose} belongs to a plan with different sites, threshold, size, clip bound or settings"
            )
        if found.get(field) != expected:
            raise MessageError(f"{whose} has the {field} {found.get(field)!r:.60}; expected {expected!r}")
    raise MessageError(f"{whose} has a header that this version does not write")


def _check_length(data: bytes, phase: Phase, sender: str, expected: int) -> None:
    if len(data) != expected:
        fault = "torn" if len(data) < expected else "oversized"
        raise MessageError(f"{_whose(phase, sender)} is {fault}: {len(data)} bytes; expected {expected}")


def _whose(phase: Phase, sender: str) -> str:
    return f"the message {phase!r} from {sender or 'the server'}"
