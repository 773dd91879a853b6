"""A client of secure aggregation; protocol.py describes the protocol."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsb.secagg.fixed_point import Ring
from fedsb.secagg.keys import (
    ADVERT_BYTES,
    SEALED_BYTES,
    Keys,
    mask_private,
    pack_advert,
    pair_mask,
    public_key,
    read_advert,
    seal_key,
    self_check,
    self_mask,
    sign_survivors,
    signed_survivors,
)
from fedsb.secagg.messages import MessageError, Phase, SumError, SumPlan, pack, read_list
from fedsb.secagg.primitives import SEED_BYTES, SIGNATURE_BYTES, fresh_seed, seal, split, unseal
from fedsb.utils.errors import UserError


class SumClient:
    """One client in one round. Each method answers one message, once, and returns the bytes to send.

    A message that is refused (MessageError) changes nothing: the right one may still arrive. A method that is not due
    raises SumError.
    """

    def __init__(self, plan: SumPlan, name: str, identity: Ed25519PrivateKey) -> None:
        """Raises UserError if the name or the key is not in the plan's directory."""
        if plan.sites.get(name) != identity.public_key().public_bytes_raw():
            raise UserError(
                f"{name!r} is not in the directory of sites with this key. The sites are: {', '.join(plan.names)}."
            )
        self.plan, self.name, self._identity = plan, name, identity
        self._awaits: Phase | None = "advert"
        self._key_seed, self._self_seed = fresh_seed(), fresh_seed()
        self._seal_private = X25519PrivateKey.generate()
        self._mask_private = mask_private(plan, name, self._key_seed)
        self._keys = Keys(public_key(self._seal_private), public_key(self._mask_private))
        self._roster = b""  # as received: seals and signatures are bound to it
        self._peers: dict[str, Keys] = {}  # the other clients of U1
        self._shares: dict[str, tuple[bytes, bytes]] = {}  # of each client of U2: shares of the seeds of s_v and b_v
        self._survivors: tuple[str, ...] = ()

    def advertise(self) -> bytes:
        """Returns this client's signed public keys."""
        self._require("advert")
        self._awaits = "roster"
        return pack(self.plan, "advert", self.name, pack_advert(self.plan, self.name, self._identity, self._keys))

    def share_keys(self, roster: bytes) -> bytes:
        """Returns shares of this client's seeds, sealed for each other client."""
        adverts = self._members(roster, "roster", ADVERT_BYTES, self.plan.names)
        keys = {name: read_advert(self.plan, name, advert) for name, advert in adverts.items()}
        if keys.pop(self.name) != self._keys:
            raise MessageError(f"{self.name}: the roster has different keys under this client's name")
        every = [key for pair in (self._keys, *keys.values()) for key in pair]
        if len(set(every)) < len(every):
            raise MessageError(f"{self.name}: the roster has one key twice")
        self._peers, self._roster, self._awaits = keys, roster, "inbox"
        key_shares, self_shares = (
            split(seed, self.plan.threshold, len(self.plan.names)) for seed in (self._key_seed, self._self_seed)
        )
        shares = dict(zip(self.plan.names, zip(key_shares, self_shares, strict=True), strict=True))
        self._shares = {self.name: shares[self.name]}
        sealed = [seal(self._seal_key(self.name, to), b"".join(shares[to]), roster) for to in keys]
        return pack(self.plan, "sealed", self.name, self_check(self.plan, self._self_seed) + b"".join(sealed))

    def masked(
        self,
        inbox: bytes,
        vector: Ring,  # (size + 1,), from plan.grid.encode
    ) -> bytes:
        """Returns the masked vector. Raises ValueError for a vector of a different shape or type."""
        found = self._members(inbox, "inbox", SEALED_BYTES, (self.name, *self._peers), without=self.name)
        if vector.shape != (self.plan.size + 1,) or vector.dtype != np.uint32:
            raise ValueError(f"{vector.dtype} of shape {vector.shape}; expected uint32 ({self.plan.size + 1},)")
        del found[self.name]
        opened = {name: self._open(name, sealed) for name, sealed in found.items()}
        total = vector + self_mask(self.plan, self._self_seed)
        for peer in opened:
            total += pair_mask(self.plan, self._mask_private, self.name, peer, self._peers[peer].mask)
        self._shares |= opened
        self._awaits = "survivors"
        return pack(self.plan, "masked", self.name, total.astype("<u4").tobytes())

    def confirm(self, survivors: bytes) -> bytes:
        """Returns this client's signature of the survivors."""
        self._survivors = tuple(self._members(survivors, "survivors", 0, self._shares))
        self._awaits = "confirmed"
        signature = sign_survivors(self.plan, self.name, self._identity, self._survivors, self._roster)
        return pack(self.plan, "confirm", self.name, signature)

    @property
    def survivors(self) -> tuple[str, ...]:
        """U3, as this client received and signed it."""
        return self._survivors

    def unmask(self, confirmed: bytes) -> bytes:
        """Returns one share of each client in U2, never both. U3, which t clients signed, determines which one."""
        signatures = self._members(confirmed, "confirmed", SIGNATURE_BYTES, self._survivors)
        for name, signature in signatures.items():
            if not signed_survivors(self.plan, name, signature, self._survivors, self._roster):
                raise MessageError(f"{self.name}: {name} did not sign the survivors that this client received")
        shares = [
            self_share if name in self._survivors else key_share
            for name, (key_share, self_share) in sorted(self._shares.items())
        ]
        self._awaits, self._shares = None, {}
        return pack(self.plan, "shares", self.name, b"".join(shares))

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

    def _seal_key(self, sender: str, to: str) -> bytes:
        peer = to if sender == self.name else sender
        return seal_key(self.plan, self._seal_private, self._peers[peer].seal, sender, to)

    def _open(self, sender: str, sealed: bytes) -> tuple[bytes, bytes]:
        """Returns the shares of the two seeds of `sender`."""
        text = unseal(self._seal_key(sender, self.name), sealed, self._roster)
        if text is None:
            raise MessageError(f"{self.name}: the shares that {sender} sealed for this client cannot be decrypted")
        return text[:SEED_BYTES], text[SEED_BYTES:]
