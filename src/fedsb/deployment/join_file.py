"""A site's files: the coordinator's join file, the site's keys, and the signed directory of sites.

A site makes its own keys with `fedsb site keygen NAME.site`. The private keys stay in its folder; the coordinator gets
NAME.site, which has the public keys. If the coordinator makes the keys instead, the join file contains the private
ones, and anyone who obtains it can impersonate the site.

The directory has the identity key of every site. When sites are added or revoked, the coordinator sends a newer one
(`directory.json`), signed by the federation's certificate authority.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsb.deployment.certificates import (
    check_authority,
    check_dates,
    check_private,
    check_public,
    new_identity,
    new_node_key,
    public_identity,
    signed,
)
from fedsb.utils.errors import UserError
from fedsb.utils.files import remove_temporary, safe_name, write_atomic

VERSION = 1  # of all files here
JOIN_FILE = "site.join"  # the join file in a site's folder, with the private keys
KEYS_FILE = "site.keys"  # the private keys of a site that made its own
PUBLIC_KEYS_SUFFIX = ".site"  # of the file with the public keys of such a site

File = TypeVar("File", bound="_Strict")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Directory(_Strict):
    """The sites of a federation: name -> Ed25519 public key, 32 bytes in hexadecimal. A higher serial is newer."""

    version: Literal[1] = 1
    federation: str
    serial: int
    sites: Mapping[str, str]
    signature: str = ""  # of all fields above, by the authority

    @property
    def text(self) -> bytes:
        """Returns the text that is signed."""
        return json.dumps(self.model_dump(exclude={"signature"}), sort_keys=True).encode()


class SitePublicKeys(_Strict):
    """The content of NAME.site: the public keys of a site that made its own."""

    version: Literal[1] = 1
    site: str
    node_key: str  # PEM
    identity: str  # Ed25519, hexadecimal


class Keys(_Strict):
    """A site's private keys."""

    version: Literal[1] = 1
    node_key: str  # PEM; signs each request to the coordinator
    identity: str  # Ed25519, hexadecimal; signs the site's messages in secure aggregation


class JoinFile(_Strict):
    """The content of a join file."""

    version: Literal[1] = 1
    federation: str
    site: str
    address: str  # host:port
    ca: str  # certificate, PEM
    node_key: str  # as in Keys; both are empty for a site that made its own keys
    identity: str
    directory: Directory

    @property
    def text(self) -> str:
        """Returns the content of the file."""
        return self.model_dump_json(indent=2) + "\n"


def read_join_file(path: Path) -> JoinFile:
    """Reads a join file. Raises UserError if it is missing, damaged, of a different version, or expired."""
    join = _read(JoinFile, path, "join file")
    try:
        check_authority(join.ca)
        if join.node_key:
            check_private(join.node_key, join.identity)
    except ValueError as error:
        raise UserError(f"{path} contains an invalid key. Ask the coordinator for a new copy.") from error
    if not (port := join.address.rpartition(":")[2]).isdecimal() or join.address == port:
        raise UserError(f"{path} has the address {join.address!r}, not HOST:PORT. Ask the coordinator for a new copy.")
    remedy = "Ask the coordinator for a join file of a new federation."
    check_dates(join.ca, "The certificate of the federation's authority in this join file", remedy)
    _check_signed(join, join.directory, path)
    return join


def make_keys(path: Path, folder: Path) -> SitePublicKeys:
    """Writes a new site's private keys to its folder, and its public keys to `path`, for the coordinator.

    Raises UserError if the folder already contains keys, and for an invalid name.
    """
    name = path.name.removesuffix(PUBLIC_KEYS_SUFFIX)
    if path.name != name + PUBLIC_KEYS_SUFFIX:
        raise UserError(f"{path} is not a valid file name. Write NAME{PUBLIC_KEYS_SUFFIX}, with the name of the site.")
    check_names([name])
    refuse_overwriting(folder / KEYS_FILE)
    (node_private, node_public), (private, public) = new_node_key(), new_identity()
    public_keys = SitePublicKeys(site=name, node_key=node_public, identity=public)
    # The private keys are written last. If the process is killed before, the same command writes both files again.
    write_atomic(path, (public_keys.model_dump_json(indent=2) + "\n").encode())
    remove_temporary(folder / KEYS_FILE)
    write_secret(folder / KEYS_FILE, Keys(node_key=node_private, identity=private).model_dump_json(indent=2) + "\n")
    return public_keys


def read_public_keys(path: Path) -> SitePublicKeys:
    """Reads a NAME.site. Raises UserError if it is missing or damaged, and for invalid keys."""
    keys = _read(SitePublicKeys, path, "file of public keys")
    try:
        check_public(keys.node_key, keys.identity)
    except ValueError as error:
        raise UserError(f"{path} contains an invalid key ({error}). Ask the site for a new copy.") from None
    return keys


def check_names(sites: Sequence[str]) -> None:
    """Raises UserError for a name that is not a valid file name, and for a duplicate."""
    for name in sites:
        if safe_name(name) != name:
            raise UserError(
                f"{name!r} is not a valid site name. Use at most 50 letters, digits, spaces, '.', '_' and '-'."
            )
    duplicates = sorted({name for name in sites if list(sites).count(name) > 1})
    if duplicates:
        raise UserError(f"Duplicate site names: {', '.join(duplicates)}. Give each site once.")


def store_join_file(path: Path, folder: Path) -> JoinFile:
    """Reads a join file and stores a copy, with the site's private keys, in the site's folder.

    If the folder already has a copy, the newer directory and the address of the given file are kept. Raises UserError
    if the folder belongs to a different site or federation, and if the site's own keys do not match the join file.
    """
    if path.name.endswith(PUBLIC_KEYS_SUFFIX):
        raise UserError(
            f"{path} is for the coordinator, which creates the join file from it. Join with the join file instead."
        )
    join, stored = _with_keys(read_join_file(path), path, folder), folder / JOIN_FILE
    if not stored.exists():
        write_secret(stored, join.text)
        return join
    old = read_join_file(stored)
    if old.federation != join.federation or old.site != join.site:
        raise UserError(
            f"{folder} belongs to site {old.site!r} of federation {old.federation}, but {path} is for site "
            f"{join.site!r} of federation {join.federation}. Choose a different folder with --folder."
        )
    newer = join.directory.serial > old.directory.serial
    new = join if newer else old.model_copy(update={"address": join.address})  # a corrected one
    if new != old:
        write_atomic(stored, new.text.encode(), private=True)
    return new


def update_directory(folder: Path, directory_file: Path) -> Directory:
    """Stores a newer directory in a site's folder. Raises UserError for an older one or a different federation."""
    join = read_join_file(folder / JOIN_FILE)
    new = _read(Directory, directory_file, "directory")
    _check_signed(join, new, directory_file)
    if new.serial < join.directory.serial:
        raise UserError(
            f"{directory_file} is older (serial {new.serial}) than the directory in {folder} "
            f"(serial {join.directory.serial}). Ask the coordinator for its current directory.json."
        )
    write_atomic(folder / JOIN_FILE, join.model_copy(update={"directory": new}).text.encode(), private=True)
    return new


def write_secret(path: Path, text: str) -> None:
    """Writes a new file that only its owner can read. Raises UserError if the file exists."""
    refuse_overwriting(path)
    write_atomic(path, text.encode(), private=True)


def refuse_overwriting(path: Path) -> None:
    """Raises UserError if the file exists."""
    if path.exists():
        raise UserError(f"{path} exists. Keys are never overwritten. Move it first.")


def _with_keys(join: JoinFile, path: Path, folder: Path) -> JoinFile:
    """Returns the join file with the private keys, either its own or those in the folder."""
    own = folder / KEYS_FILE
    if join.node_key:
        if own.exists():
            raise UserError(
                f"{path} contains keys that the coordinator made, but this site has made its own ({own}). Anyone who "
                f"obtains that file can impersonate the site. Ask the coordinator to add "
                f"{join.site}{PUBLIC_KEYS_SUFFIX} instead, or choose a different folder with --folder."
            )
        return join
    if not own.exists():
        raise UserError(
            f"{path} is for a site that made its own keys, but {own} does not exist. Give the folder of "
            f"`fedsb site keygen {join.site}{PUBLIC_KEYS_SUFFIX}` with --folder. For a second federation, make new "
            "keys in a different folder."
        )
    keys = _read(Keys, own, "file of private keys")
    if public_identity(keys.identity) != join.directory.sites.get(join.site):
        raise UserError(
            f"{path} does not match the keys in {own}. Send {join.site}{PUBLIC_KEYS_SUFFIX} to the coordinator again."
        )
    return join.model_copy(update={"node_key": keys.node_key, "identity": keys.identity})


def _check_signed(join: JoinFile, directory: Directory, path: Path) -> None:
    if directory.federation != join.federation:
        raise UserError(f"{path} is of federation {directory.federation}, but this site is in {join.federation}.")
    if not signed(join.ca, directory.text, directory.signature):
        raise UserError(
            f"The directory of sites in {path} is not signed by the federation's authority. Do not use it. Inform the "
            "coordinator."
        )


def _read(kind: type[File], path: Path, what: str) -> File:
    whom = "the site" if kind is SitePublicKeys else "the coordinator"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"The {what} {path} does not exist. Ask {whom} for it.") from None
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read: {error}.") from error
    except ValueError:  # not UTF-8 or not JSON
        raise UserError(f"{path} is not a {what}, or it is damaged. Ask {whom} for a new copy.") from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise UserError(
            f"{path} is a {what} of version {version}, but this fedsb reads version {VERSION}. "
            "Install the version of fedsb that the coordinator uses."
        )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        faults = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        raise UserError(f"{path} is not a {what}, or it is damaged ({faults}). Ask {whom} for a new copy.") from None
