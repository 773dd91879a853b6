"""The keys of secure aggregation: every derivation that both parties, or the server later, must reproduce."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsb.secagg.fixed_point import Ring
from fedsb.secagg.messages import MessageError, SumPlan, members_bits, pack
from fedsb.secagg.primitives import (
    KEY_BYTES,
    NONCE_BYTES,
    SEED_BYTES,
    SIGNATURE_BYTES,
    TAG_BYTES,
    agree,
    derive,
    mask,
    signed_by,
)

ADVERT_BYTES = 2 * KEY_BYTES + SIGNATURE_BYTES
SEALED_BYTES = NONCE_BYTES + 2 * SEED_BYTES + TAG_BYTES


class Keys(NamedTuple):
    """The public keys of a client: c seals shares for it, and s makes the masks of its pairs."""

    seal: bytes
    mask: bytes


def public_key(private: X25519PrivateKey) -> bytes:
    """Returns the 32 bytes of the public key."""
    return private.public_key().public_bytes_raw()


def mask_private(plan: SumPlan, name: str, seed: bytes) -> X25519PrivateKey:
    """Returns the private half of s, derived from the shared seed."""
    return X25519PrivateKey.from_private_bytes(derive(seed, plan.digest, "mask key", name))


def pair_mask(plan: SumPlan, own: X25519PrivateKey, name: str, peer: str, public: bytes) -> Ring:
    """Returns what `name` adds for its pair with `peer`, (size + 1,). The peer adds its negative modulo 2^32."""
    key = derive(agree(own, public), plan.digest, "pair mask", *sorted((name, peer)))
    numbers = mask(key, plan.size + 1)
    return numbers if plan.places[name] < plan.places[peer] else np.negative(numbers)


def self_mask(plan: SumPlan, seed: bytes) -> Ring:
    """Returns the client's own mask, (size + 1,)."""
    return mask(derive(seed, plan.digest, "self mask"), plan.size + 1)


def self_check(plan: SumPlan, seed: bytes) -> bytes:
    """Returns the value with which the server checks that it reconstructed the seed of a client's own mask."""
    return derive(seed, plan.digest, "self check")


def seal_key(plan: SumPlan, own: X25519PrivateKey, public: bytes, sender: str, to: str) -> bytes:
    """Returns the key of the text that `sender` seals for `to`; `own` is the c of one, `public` that of the other."""
    return derive(agree(own, public), plan.digest, "seal", sender, to)


def pack_advert(plan: SumPlan, name: str, identity: Ed25519PrivateKey, keys: Keys) -> bytes:
    """Returns the body: two keys and a signature of the keys, the plan and the name."""
    return b"".join(keys) + identity.sign(pack(plan, "advert", name, b"".join(keys)))


def read_advert(plan: SumPlan, name: str, advert: bytes) -> Keys:
    """Returns the keys. Raises MessageError if this site did not sign them, or if they are of low order."""
    both, signature = advert[: 2 * KEY_BYTES], advert[2 * KEY_BYTES :]
    if not signed_by(plan.sites[name], signature, pack(plan, "advert", name, both)):
        raise MessageError(f"the keys of {name} are not signed by that site")
    keys = Keys(both[:KEY_BYTES], both[KEY_BYTES:])
    for key in keys:
        try:
            agree(X25519PrivateKey.generate(), key)
        except ValueError as error:
            raise MessageError(f"the keys of {name} hide nothing: one is of low order") from error
    return keys


def sign_survivors(
    plan: SumPlan, name: str, identity: Ed25519PrivateKey, survivors: Iterable[str], roster: bytes
) -> bytes:
    """Returns a client's signature of the survivors of this attempt."""
    return identity.sign(_attempt_bytes(plan, name, survivors, roster))


def signed_survivors(plan: SumPlan, name: str, signature: bytes, survivors: Iterable[str], roster: bytes) -> bool:
    """Returns whether a client signed these survivors of this attempt."""
    return signed_by(plan.sites[name], signature, _attempt_bytes(plan, name, survivors, roster))


def _attempt_bytes(plan: SumPlan, name: str, survivors: Iterable[str], roster: bytes) -> bytes:
    """Returns the list with all fresh keys: a sum may be restarted, and a signature is valid for one attempt."""
    return pack(plan, "confirm", name, members_bits(plan, survivors) + hashlib.sha256(roster).digest())
