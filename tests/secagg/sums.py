"""A secure sum of a few sites in memory, one phase at a time, with every byte at hand."""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.secagg.client import SumClient
from fedsb.secagg.fixed_point import Ring
from fedsb.secagg.keys import pair_mask
from fedsb.secagg.messages import Phase, SumPlan
from fedsb.secagg.server import SumServer

IDENTITIES = {name: Ed25519PrivateKey.generate() for name in "abcdefghi"}
WHOLE = [1 + 2 + 3 + 4] * 6  # what Sum() comes to
LOW_ORDER = bytes(32)  # an X25519 key with which every secret is zero
ANSWERS: tuple[Phase, ...] = ("advert", "sealed", "masked", "confirm", "shares")


def make_plan(n: int = 4, threshold: int = 3, size: int = 5, run: str = "run", round: int = 7) -> SumPlan:
    sites = {name: IDENTITIES[name].public_key().public_bytes_raw() for name in list(IDENTITIES)[:n]}
    return SumPlan(run=run, round=round, sites=sites, threshold=threshold, size=size, clip=1.0)


class Sum:
    """Client k's vector in the ring is k everywhere, unless told otherwise."""

    def __init__(self, plan: SumPlan | None = None) -> None:
        self.plan = plan or make_plan()
        self.server = SumServer(self.plan)
        self.clients = {name: SumClient(self.plan, name, IDENTITIES[name]) for name in self.plan.names}
        self.vectors: dict[str, Ring] = {
            name: np.full(self.plan.size + 1, k + 1, np.uint32) for k, name in enumerate(self.plan.names)
        }
        self.mail: dict[str, bytes] = dict.fromkeys(self.plan.names, b"")  # what clients get in this phase
        self.sent: dict[tuple[Phase, str], bytes] = {}
        self.phase: Phase = "advert"

    def answer(self, name: str, mail: bytes | None = None) -> bytes:
        """A client's answer in this phase, to what the server sent or to `mail`."""
        client, mail = self.clients[name], self.mail[name] if mail is None else mail
        match self.phase:
            case "advert":
                return client.advertise()
            case "sealed":
                return client.share_keys(mail)
            case "masked":
                return client.masked(mail, self.vectors[name])
            case "confirm":
                return client.confirm(mail)
            case _:
                return client.unmask(mail)

    def deliver(self, gone: Collection[str] = ()) -> None:
        """All who are in this phase, but not `gone`, answer it."""
        for name in self.mail:
            if name not in gone:
                self.sent[self.phase, name] = self.answer(name)
                self.server.receive(name, self.sent[self.phase, name])

    def close(self) -> None:
        server, phase = self.server, self.phase
        closes = (server.roster, server.inboxes, server.survivors_lists, server.confirmations)
        self.mail = closes[ANSWERS.index(phase)]()
        self.phase = ANSWERS[ANSWERS.index(phase) + 1]

    def to(self, phase: Phase, gone: dict[str, Phase] | None = None) -> Sum:
        """Up to where clients are to answer `phase`; `gone` says who vanishes before which answer."""
        while self.phase != phase:
            self.deliver([name for name, last in (gone or {}).items() if last == self.phase])
            self.close()
        return self

    def finish(self, gone: dict[str, Phase] | None = None) -> Ring:
        self.to("shares", gone)
        self.deliver([name for name, last in (gone or {}).items() if last == "shares"])
        return self.server.total()

    def pairs(self, name: str, peers: Collection[str]) -> Ring:
        """The sum of the masks that `name` adds for its pairs with these."""
        client, total = self.clients[name], np.zeros(self.plan.size + 1, np.uint32)
        for peer in set(peers) - {name}:
            total += pair_mask(self.plan, client._mask_private, name, peer, self.clients[peer]._keys.mask)
        return total


def body(message: bytes) -> bytes:
    return message[2 + int.from_bytes(message[:2], "little") :]


def is_uniform(numbers: Ring) -> bool:
    """Chi-square of the bytes over 256 bins: 255 +- 22.6 where they are random; 10 deviations pass."""
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    expected = 4 * numbers.size / 256
    return bool(((counts - expected) ** 2 / expected).sum() < 255 + 226)


# --- bad messages ---


def spoil(message: bytes, **changes: object) -> bytes:
    """The message with other fields in its header."""
    length = int.from_bytes(message[:2], "little")
    header = json.dumps(json.loads(message[2 : 2 + length]) | changes, separators=(",", ":")).encode()
    return len(header).to_bytes(2, "little") + header + message[2 + length :]


def flip(message: bytes, at: int) -> bytes:
    at %= len(message)
    return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]


HEADERS = [
    ({"version": 3}, "the version 3; expected 2"),
    ({"run": "other"}, "the run 'other'; expected 'run'"),
    ({"round": 6}, "the round 6; expected 7"),
    ({"phase": "joke"}, "the phase 'joke'"),
    ({"sender": "b"}, "the sender 'b'"),
    ({"plan": "00" * 32}, "different sites, threshold, size, clip"),
    ({"fedsb": "update"}, "the fedsb 'update'"),
    ({"version": 2.0}, "does not write"),  # equal to 2 in Python
    ({"more": 1}, "does not write"),
]
SHAPES = [
    (lambda m: b"", "torn"),
    (lambda m: m[:1], "torn"),
    (lambda m: m[:50], "torn"),
    (lambda m: m[:-1], "torn: "),
    (lambda m: m + b"\0", "oversized"),
    (lambda m: m + m, "oversized"),
    (lambda m: b"\x02\x00[]" + m, "not of secure aggregation"),
    (lambda m: b"\xff\xff" + b"[" * 65535, "not of secure aggregation"),
    (lambda m: b"\x80\x04\x95" + m, "not of secure aggregation"),  # a pickle's first bytes
    (lambda m: flip(m, 3), "not of secure aggregation|has the"),
]
