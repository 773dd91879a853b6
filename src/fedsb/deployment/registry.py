"""The site registry of a federation: federation.json in the coordinator's folder, with every site's public keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsb.utils.errors import UserError
from fedsb.utils.files import write_atomic

FEDERATION = "federation.json"
CA, CA_KEY, SERVER, SERVER_KEY = "ca.pem", "ca.key", "server.pem", "server.key"


class SiteEntry(BaseModel):
    """A site's public keys in the registry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node_key: str  # PEM
    identity: str  # Ed25519, hexadecimal
    revoked: bool = False


class Federation(BaseModel):
    """The content of federation.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    id: str
    hosts: Sequence[str]  # the first one is in the join files
    port: int
    serial: int  # counts the changes of the set of sites
    sites: Mapping[str, SiteEntry]

    @property
    def address(self) -> str:
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def all_addresses(self) -> str:
        """Returns the wildcard address that covers every host: of IPv6 if one of them is an IPv6 address."""
        return "::" if any(":" in host for host in self.hosts) else "0.0.0.0"

    @property
    def members(self) -> dict[str, SiteEntry]:
        """Returns the sites that are not revoked, sorted by name."""
        return {name: site for name, site in sorted(self.sites.items()) if not site.revoked}

    @property
    def node_keys(self) -> dict[str, bytes | None]:
        """Returns the node key of every site; None for a revoked one."""
        return {name: None if site.revoked else site.node_key.encode() for name, site in self.sites.items()}


class SiteRegistry:
    """Returns the current registry when called. Reads the file again after a change, so revocation is immediate."""

    def __init__(self, folder: Path) -> None:
        self._path, self._folder = folder / FEDERATION, folder
        self._stamp = (0, 0)
        self._federation = read_federation(folder)

    def __call__(self) -> Federation:
        stat = self._path.stat()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._stamp:
            self._federation, self._stamp = read_federation(self._folder), stamp
        return self._federation


def read_federation(folder: Path) -> Federation:
    """Reads federation.json. Raises UserError if it does not exist or cannot be read."""
    path = folder / FEDERATION
    try:
        return Federation.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} contains no federation. Create one with `fedsb federation create {folder}`."
        ) from None
    except (ValidationError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged, or was written by a different version of fedsb.") from None


def write_federation(folder: Path, federation: Federation) -> None:
    """Writes federation.json."""
    write_atomic(folder / FEDERATION, (federation.model_dump_json(indent=2) + "\n").encode())
