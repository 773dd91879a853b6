"""A secure aggregation of a few sites in memory, one phase at a time, with access to every byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.secagg.client import ClientKeys, SumClient
from fedsb.secagg.fixed_point import FixedPoint, Ring
from fedsb.secagg.keys import Keys, advert_bytes, mask_private, pair_mask, sealed_bytes, self_mask
from fedsb.secagg.messages import KeyPlan, Phase, SumPlan
from fedsb.secagg.primitives import KEY_BYTES, SIGNATURE_BYTES
from fedsb.secagg.server import KeyServer, SumServer

IDENTITIES = {name: Ed25519PrivateKey.generate() for name in "abcdefghij"}
WHOLE = [1 + 2 + 3 + 4] * 6  # the result of Sum()
LOW_ORDER = bytes(32)  # an X25519 key with which every secret is zero
OF_KEYS: tuple[Phase, ...] = ("advert", "sealed", "held")  # the clients' messages
OF_SUM: tuple[Phase, ...] = ("masked", "confirm", "shares")
ANSWERS = OF_KEYS + OF_SUM
LISTS: dict[Phase, Phase] = {  # the clients' message -> the server's list that it answers
    "sealed": "roster",
    "held": "inbox",
    "confirm": "survivors",
    "shares": "confirmed",
}


def make_keys(
    n: int = 4,
    threshold: int = 3,
    rounds: int = 1,
    *,
    run: str = "run",
    round: int = 7,
    attempt: str = "first",
    signed: bool = True,
) -> KeyPlan:
    sites = {name: IDENTITIES[name].public_key().public_bytes_raw() for name in list(IDENTITIES)[:n]}
    return KeyPlan(
        run=run, round=round, rounds=rounds, sites=sites, threshold=threshold, attempt=attempt, signed=signed
    )


def make_plan(
    keys: KeyPlan | None = None, *, size: int = 5, place: int = 0, bits: int = 32, names: str = ""
) -> SumPlan:
    """Returns the plan of the sum in the round `place` of an agreement, among `names` or all of its sites."""
    keys = keys or make_keys()
    sites = {name: key for name, key in keys.sites.items() if name in (names or keys.sites)}
    return SumPlan(
        run=keys.run,
        round=keys.round + place,
        sites=sites,
        threshold=keys.threshold,
        size=size,
        grid=FixedPoint(clients=len(sites), clip=1.0, bits=bits),
        keys=keys,
    )


class Seeds(NamedTuple):
    """The secrets of a client for one round."""

    key: bytes  # of s
    self: bytes  # of b


class Sum:
    """One sum, after an agreement of keys of its own or that of `earlier`.

    Client k's vector in the ring is k everywhere, unless a test changes it. Clients without keys are not in the sum.
    """

    def __init__(self, plan: SumPlan | None = None, earlier: Sum | None = None) -> None:
        self.plan = plan or make_plan()
        keys = self.plan.keys
        self.phase: Phase = "masked" if earlier else "advert"
        self.key_server = earlier.key_server if earlier else KeyServer(keys)
        self.keys = earlier.keys if earlier else {k: ClientKeys(keys, k, IDENTITIES[k]) for k in keys.names}
        self.all_seeds: dict[str, list[Seeds]] = (
            earlier.all_seeds
            if earlier
            else {k: [Seeds(*pair) for pair in own._seeds if pair] for k, own in self.keys.items()}
        )
        self.sums: SumServer | None = SumServer(self.plan, self.key_server) if earlier else None
        self.clients: dict[str, SumClient] = {}
        self.vectors: dict[str, Ring] = {
            name: np.full(self.plan.size + 1, k + 1, np.uint32) for k, name in enumerate(keys.names)
        }
        self.mail: dict[str, bytes] = dict.fromkeys(self.plan.names if earlier else keys.names, b"")  # in this phase
        self.sent: dict[tuple[Phase, str], bytes] = {}

    @property
    def server(self) -> KeyServer | SumServer:
        return self.sums or self.key_server

    @property
    def now(self) -> KeyPlan | SumPlan:
        """The plan of this phase."""
        return self.plan.keys if self.phase in OF_KEYS else self.plan

    @property
    def answers(self) -> tuple[Phase, ...]:
        return ANSWERS if self.plan.signed else tuple(phase for phase in ANSWERS if phase != "confirm")

    @property
    def seeds(self) -> dict[str, Seeds]:
        """The clients' secrets for this sum."""
        return {name: seeds[self.plan.place] for name, seeds in self.all_seeds.items()}

    def answer(self, name: str, mail: bytes | None = None) -> bytes:
        """Returns a client's answer in this phase, to the server's message or to `mail`."""
        return self.ask(self.phase, name, self.mail[name] if mail is None else mail)

    def ask(self, phase: Phase, name: str, mail: bytes) -> bytes:
        keys = self.keys[name]
        calls: dict[Phase, Callable[[bytes], bytes]] = {"sealed": keys.share_keys, "held": keys.receive}
        if phase == "advert":
            return keys.advertise()
        if phase in calls:
            return calls[phase](mail)
        client = self.client(name)
        if phase == "masked":
            return client.masked(self.vectors[name])
        return client.confirm(mail) if phase == "confirm" else client.unmask(mail)

    def client(self, name: str) -> SumClient:
        if name not in self.clients:
            self.clients[name] = SumClient(self.plan, self.keys[name])
        return self.clients[name]

    def deliver(self, gone: Collection[str] = ()) -> None:
        """Delivers the answers of all clients in this phase, except those in `gone`."""
        for name in self.mail:
            if name not in gone:
                self.sent[self.phase, name] = self.answer(name)
                self.server.receive(name, self.sent[self.phase, name])

    def close(self) -> None:
        match self.phase:
            case "advert":
                self.mail = self.key_server.roster()
            case "sealed":
                self.mail = self.key_server.inboxes()
            case "held":
                self.key_server.close()
                self._begin_sum()
            case "masked":
                assert self.sums
                self.mail = self.sums.survivors_lists()
            case _:
                assert self.sums
                self.mail = self.sums.confirmations()
        self.phase = self.answers[self.answers.index(self.phase) + 1]

    def to(self, phase: Phase, gone: dict[str, Phase] | None = None) -> Sum:
        """Advances to where clients answer `phase`; `gone` has the first answer that a client does not give."""
        while self.phase != phase:
            self.deliver([name for name, last in (gone or {}).items() if last == self.phase])
            self.close()
        return self

    def finish(self, gone: dict[str, Phase] | None = None) -> Ring:
        self.to("shares", gone)
        self.deliver([name for name, last in (gone or {}).items() if last == "shares"])
        assert self.sums
        return self.sums.total()

    def following(self, place: int = 1) -> Sum:
        """Returns the sum of a different round with the same keys, among the same clients."""
        return Sum(replace(self.plan, round=self.plan.keys.round + place), self)

    # --- what a test knows ---

    def public(self, name: str) -> Keys:
        return self.keys[name]._own

    def pairs(self, name: str, peers: Collection[str]) -> Ring:
        """Returns the sum of the masks that `name` adds for its pairs with `peers`."""
        own, total = mask_private(self.plan.keys, name, self.seeds[name].key), np.zeros(self.plan.size + 1, np.uint32)
        for peer in set(peers) - {name}:
            total += pair_mask(self.plan, own, name, peer, self.public(peer).masks[self.plan.place])
        return total

    def own_mask(self, name: str) -> Ring:
        """Returns the mask of b, which no other client has."""
        return self_mask(self.plan, self.seeds[name].self)

    def masked(self, name: str) -> Ring:
        """Returns the vector that a client sent."""
        return self.vector_of(self.sent["masked", name])

    def vector_of(self, message: bytes) -> Ring:
        return self.plan.grid.unpack(body(message)[KEY_BYTES:], self.plan.size + 1)

    def width(self, listed: Phase) -> int:
        """Returns the bytes of an item in the server's list."""
        widths: dict[Phase, int] = {
            "roster": advert_bytes(self.plan.keys),
            "inbox": sealed_bytes(self.plan.keys),
            "confirmed": SIGNATURE_BYTES,
        }
        return widths.get(listed, 0)

    def _begin_sum(self) -> None:
        names = "".join(name for name in self.plan.names if name in self.key_server.members)
        grid = replace(self.plan.grid, clients=len(names))
        self.plan = replace(self.plan, sites={name: self.plan.sites[name] for name in names}, grid=grid)
        self.sums, self.mail = SumServer(self.plan, self.key_server), dict.fromkeys(names, b"")


def body(message: bytes) -> bytes:
    return message[2 + int.from_bytes(message[:2], "little") :]


def is_uniform(numbers: np.ndarray) -> bool:
    """Chi-square of the bytes over 256 bins: 255 +- 22.6 where they are random; 10 deviations pass."""
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    expected = numbers.nbytes / 256
    return bool(((counts - expected) ** 2 / expected).sum() < 255 + 226)


# --- bad messages ---


def spoil(message: bytes, **changes: object) -> bytes:
    """Returns the message with different fields in its header."""
    length = int.from_bytes(message[:2], "little")
    header = json.dumps(json.loads(message[2 : 2 + length]) | changes, separators=(",", ":")).encode()
    return len(header).to_bytes(2, "little") + header + message[2 + length :]


def flip(message: bytes, at: int) -> bytes:
    at %= len(message)
    return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]


HEADERS = [
    ({"version": 2}, "the version 2; expected 3"),
    ({"run": "other"}, "the run 'other'; expected 'run'"),
    ({"round": 6}, "the round 6; expected 7"),
    ({"phase": "joke"}, "the phase 'joke'"),
    ({"sender": "b"}, "the sender 'b'"),
    ({"plan": "00" * 32}, "different sites, threshold, size, clip"),
    ({"fedsb": "update"}, "the fedsb 'update'"),
    ({"version": 3.0}, "does not write"),  # equal to 3 in Python
    ({"more": 1}, "does not write"),
]
SHAPES = [
    (lambda m: b"", "torn"),
    (lambda m: m[:1], "torn"),
    (lambda m: m[:50], "torn"),
    (lambda m: m[:-1], "torn"),
    (lambda m: m + b"\0", "oversized"),
    (lambda m: m + m, "oversized"),
    (lambda m: b"\x02\x00[]" + m, "not of secure aggregation"),
    (lambda m: b"\xff\xff" + b"[" * 65535, "not of secure aggregation"),
    (lambda m: b"\x80\x04\x95" + m, "not of secure aggregation"),  # a pickle's first bytes
    (lambda m: flip(m, 3), "not of secure aggregation|has the"),
]
