"""A client of secure aggregation; protocol.py describes the protocol."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsb.secagg.fixed_point import Ring
from fedsb.secagg.keys import (
    Keys,
    advert_bytes,
    distinct,
    mask_private,
    pack_advert,
    pair_mask,
    public_key,
    read_advert,
    require_agreement,
    seal_key,
    sealed_bytes,
    self_check,
    self_mask,
    sign_survivors,
    signed_survivors,
)
from fedsb.secagg.messages import KeyPlan, MessageError, Phase, Plan, SumError, SumPlan, pack, read_list
from fedsb.secagg.primitives import SEED_BYTES, SIGNATURE_BYTES, fresh_seed, seal, split, unseal
from fedsb.utils.errors import UserError

Shares = dict[str, tuple[bytes, bytes]]  # of the seeds of s_v and b_v of each client v of U2, in one round


class _Party:
    """A client that answers messages in order, each once. A message that is refused (MessageError) changes nothing."""

    plan: Plan
    name: str
    _awaits: Phase | None

    def _require(self, phase: Phase) -> None:
        if self._awaits != phase:
            now = f"this client waits for {self._awaits!r}" if self._awaits else "this client is done"
            raise SumError(f"{self.name}: {phase!r} is not due, {now}. Each message is answered once, in order.")

    def _members(
        self, data: bytes, phase: Phase, width: int, among: Collection[str], without: str = ""
    ) -> dict[str, bytes]:
        """Returns the listed clients with their items. Raises MessageError if the list must not be accepted."""
        self._require(phase)
        found = read_list(self.plan, data, phase, width, without)
        if strangers := [name for name in found if name not in among]:
            raise MessageError(f"{self.name}: {phase!r} lists {', '.join(strangers)}, missing in the previous list")
        if self.name not in found:
            raise MessageError(f"{self.name}: {phase!r} lacks this client")
        if len(found) < self.plan.threshold:
            limit = self.plan.threshold
            raise MessageError(f"{self.name}: {phase!r} lists {len(found)} clients; the threshold is {limit}")
        return found


class ClientKeys(_Party):
    """One client's keys and seeds for the rounds of an agreement, and its shares of the others' seeds.

    Each method answers one message, once, and returns the bytes to send. One that is not due raises SumError.
    """

    plan: KeyPlan

    def __init__(self, plan: KeyPlan, name: str, identity: Ed25519PrivateKey) -> None:
        """Raises UserError if the name or the key is not in the plan's directory."""
        if plan.sites.get(name) != identity.public_key().public_bytes_raw():
            raise UserError(
                f"{name!r} is not in the directory of sites with this key. The sites are: {', '.join(plan.names)}."
            )
        self.plan, self.name, self.identity = plan, name, identity
        self._awaits = "advert"
        seeds = [(fresh_seed(), fresh_seed()) for _ in range(plan.rounds)]  # of s and of b
        self._seeds: list[tuple[bytes, bytes] | None] = [*seeds]  # by round; None for a round that is used
        self._seal_private: X25519PrivateKey | None = X25519PrivateKey.generate()  # until the inbox is open
        self._own = Keys(
            public_key(self._seal_private), tuple(public_key(mask_private(plan, name, seed)) for seed, _ in seeds)
        )
        self._peers: dict[str, Keys] = {}  # the other clients of U1
        self.roster_message = b""  # as received: seals and signatures are bound to it
        self._shares: list[Shares] = [{} for _ in seeds]  # by round
        self.members: frozenset[str] = frozenset()  # U2, from the inbox: the clients whose seeds are shared

    def advertise(self) -> bytes:
        """Returns this client's signed public keys."""
        self._require("advert")
        self._awaits = "roster"
        return pack(self.plan, "advert", self.name, pack_advert(self.plan, self.name, self.identity, self._own))

    def share_keys(self, roster: bytes) -> bytes:
        """Returns shares of this client's seeds, sealed for each other client."""
        adverts = self._members(roster, "roster", advert_bytes(self.plan), self.plan.names)
        keys = {name: read_advert(self.plan, name, advert) for name, advert in adverts.items()}
        if keys.pop(self.name) != self._own:
            raise MessageError(f"{self.name}: the roster has different keys under this client's name")
        if not distinct([self._own, *keys.values()]):
            raise MessageError(f"{self.name}: the roster has one key twice")
        self._peers, self.roster_message, self._awaits = keys, roster, "inbox"
        n, shares = len(self.plan.names), dict.fromkeys(self.plan.names, b"")
        for seed in (seed for pair in self._seeds if pair for seed in pair):
            for name, share in zip(self.plan.names, split(seed, self.plan.threshold, n), strict=True):
                shares[name] += share
        self._keep(self.name, shares[self.name])
        sealed = [seal(self._seal_key(self.name, to), shares[to], roster) for to in keys]
        return pack(self.plan, "sealed", self.name, b"".join(sealed))

    def receive(self, inbox: bytes) -> bytes:
        """Takes what the others sealed for this client. Returns an empty message, as a receipt."""
        found = self._members(inbox, "inbox", sealed_bytes(self.plan), (self.name, *self._peers), without=self.name)
        if not self.plan.signed and len(found) <= len(self._peers):
            n = len(self._peers) + 1
            raise MessageError(f"{self.name}: 'inbox' lists {len(found)} clients; without signatures it is all {n}")
        members = frozenset(found)
        del found[self.name]
        for name, text in {name: self._open(name, sealed) for name, sealed in found.items()}.items():
            self._keep(name, text)
        self.members, self._seal_private, self._awaits = members, None, None
        return pack(self.plan, "held", self.name, b"")

    # --- for one round, numbered from 0 in the agreement ---

    def mask_public(self, peer: str, place: int) -> bytes:
        """Returns the public half of a peer's s."""
        return self._peers[peer].masks[place]

    def take(self, place: int) -> tuple[X25519PrivateKey, bytes, Shares]:
        """Returns this client's private s, its seed of b, and its shares. It gives them out once and forgets them."""
        seeds = self._seeds[place]
        if seeds is None:
            raise SumError(f"{self.name}: the keys of round {self.plan.round + place + 1} are used up.")
        shares, self._shares[place], self._seeds[place] = self._shares[place], {}, None
        return mask_private(self.plan, self.name, seeds[0]), seeds[1], shares

    def _keep(self, name: str, text: bytes) -> None:
        """Stores the shares of a client's seeds, two for each round."""
        for place, shares in enumerate(self._shares):
            at = 2 * SEED_BYTES * place
            shares[name] = text[at : at + SEED_BYTES], text[at + SEED_BYTES : at + 2 * SEED_BYTES]

    def _seal_key(self, sender: str, to: str) -> bytes:
        peer = to if sender == self.name else sender
        assert self._seal_private is not None
        return seal_key(self.plan, self._seal_private, self._peers[peer].seal, sender, to)

    def _open(self, sender: str, sealed: bytes) -> bytes:
        """Returns the shares of the seeds of `sender`."""
        text = unseal(self._seal_key(sender, self.name), sealed, self.roster_message)
        if text is None:
            raise MessageError(f"{self.name}: the shares that {sender} sealed for this client cannot be decrypted")
        return text


class SumClient(_Party):
    """One client in the sum of one round. Each method answers one message, once, and returns the bytes to send."""

    plan: SumPlan

    def __init__(self, plan: SumPlan, keys: ClientKeys) -> None:
        """Raises SumError if the keys are not for this sum, or are used up."""
        self.plan, self.name, self._identity = plan, keys.name, keys.identity
        require_agreement(plan, keys.plan, keys.members)
        if self.name not in plan.names:
            raise SumError(f"{self.name}: the sum of round {plan.round + 1} is without this client")
        self._awaits = "masked"
        private, self_seed, shares = keys.take(plan.place)
        self._secrets: tuple[X25519PrivateKey, bytes] | None = private, self_seed  # until the vector is masked
        self._shares = {name: shares[name] for name in plan.names}
        self._roster_message = keys.roster_message
        self._publics = {peer: keys.mask_public(peer, plan.place) for peer in plan.names if peer != self.name}
        self.survivors: tuple[str, ...] = ()  # U3, as this client received it

    def masked(self, vector: Ring) -> bytes:  # (size + 1,), from plan.grid.encode
        """Returns the masked vector. Raises ValueError for a vector of a different shape or type."""
        self._require("masked")
        if vector.shape != (self.plan.size + 1,) or vector.dtype != np.uint32:
            raise ValueError(f"{vector.dtype} of shape {vector.shape}; expected uint32 ({self.plan.size + 1},)")
        assert self._secrets is not None
        private, self_seed = self._secrets
        total = vector + self_mask(self.plan, self_seed)
        for peer, public in self._publics.items():
            total += pair_mask(self.plan, private, self.name, peer, public)
        self._awaits, self._secrets = "survivors", None
        body = self_check(self.plan, self_seed) + self.plan.grid.pack(total)
        return pack(self.plan, "masked", self.name, body)

    def confirm(self, survivors: bytes) -> bytes:
        """Returns this client's signature of the survivors."""
        if not self.plan.signed:
            raise SumError(f"{self.name}: 'confirm' is not due, this sum is without signatures.")
        self.survivors = tuple(self._members(survivors, "survivors", 0, self.plan.names))
        self._awaits = "confirmed"
        signature = sign_survivors(self.plan, self.name, self._identity, self.survivors, self._roster_message)
        return pack(self.plan, "confirm", self.name, signature)

    def unmask(self, message: bytes) -> bytes:
        """Returns one share of each client of the sum, never both; U3 determines which one.

        `message` contains the signatures of t clients of U3, or U3 itself where the plan has no signatures.
        """
        if self.plan.signed:
            signatures = self._members(message, "confirmed", SIGNATURE_BYTES, self.survivors)
            for name, signature in signatures.items():
                if not signed_survivors(self.plan, name, signature, self.survivors, self._roster_message):
                    raise MessageError(f"{self.name}: {name} did not sign the survivors that this client received")
        else:
            self.survivors = tuple(self._members(message, "survivors", 0, self.plan.names))
        shares = [
            self_share if name in self.survivors else key_share
            for name, (key_share, self_share) in sorted(self._shares.items())
        ]
        self._awaits, self._shares = None, {}
        return pack(self.plan, "shares", self.name, b"".join(shares))
