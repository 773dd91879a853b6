"""What a site needs to take part: the coordinator's join file, and keys of its own.

A site makes its keys itself (`fedsb join NAME.site --new`): the private ones stay in its folder, and NAME.site, which
the coordinator gets, has the public ones. Or the coordinator makes them: the join file then holds the private keys, and
who has it is the site. The directory says which identity key each site has; when sites come or go the coordinator hands
out a newer one, signed by the federation's authority (`directory.json`).
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
KEPT = "site.join"  # its name in a site's folder, there with the keys
KEYS = "site.keys"  # in a site's folder: those that it made
CARD = ".site"  # how the file ends that a coordinator gets of such a site

File = TypeVar("File", bound="_Strict")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Directory(_Strict):
    """Who takes part: site name -> Ed25519 public key, 32 bytes in hexadecimal. The highest serial is the newest."""

    version: Literal[1] = 1
    federation: str
    serial: int
    sites: Mapping[str, str]
    signature: str = ""  # of all above, by the authority

    @property
    def text(self) -> bytes:
        """What is signed."""
        return json.dumps(self.model_dump(exclude={"signature"}), sort_keys=True).encode()


class SitePublicKeys(_Strict):
    """What a coordinator is told of a site that made its own keys: the public ones."""

    version: Literal[1] = 1
    site: str
    node_key: str  # PEM
    identity: str  # Ed25519, hexadecimal


class Keys(_Strict):
    """A site's private keys."""

    version: Literal[1] = 1
    node_key: str  # PEM: proves to the coordinator who asks
    identity: str  # Ed25519, hexadecimal: proves to other sites who is in a secure sum


class JoinFile(_Strict):
    """What a site knows of its federation."""

    version: Literal[1] = 1
    federation: str
    site: str
    address: str  # host:port
    ca: str  # certificate, PEM
    node_key: str  # as in Keys; both are empty in the file of a site that made its own
    identity: str
    directory: Directory


def read_join_file(path: Path) -> JoinFile:
    """Raises UserError for one that is missing, of another version, damaged, or whose authority has expired."""
    join = _read(JoinFile, path, "join file")
    try:
        check_authority(join.ca)
        if join.node_key:
            check_private(join.node_key, join.identity)
    except ValueError as error:
        raise UserError(f"{path} is damaged, it holds a key that is none: ask the coordinator for it again") from error
    if not (port := join.address.rpartition(":")[2]).isdecimal() or join.address == port:
        raise UserError(f"{path} has the address {join.address!r}, which is no host:port: ask the coordinator")
    check_dates(join.ca, "the federation's authority in this join file", "ask the coordinator for a new federation")
    _check_signed(join, join.directory, path)
    return join


def make_keys(path: Path, folder: Path) -> SitePublicKeys:
    """Makes a site's keys in its folder, and the file for the coordinator.

    Raises UserError where there are keys already, or for a name that no site can have.
    """
    name = path.name.removesuffix(CARD)
    if path.name != name + CARD:
        raise UserError(f"{path}: the file for the coordinator is named NAME{CARD}, after the site")
    check_names([name])
    refuse_overwriting(folder / KEYS)
    (node_private, node_public), (private, public) = new_node_key(), new_identity()
    card = SitePublicKeys(site=name, node_key=node_public, identity=public)
    # The keys are written last. If the process is killed before, the same command makes both files again.
    write_atomic(path, (card.model_dump_json(indent=2) + "\n").encode())
    remove_temporary(folder / KEYS)
    write_secret(folder / KEYS, Keys(node_key=node_private, identity=private).model_dump_json(indent=2) + "\n")
    return card


def read_card(path: Path) -> SitePublicKeys:
    """Raises UserError for one that is missing, damaged, or whose keys are none."""
    card = _read(SitePublicKeys, path, "site's file")
    try:
        check_public(card.node_key, card.identity)
    except ValueError as error:
        raise UserError(f"{path} holds a key that is none ({error}): ask the site for it again") from None
    return card


def check_names(sites: Sequence[str]) -> None:
    """Raises UserError for a name that no file can have, and for one that is there twice."""
    for name in sites:
        if safe_name(name) != name:
            raise UserError(
                f"site {name!r}: a name is of letters, digits, spaces, '.', '_' and '-', at most 50 of them"
            )
    twice = sorted({name for name in sites if list(sites).count(name) > 1})
    if twice:
        raise UserError(f"sites named twice: {', '.join(twice)}")


def write_join_file(join: JoinFile, path: Path) -> None:
    """For its owner's eyes (0600). Raises UserError where there is one already."""
    write_secret(path, join.model_dump_json(indent=2) + "\n")


def keep_join_file(path: Path, folder: Path) -> JoinFile:
    """Reads a join file and keeps a copy in the site's folder, which is then that site's in that federation alone.

    Of two the newer directory counts, and the address of the one that is given.

    Raises UserError where the folder is already another's, and where the site's own keys are not those it joins with.
    """
    if path.name.endswith(CARD):
        raise UserError(f"{path} is for the coordinator, which makes the join file with it: join with that")
    join, kept = _with_keys(read_join_file(path), path, folder), folder / KEPT
    if not kept.exists():
        write_join_file(join, kept)
        return join
    old = read_join_file(kept)
    if old.federation != join.federation or old.site != join.site:
        raise UserError(
            f"{folder} belongs to site {old.site!r} of federation {old.federation}, and {path} is for site "
            f"{join.site!r} of federation {join.federation}: take another folder, with --folder"
        )
    newer = join.directory.serial > old.directory.serial
    new = join if newer else old.model_copy(update={"address": join.address})  # which may have been wrong before
    if new != old:
        _replace(kept, new)
    return new


def update_directory(folder: Path, directory_file: Path) -> Directory:
    """Takes a newer directory into a site's folder. Raises UserError for an older one, or one of elsewhere."""
    join = read_join_file(folder / KEPT)
    new = _read(Directory, directory_file, "directory")
    _check_signed(join, new, directory_file)
    if new.serial < join.directory.serial:
        raise UserError(f"{directory_file} is older (serial {new.serial}) than the one here ({join.directory.serial})")
    _replace(folder / KEPT, join.model_copy(update={"directory": new}))
    return new


def write_secret(path: Path, text: str) -> None:
    """Writes a new file that only its owner can read. Raises UserError if the file exists."""
    refuse_overwriting(path)
    write_atomic(path, text.encode(), private=True)


def refuse_overwriting(path: Path) -> None:
    """Raises UserError if a file of keys exists."""
    if path.exists():
        raise UserError(f"{path} exists. Keys are never overwritten: move it away first.")


def _with_keys(join: JoinFile, path: Path, folder: Path) -> JoinFile:
    """The join file with the private keys, its own or the folder's."""
    own = folder / KEYS
    if join.node_key:
        if own.exists():
            raise UserError(
                f"{path} holds keys that the coordinator made, and this site has made its own ({own}): who has that "
                f"file could speak for it. Have the coordinator add {join.site}{CARD}, or take another folder"
            )
        return join
    if not own.exists():
        raise UserError(
            f"{path} is for a site that made its own keys, and there is no {own}: take the folder in which "
            f"`fedsb join {join.site}{CARD} --new` was called, with --folder. Keys are of one federation: for a "
            "second one make others, in another folder"
        )
    keys = _read(Keys, own, "file of keys")
    if public_identity(keys.identity) != join.directory.sites.get(join.site):
        raise UserError(
            f"{path} was made for other keys than those in {own}: give the coordinator {join.site}{CARD} again"
        )
    return join.model_copy(update={"node_key": keys.node_key, "identity": keys.identity})


def _replace(path: Path, join: JoinFile) -> None:
    write_atomic(path, (join.model_dump_json(indent=2) + "\n").encode(), private=True)


def _check_signed(join: JoinFile, directory: Directory, path: Path) -> None:
    if directory.federation != join.federation:
        raise UserError(f"{path} is of federation {directory.federation}, and this site is in {join.federation}")
    if not signed(join.ca, directory.text, directory.signature):
        raise UserError(f"the directory of sites in {path} is not signed by the federation's authority: do not use it")


def _read(kind: type[File], path: Path, what: str) -> File:
    whom = "the site" if kind is SitePublicKeys else "the coordinator"
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"there is no {what} {path}: ask {whom} for it") from None
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be read: {error}") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a {what}, or it is damaged: ask {whom} for it again") from None
    try:
        found = json.loads(text)
        version = found.get("version") if isinstance(found, dict) else None
    except json.JSONDecodeError:
        raise UserError(f"{path} is not a {what}, or it is damaged: ask {whom} for it again") from None
    if version != VERSION:
        raise UserError(
            f"{path} is a {what} of version {version}, and this fedsb reads version {VERSION}: "
            "use the fedsb that the coordinator uses"
        )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        faults = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        raise UserError(f"{path} is not a {what}, or it is damaged ({faults}): ask {whom} for it again") from None
