"""The one file that a site needs to take part, made by the coordinator and handed over in private.

It holds two private keys: who has it is the site. The directory in it says which identity key each site has; when sites
come or go the coordinator hands out a newer one, signed by the federation's authority (`directory.json`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsb.deployment.certificates import check_dates, signed
from fedsb.disk import disk_errors, write_atomic
from fedsb.errors import UserError

VERSION = 1  # of both files
KEPT = "site.join"  # its name in a site's folder

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


class JoinFile(_Strict):
    """What a site knows of its federation."""

    version: Literal[1] = 1
    federation: str
    site: str
    address: str  # host:port
    ca: str  # certificate, PEM
    node_key: str  # private, PEM: proves to the coordinator who asks
    identity: str  # private Ed25519, hexadecimal: proves to other sites who is in a secure sum
    directory: Directory


def read_join_file(path: Path) -> JoinFile:
    """Raises UserError for one that is missing, of another version, damaged, or whose authority has expired."""
    join = _read(JoinFile, path, "join file")
    check_dates(join.ca, "the federation's authority in this join file", "ask the coordinator for a new federation")
    _check_signed(join, join.directory, path)
    return join


def write_join_file(join: JoinFile, path: Path) -> None:
    """For its owner's eyes (0600). Raises UserError where there is one already."""
    write_secret(path, join.model_dump_json(indent=2) + "\n")


def keep_join_file(path: Path, folder: Path) -> JoinFile:
    """Reads a join file and keeps a copy in the site's folder, which is then that site's in that federation alone.

    Raises UserError where the folder is already another's.
    """
    join, kept = read_join_file(path), folder / KEPT
    if not kept.exists():
        write_join_file(join, kept)
        return join
    old = read_join_file(kept)
    if old.federation != join.federation or old.site != join.site:
        raise UserError(
            f"{folder} belongs to site {old.site!r} of federation {old.federation}, and {path} is for site "
            f"{join.site!r} of federation {join.federation}: take another folder"
        )
    if join.directory.serial > old.directory.serial:
        _replace(kept, join)
        return join
    return old


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
    """A new file that only its owner can read. Raises UserError where there is one already."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise UserError(f"{path} is there already, and keys are never overwritten: move it away first") from None
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _replace(path: Path, join: JoinFile) -> None:
    old = os.umask(0o077)  # a moment in which others could read it would be one too many
    try:
        write_atomic(path, (join.model_dump_json(indent=2) + "\n").encode())
    finally:
        os.umask(old)


def _check_signed(join: JoinFile, directory: Directory, path: Path) -> None:
    if directory.federation != join.federation:
        raise UserError(f"{path} is of federation {directory.federation}, and this site is in {join.federation}")
    if not signed(join.ca, directory.text, directory.signature):
        raise UserError(f"the directory of sites in {path} is not signed by the federation's authority: do not use it")


def _read(kind: type[File], path: Path, what: str) -> File:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"there is no {what} {path}: ask the coordinator for it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the {what} {path} cannot be read: {error}") from error
    try:
        found = json.loads(text)
        version = found.get("version") if isinstance(found, dict) else None
    except json.JSONDecodeError:
        raise UserError(f"{path} is not a {what}, or it is damaged: ask the coordinator for it again") from None
    if version != VERSION:
        raise UserError(
            f"{path} is a {what} of version {version}, and this fedsb reads version {VERSION}: "
            "use the fedsb that the coordinator uses"
        )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        faults = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        raise UserError(f"{path} is not a {what}, or it is damaged ({faults}): ask for it again") from None
