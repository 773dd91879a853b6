"""The keys and certificates of a federation.

CA       P-384; signs the server's certificate and the directory of sites; its private key can be kept off the server
server   P-384; TLS, for the host names that sites connect to and for localhost
node     P-384, of a site; signs each of its requests (Flower's supernode authentication)
identity Ed25519, of a site; signs its keys in secure aggregation, between sites; Flower never receives it
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsb.utils.errors import UserError

CA_DAYS = 1825
SERVER_DAYS = 730
LOCAL = ("localhost", "127.0.0.1", "::1")


def new_authority(federation: str) -> tuple[str, str]:
    """Returns the certificate and the private key of a new certificate authority, in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"fedsb federation {federation}")
    builder = _builder(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return _pem(builder.add_extension(identifier, critical=False).sign(key, SHA256())), private_pem(key)


def new_server(ca: str, ca_key: str, hosts: Sequence[str]) -> tuple[str, str]:
    """Returns a server certificate for these hosts and for localhost, and its private key, in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    authority, signer = x509.load_pem_x509_certificate(ca.encode()), _ec_key(ca_key)
    names = x509.SubjectAlternativeName([_host(host) for host in dict.fromkeys((*hosts, *LOCAL))])
    builder = _builder(_name("fedsb coordinator"), authority.subject, key.public_key(), SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(names, critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return _pem(builder.add_extension(identifier, critical=False).sign(signer, SHA256())), private_pem(key)


def new_node_key() -> tuple[str, str]:
    """Returns a private and a public key in PEM, of the kind by which Flower identifies a node."""
    key = ec.generate_private_key(ec.SECP384R1())
    return private_pem(key), key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def new_identity() -> tuple[str, str]:
    """Returns a private and a public Ed25519 key, 32 bytes each, in hexadecimal."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw().hex(), key.public_key().public_bytes_raw().hex()


def public_identity(private: str) -> str:
    """Returns the public key of an identity's private key, both in hexadecimal."""
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(private)).public_key().public_bytes_raw().hex()


def check_public(node_key: str, identity: str) -> None:
    """Raises ValueError unless these are the public keys of a node and of an identity."""
    if not isinstance(load_pem_public_key(node_key.encode()), ec.EllipticCurvePublicKey):
        raise ValueError("the node key is not an elliptic-curve key")
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity))


def check_private(node_key: str, identity: str) -> None:
    """Raises ValueError unless these are the private keys of a node and of an identity."""
    _ec_key(node_key)
    public_identity(identity)


def check_authority(certificate: str) -> None:
    """Raises ValueError for an invalid certificate."""
    x509.load_pem_x509_certificate(certificate.encode())


def sign(ca_key: str, text: bytes) -> str:
    """Returns the signature of a text by the authority, in hexadecimal."""
    return _ec_key(ca_key).sign(text, ec.ECDSA(SHA256())).hex()


def signed(ca: str, text: bytes, signature: str) -> bool:
    """Returns whether the authority with this certificate signed this text."""
    public = x509.load_pem_x509_certificate(ca.encode()).public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    try:
        public.verify(bytes.fromhex(signature), text, ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def check_dates(certificate: str, whose: str, remedy: str) -> None:
    """Raises UserError for a certificate that has expired or is not valid yet. `whose` starts the message."""
    parsed = x509.load_pem_x509_certificate(certificate.encode())
    now = datetime.datetime.now(datetime.UTC)
    if now > parsed.not_valid_after_utc:
        raise UserError(f"{whose} expired on {parsed.not_valid_after_utc:%Y-%m-%d}. {remedy}")
    if now < parsed.not_valid_before_utc:
        raise UserError(
            f"{whose} is valid from {parsed.not_valid_before_utc:%Y-%m-%d}, but this machine's date is {now:%Y-%m-%d}. "
            "Set the clock."
        )


def tls_client(ca: str) -> ssl.SSLContext:
    """Returns a client context that trusts only this authority, with TLS 1.2 or newer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca)
    return context


def private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _ec_key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError("The private key is not an elliptic-curve key, so fedsb did not make it. Ask for a new copy.")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(minutes=10))  # clocks differ
    return builder.not_valid_after(now + datetime.timedelta(days=days))


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
