"""Which key hides or proves what in a secure sum: every derivation that both ends, or the server later, must repeat."""

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
    """The public keys of a client: c, with which shares are sealed for it, and s, which makes its pairs' masks."""

    seal: bytes
    mask: bytes


def public_key(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def mask_private(plan: SumPlan, name: str, seed: bytes) -> X25519PrivateKey:
    """The private half of s, from the seed that is shared."""
    return X25519PrivateKey.from_private_bytes(derive(seed, plan.digest, "mask key", name))


def pair_mask(plan: SumPlan, own: X25519PrivateKey, name: str, peer: str, public: bytes) -> Ring:
    """What `name` adds for its pair with `peer`, (size + 1,): the peer's is its negative modulo 2^32."""
    key = derive(agree(own, public), plan.digest, "pair mask", *sorted((name, peer)))
    numbers = mask(key, plan.size + 1)
    return numbers if plan.places[name] < plan.places[peer] else np.negative(numbers)


def self_mask(plan: SumPlan, seed: bytes) -> Ring:
    return mask(derive(seed, plan.digest, "self mask"), plan.size + 1)


def self_check(plan: SumPlan, seed: bytes) -> bytes:
    """By which the server knows that it put the seed of a client's own mask together rightly."""
    return derive(seed, plan.digest, "self check")


def seal_key(plan: SumPlan, own: X25519PrivateKey, public: bytes, sender: str, to: str) -> bytes:
    """Of the one text that `sender` seals for `to`; `own` is either's c and `public` the other's."""
    return derive(agree(own, public), plan.digest, "seal", sender, to)


def pack_advert(plan: SumPlan, name: str, identity: Ed25519PrivateKey, keys: Keys) -> bytes:
    """The body: two keys and a signature of them, of the plan and of the name."""
    return b"".join(keys) + identity.sign(pack(plan, "advert", name, b"".join(keys)))


def read_advert(plan: SumPlan, name: str, advert: bytes) -> Keys:
    """Raises MessageError for keys that the site of this name did not sign, or that hide nothing."""
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
    return identity.sign(_of_attempt(plan, name, survivors, roster))


def signed_survivors(plan: SumPlan, name: str, signature: bytes, survivors: Iterable[str], roster: bytes) -> bool:
    return signed_by(plan.sites[name], signature, _of_attempt(plan, name, survivors, roster))


def _of_attempt(plan: SumPlan, name: str, survivors: Iterable[str], roster: bytes) -> bytes:
    """The list with the fresh keys of all: a sum may be begun again, and a signature is good for one attempt."""
    return pack(plan, "confirm", name, members_bits(plan, survivors) + hashlib.sha256(roster).digest())
