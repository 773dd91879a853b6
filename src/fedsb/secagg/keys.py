"""The keys of secure aggregation: every derivation that both parties, or the server later, must reproduce."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsb.secagg.fixed_point import Ring
from fedsb.secagg.messages import KeyPlan, MessageError, SumError, SumPlan, members_bits, pack
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


class Keys(NamedTuple):
    """The public keys of a client: c seals shares for it, and s of each round makes the masks of its pairs."""

    seal: bytes
    masks: tuple[bytes, ...]


def advert_bytes(plan: KeyPlan) -> int:
    """Returns the length of a client's signed keys."""
    return KEY_BYTES * (1 + plan.rounds) + SIGNATURE_BYTES


def sealed_bytes(plan: KeyPlan) -> int:
    """Returns the length of what one client seals for another: a share of two seeds for each round."""
    return NONCE_BYTES + 2 * SEED_BYTES * plan.rounds + TAG_BYTES


def public_key(private: X25519PrivateKey) -> bytes:
    """Returns the 32 bytes of the public key."""
    return private.public_key().public_bytes_raw()


def mask_private(plan: KeyPlan, name: str, seed: bytes) -> X25519PrivateKey:
    """Returns the private half of a round's s, derived from the shared seed."""
    return X25519PrivateKey.from_private_bytes(derive(seed, plan.digest, "mask key", name))


def pair_mask(plan: SumPlan, own: X25519PrivateKey, name: str, peer: str, public: bytes) -> Ring:
    """Returns what `name` adds for its pair with `peer`, (size + 1,). The peer adds its negative modulo 2^bits."""
    key = derive(agree(own, public), plan.digest, "pair mask", *sorted((name, peer)))
    numbers = mask(key, plan.size + 1)
    return numbers if plan.places[name] < plan.places[peer] else np.negative(numbers)


def self_mask(plan: SumPlan, seed: bytes) -> Ring:
    """Returns the client's own mask, (size + 1,)."""
    return mask(derive(seed, plan.digest, "self mask"), plan.size + 1)


def self_check(plan: SumPlan, seed: bytes) -> bytes:
    """Returns the value with which the server checks that it reconstructed the seed of a client's own mask."""
    return derive(seed, plan.digest, "self check")


def seal_key(plan: KeyPlan, own: X25519PrivateKey, public: bytes, sender: str, to: str) -> bytes:
    """Returns the key of the text that `sender` seals for `to`; `own` is the c of one, `public` that of the other."""
    return derive(agree(own, public), plan.digest, "seal", sender, to)


def pack_advert(plan: KeyPlan, name: str, identity: Ed25519PrivateKey, keys: Keys) -> bytes:
    """Returns the body: the keys, and a signature of the keys, the plan and the name."""
    body = keys.seal + b"".join(keys.masks)
    return body + identity.sign(pack(plan, "advert", name, body))


def read_advert(plan: KeyPlan, name: str, advert: bytes) -> Keys:
    """Returns the keys. Raises MessageError if this site did not sign them, or if one is of low order."""
    body, signature = advert[:-SIGNATURE_BYTES], advert[-SIGNATURE_BYTES:]
    if not signed_by(plan.sites[name], signature, pack(plan, "advert", name, body)):
        raise MessageError(f"the keys of {name} are not signed by that site")
    seal, *masks = (body[at : at + KEY_BYTES] for at in range(0, len(body), KEY_BYTES))
    probe = X25519PrivateKey.generate()
    for key in (seal, *masks):
        try:
            agree(probe, key)
        except ValueError as error:
            raise MessageError(f"the keys of {name} hide nothing: one is of low order") from error
    return Keys(seal, tuple(masks))


def distinct(keys: Iterable[Keys]) -> bool:
    """Returns whether no key occurs twice."""
    every = [key for one in keys for key in (one.seal, *one.masks)]
    return len(set(every)) == len(every)


def require_agreement(plan: SumPlan, agreed: KeyPlan, members: Collection[str]) -> None:
    """Raises SumError if keys of this agreement, with these members, cannot be used for a sum."""
    sum_of = f"round {plan.round + 1}"
    if agreed.digest != plan.keys.digest:
        raise SumError(f"{sum_of}: the keys are from a different agreement than that of the sum's plan.")
    if missing := [name for name in plan.names if name not in members]:
        raise SumError(f"{sum_of}: the sum is with {', '.join(missing)}, which has no keys in this agreement.")
    if not agreed.signed and (absent := sorted(set(members) - set(plan.names))):
        raise SumError(
            f"{sum_of}: the sum is without {', '.join(absent)}. Without signatures it is among all clients that agreed "
            "on keys. Otherwise a malicious server could show clients different members of one sum."
        )


def sign_survivors(
    plan: SumPlan, name: str, identity: Ed25519PrivateKey, survivors: Iterable[str], roster: bytes
) -> bytes:
    """Returns a client's signature of the survivors of a sum with the keys of `roster`."""
    return identity.sign(_survivors_bytes(plan, name, survivors, roster))


def signed_survivors(plan: SumPlan, name: str, signature: bytes, survivors: Iterable[str], roster: bytes) -> bool:
    """Returns whether a client signed these survivors of a sum with the keys of `roster`."""
    return signed_by(plan.sites[name], signature, _survivors_bytes(plan, name, survivors, roster))


def _survivors_bytes(plan: SumPlan, name: str, survivors: Iterable[str], roster: bytes) -> bytes:
    """Returns the list with all public keys. A server may repeat a plan of keys, but clients never repeat keys."""
    return pack(plan, "confirm", name, members_bits(plan, survivors) + hashlib.sha256(roster).digest())
