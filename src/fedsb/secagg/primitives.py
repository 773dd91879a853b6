"""The cryptography of secure aggregation, all of it from `cryptography` and `pycryptodome`, none of it our own.

    seed     16 secret bytes, the size that Shamir's scheme of pycryptodome shares (over GF(2^128))
    derive   32 bytes by HKDF-SHA256 (RFC 5869) from a seed or an X25519 secret, salted by the plan, for one purpose
    agree    X25519 (RFC 7748): the same 32 bytes for both parties of a pair
    mask     the ChaCha20 keystream (RFC 8439) of a key that is used once, as numbers modulo 2^32
    seal     ChaCha20-Poly1305 (RFC 8439) with a random nonce, bound to a context

Limits: 128 bits of security, those of a seed. Python neither hides the duration of arithmetic nor wipes memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsb.secagg.fixed_point import Ring

SEED_BYTES = 16
KEY_BYTES = 32  # also of a public key, X25519 or Ed25519
NONCE_BYTES = 12
TAG_BYTES = 16
SIGNATURE_BYTES = 64


def fresh_seed() -> bytes:
    """Returns a new secret seed."""
    return os.urandom(SEED_BYTES)


def derive(secret: bytes, salt: bytes, *purpose: str) -> bytes:
    """Returns 32 bytes that differ for every secret, salt and purpose."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=json.dumps(purpose).encode()).derive(secret)


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """Returns the pair's secret. Raises ValueError for a public key of low order, which makes the secret public."""
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def mask(key: bytes, size: int) -> Ring:
    """Returns (size,) numbers. The nonce is zero, because a key makes only one mask."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, "<u4").astype(np.uint32, copy=False)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Returns the encrypted text: NONCE_BYTES + len(text) + TAG_BYTES bytes."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """Returns the text; None if a different key or context sealed it, or if a byte has changed."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
    except InvalidTag:
        return None


def split(seed: bytes, threshold: int, count: int) -> list[bytes]:
    """Returns `count` shares of 16 bytes. Any `threshold` of them give the seed; fewer reveal nothing about it."""
    return [share for _, share in Shamir.split(threshold, count, seed, ssss=False)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Returns the seed from exactly `threshold` shares by their position in `split`'s list. 26 shares take 30 ms."""
    return Shamir.combine([(position + 1, share) for position, share in shares.items()], ssss=False)


def signed_by(public: bytes, signature: bytes, text: bytes) -> bool:
    """Returns whether this Ed25519 key (RFC 8032) signed this text."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except InvalidSignature:
        return False
    return True
