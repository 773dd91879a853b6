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
from typing import Any, Literal, Protocol

import numpy as np

from fedsb.secagg.fixed_point import FixedPoint
from fedsb.secagg.primitives import KEY_BYTES
from fedsb.utils.errors import RunError, UserError

VERSION = 3
CLIENTS_LIMIT = 1000
ROUNDS_LIMIT = 1000  # for which keys are agreed on at once
SIZE_LIMIT = 1 << 30  # values; a keystream of ChaCha20 has 2^36
TEXT_LIMIT = 200  # characters of a run's id or a client's name
SERVER = ""  # the sender of the server's messages
KeyPhase = Literal["advert", "roster", "sealed", "inbox", "held"]
SumPhase = Literal["masked", "survivors", "confirm", "confirmed", "shares"]
Phase = Literal[KeyPhase, SumPhase]


class SumError(RunError):
    """Raised if secure aggregation cannot continue."""

    may_leave = True


class MessageError(SumError):
    """Raised for a message that is refused. It changed nothing: the right one may still arrive."""


class Plan(Protocol):
    """The facts that the parties of an exchange have agreed on beforehand."""

    @property
    def run(self) -> str: ...
    @property
    def round(self) -> int: ...
    @property
    def threshold(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def digest(self) -> bytes: ...


class _Sites:
    """The clients of a plan. Raises UserError for a plan that hides nothing or cannot be carried out."""

    run: str
    round: int
    sites: Mapping[str, bytes]  # name -> Ed25519 public key (32 bytes)
    threshold: int

    def __post_init__(self) -> None:
        n = len(self.sites)
        if not 2 <= n <= CLIENTS_LIMIT:
            raise UserError(
                f"Secure aggregation of {n} clients is impossible. It needs 2 to {CLIENTS_LIMIT}: a sum of one client "
                "hides nothing."
            )
        if not 0 <= self.round < 1 << 31:
            raise UserError(f"Secure aggregation in round {self.round} is impossible. The round must be 0 or more.")
        for text in (self.run, *self.sites):
            if not 0 < len(text) <= TEXT_LIMIT:
                raise UserError(
                    f"The name {text!r:.60} is invalid. A run or a client has 1 to {TEXT_LIMIT} characters."
                )
        if any(len(key) != KEY_BYTES for key in self.sites.values()) or len(set(self.sites.values())) < n:
            raise UserError(f"The sites' keys must be different Ed25519 public keys of {KEY_BYTES} bytes each.")
        object.__setattr__(self, "sites", dict(sorted(self.sites.items())))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All clients, sorted."""
        return tuple(self.sites)

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each client in `names`."""
        return {name: place for place, name in enumerate(self.names)}

    def _facts(self) -> list[Any]:
        return [VERSION, self.run, self.round, [[n, key.hex()] for n, key in self.sites.items()], self.threshold]


@dataclass(frozen=True, kw_only=True)
class KeyPlan(_Sites):
    """The plan of one agreement of keys, for the sums of some rounds. A client's share is that of its place in `names`.

    The threshold is above half of all clients that have shares, not only of those in one sum: a malicious server can
    name different members of the same sum to different clients. `signed` is part of it because signatures protect a
    sum only if every honest client requires them.

    Raises UserError for a plan that hides nothing or cannot be carried out.
    """

    run: str
    round: int  # the first
    rounds: int  # for which keys are agreed on
    sites: Mapping[str, bytes]  # of every client that may be in one of the sums
    threshold: int  # t: this many shares give a seed
    attempt: str  # of the server, different for each agreement
    signed: bool = True  # whether clients sign the survivors of a sum before they help to unmask it

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.sites)
        if not 1 <= self.rounds <= ROUNDS_LIMIT:
            raise UserError(f"Keys for {self.rounds} rounds are impossible. An agreement is for 1 to {ROUNDS_LIMIT}.")
        if not n < 2 * self.threshold <= 2 * n:
            raise UserError(
                f"The threshold of {self.threshold} for {n} clients is invalid. It must be above {n}/2, at most {n}. "
                "Otherwise one half could be asked for a client's key and the other half for its own mask. For sums of "
                "few of many clients, agree on keys among the clients of each sum."
            )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ if two plans differ."""
        return _hash([*self._facts(), self.rounds, self.attempt, self.signed])


@dataclass(frozen=True, kw_only=True)
class SumPlan(_Sites):
    """The plan of one secure aggregation. Every party builds its own from what it trusts, above all `sites`.

    Raises UserError for a plan that hides nothing or cannot be carried out.
    """

    run: str
    round: int
    sites: Mapping[str, bytes]  # of every client that may take part, from `keys`
    threshold: int  # t: the sum is over at least this many clients
    size: int  # values of a client's vector, without its weight
    grid: FixedPoint
    keys: KeyPlan
    context: str = ""  # a hash of everything else that all clients must have received identically

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.sites)
        if self.threshold > n:
            raise UserError(f"A sum of {n} clients with a threshold of {self.threshold} is impossible.")
        if not 1 <= self.size <= SIZE_LIMIT:
            raise UserError(f"Secure aggregation of {self.size} values is impossible. It needs 1 to {SIZE_LIMIT}.")
        if self.grid.clients != n:
            raise UserError(f"The grid is for {self.grid.clients} clients. The plan has {n}.")
        keys = self.keys
        if keys.run != self.run or keys.threshold != self.threshold or not 0 <= self.place < keys.rounds:
            raise UserError(f"The keys are not for round {self.round + 1} of this run with this threshold.")
        if strangers := [name for name, key in self.sites.items() if keys.sites.get(name) != key]:
            raise UserError(f"The keys are not for {', '.join(strangers)}: not among the sites of the agreement.")

    @property
    def signed(self) -> bool:
        """True if clients sign the survivors before they help to unmask."""
        return self.keys.signed

    @property
    def place(self) -> int:
        """The round's number, from 0, in the agreement of keys."""
        return self.round - self.keys.round

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ if two plans differ."""
        grid = [self.grid.clients, float(self.grid.clip).hex(), self.grid.bits]
        return _hash([*self._facts(), self.size, grid, self.keys.digest.hex(), self.context])


def pack(plan: Plan, phase: Phase, sender: str, body: bytes) -> bytes:
    """Returns a message."""
    header = json.dumps(_header(plan, phase, sender), separators=(",", ":")).encode()
    return len(header).to_bytes(2, "little") + header + body


def read(plan: Plan, data: bytes, phase: Phase, sender: str, size: int) -> bytes:
    """Returns the body of `size` bytes. Raises MessageError with what is wrong."""
    start = _body_start(plan, data, phase, sender)
    _check_length(data, phase, sender, start + size)
    return data[start:]


def pack_list(plan: Plan, phase: Phase, sender: str, members: Iterable[str], items: Iterable[bytes] = ()) -> bytes:
    """Returns a message that lists clients; `items` are in order of their names."""
    return pack(plan, phase, sender, members_bits(plan, members) + b"".join(items))


def members_bits(plan: Plan, members: Iterable[str]) -> bytes:
    """Returns one bit per client of the plan: whether it is a member."""
    listed = set(members)
    return np.packbits([name in listed for name in plan.names]).tobytes()


def read_list(plan: Plan, data: bytes, phase: Phase, width: int, without: str = "") -> dict[str, bytes]:
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


def _header(plan: Plan, phase: Phase, sender: str) -> dict[str, Any]:
    return {
        "fedsb": "secure-sum",
        "version": VERSION,
        "run": plan.run,
        "round": plan.round,
        "phase": phase,
        "sender": sender,
        "plan": plan.digest.hex(),
    }


def _body_start(plan: Plan, data: bytes, phase: Phase, sender: str) -> int:
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


def _hash(facts: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(facts).encode()).digest()
