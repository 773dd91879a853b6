"""The coordinator's folder: who takes part in a federation, and the keys that say so.

federation.json    its id, its address, and every site's public keys
ca.pem, ca.key     the authority; ca.key is needed only to add, revoke and renew: keep it elsewhere in between
server.pem, .key   what the public door shows
joins/NAME.join    to hand to each site; in private, and then to delete, where it holds the keys: who has it is the site
directory.json     who has which identity, signed; for sites that joined before the last change

The register (federation.json) decides. `serve_init` and `add_site` write it after the files that it needs, and list
those files in unfinished.json while they work: a command that was killed can be repeated, and then finishes or undoes
what the killed one left.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsb.deployment import certificates
from fedsb.deployment.join_file import (
    CARD,
    Directory,
    JoinFile,
    Keys,
    SitePublicKeys,
    check_names,
    read_card,
    refuse_overwriting,
    write_join_file,
    write_secret,
)
from fedsb.utils.errors import UserError, did_you_mean
from fedsb.utils.files import remove_temporary, write_atomic

FEDERATION, DIRECTORY, UNFINISHED = "federation.json", "directory.json", "unfinished.json"
CA, CA_KEY, SERVER, SERVER_KEY = "ca.pem", "ca.key", "server.pem", "server.key"
PORT = 9443
_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


class SiteEntry(BaseModel):
    """What the coordinator knows of a site: public keys only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node_key: str  # PEM
    identity: str  # Ed25519, hexadecimal
    revoked: bool = False


class Federation(BaseModel):
    """The register of a federation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    id: str
    hosts: Sequence[str]  # the first is the one in join files
    port: int
    serial: int  # counts the changes of who takes part
    sites: Mapping[str, SiteEntry]

    @property
    def address(self) -> str:
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def all_addresses(self) -> str:
        """Returns what to listen on so that sites reach each of the hosts."""
        return "::" if any(":" in host for host in self.hosts) else "0.0.0.0"

    @property
    def members(self) -> dict[str, SiteEntry]:
        """Those that take part, by name, sorted."""
        return {name: site for name, site in sorted(self.sites.items()) if not site.revoked}


class Unfinished(BaseModel):
    """What a `serve_init` or `add_site` is about to make."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sites: Sequence[str]
    files: Sequence[str]  # new ones, by their paths in the folder


def serve_init(folder: Path, sites: Sequence[str], hosts: Sequence[str], port: int = PORT) -> list[Path]:
    """Makes a federation: its authority, the server's certificate for `hosts`, and a join file per site (returned).

    A site is a name, for which keys are made, or the path of its own `NAME.site`. Raises UserError where the folder
    holds a federation already, or for a name that no file can have.
    """
    if not hosts:
        raise UserError("no host: give the name or address under which sites reach this machine, with --host")
    _check_hosts(hosts)
    if not 1 <= port <= 65535:
        raise UserError(f"port {port}: a port is from 1 to 65535")
    newcomers = _newcomers(sites)
    finished = _recover(folder)
    if (folder / FEDERATION).exists():
        found = read_federation(folder)
        if (found.hosts, found.port) == (list(hosts), port) and _are_just_added(found, newcomers, finished):
            return [_join_path(folder, card) for card, _ in newcomers]
        raise UserError(f"{folder} holds a federation already: add sites to it, or take another folder")
    federation = Federation(id=secrets.token_hex(8), hosts=list(hosts), port=port, serial=0, sites={})
    paths = _new_join_paths(folder, federation, newcomers)
    _begin(folder, newcomers, [folder / CA_KEY, folder / CA, folder / SERVER_KEY, folder / SERVER, *paths])
    ca, ca_key = certificates.new_authority(federation.id)
    write_secret(folder / CA_KEY, ca_key)
    write_atomic(folder / CA, ca.encode())
    certificate, key = certificates.new_server(ca, ca_key, hosts)
    write_secret(folder / SERVER_KEY, key)
    write_atomic(folder / SERVER, certificate.encode())
    _register(folder, federation, newcomers, paths)
    return paths


def add_site(folder: Path, site: str) -> Path:
    """Makes the join file of one more site, a name or a `NAME.site`; a coordinator that is serving lets it in at once.

    The other sites take the new `directory.json` before they are in a secure sum with it.
    """
    newcomers = _newcomers([site])
    finished = _recover(folder)
    federation = read_federation(folder)
    if _are_just_added(federation, newcomers, finished):
        return _join_path(folder, newcomers[0][0])
    (path,) = paths = _new_join_paths(folder, federation, newcomers)
    _begin(folder, newcomers, paths)
    _register(folder, federation, newcomers, paths)
    return path


def revoke(folder: Path, site: str) -> bool:
    """Revokes a site for good; a coordinator that is serving refuses its next request.

    Returns whether the directory was signed again. That needs ca.key; without it, `directory.json` still lists the
    site until `sign_directory` is called. A revoked site can be revoked again.
    """
    federation = read_federation(folder)
    if site not in federation.sites:
        raise UserError(f"there is no site {site!r} in this federation; {did_you_mean(site, federation.members)}")
    _remove_temporary((), folder)
    if not federation.sites[site].revoked:
        sites = {**federation.sites, site: federation.sites[site].model_copy(update={"revoked": True})}
        _write(folder, federation.model_copy(update={"sites": sites, "serial": federation.serial + 1}))
    if not (folder / CA_KEY).exists():
        return False
    sign_directory(folder)
    return True


def sign_directory(folder: Path) -> Path:
    """Writes `directory.json`, who takes part now, for the sites to take. Raises UserError without ca.key."""
    directory = _directory(folder, read_federation(folder))
    write_atomic(folder / DIRECTORY, (directory.model_dump_json(indent=2) + "\n").encode())
    return folder / DIRECTORY


def renew(folder: Path, hosts: Sequence[str] = ()) -> None:
    """Makes a new certificate for the server, before the old one expires, or for other hosts. Join files stay good
    while the first host, which is in them, stays the same."""
    federation = read_federation(folder)
    ca, ca_key = (folder / CA).read_text(), _authority_key(folder)
    certificates.check_dates(ca, "the federation's authority", "make a new federation and hand out its join files")
    _check_hosts(hosts)
    hosts = list(dict.fromkeys((*federation.hosts, *hosts)))
    certificate, key = certificates.new_server(ca, ca_key, hosts)
    _remove_temporary((folder / SERVER_KEY, folder / SERVER), folder)
    write_atomic(folder / SERVER_KEY, key.encode(), private=True)
    write_atomic(folder / SERVER, certificate.encode())
    _write(folder, federation.model_copy(update={"hosts": hosts}))


def read_federation(folder: Path) -> Federation:
    """Raises UserError where there is none, or one of another version."""
    path = folder / FEDERATION
    try:
        return Federation.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no federation: make one first, `fedsb serve {folder} --init`") from None
    except (ValidationError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged, or of another version of fedsb") from None


class SiteRegistry:
    """The register as it is now: read again when the file has changed, so that a revoked site is out at once."""

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


def _new_join_paths(
    folder: Path, federation: Federation, newcomers: Sequence[tuple[SitePublicKeys, Keys]]
) -> list[Path]:
    """Returns the join files to make. Raises UserError for a site whose name or keys are taken."""
    sites, paths = dict(federation.sites), []
    for card, _ in newcomers:
        if (there := sites.get(card.site)) is not None:
            was = "was revoked, and its name is not given again" if there.revoked else "is there already"
            raise UserError(f"site {card.site!r} {was}: take another name")
        for name, other in sites.items():
            if card.node_key == other.node_key or card.identity == other.identity:
                raise UserError(f"site {card.site!r} comes with a key of the site {name!r}: each has keys of its own")
        sites[card.site] = SiteEntry(node_key=card.node_key, identity=card.identity)
        paths.append(_join_path(folder, card))
    return paths


def _begin(folder: Path, newcomers: Sequence[tuple[SitePublicKeys, Keys]], files: Sequence[Path]) -> None:
    """Writes down what is to be made. Raises UserError if any of it exists: that is not ours to overwrite."""
    if (folder / FEDERATION).exists():
        _authority_key(folder)
    for path in files:
        refuse_overwriting(path)
    unfinished = Unfinished(
        sites=[card.site for card, _ in newcomers], files=[str(path.relative_to(folder)) for path in files]
    )
    write_atomic(folder / UNFINISHED, unfinished.model_dump_json(indent=2).encode())


def _register(
    folder: Path, federation: Federation, newcomers: Sequence[tuple[SitePublicKeys, Keys]], paths: Sequence[Path]
) -> None:
    """Writes the join files, then the register, and last the directory, which follows from it."""
    entries = {card.site: SiteEntry(node_key=card.node_key, identity=card.identity) for card, _ in newcomers}
    federation = federation.model_copy(
        update={"sites": {**federation.sites, **entries}, "serial": federation.serial + 1}
    )
    directory = _directory(folder, federation)
    ca = (folder / CA).read_text()
    for (card, keys), path in zip(newcomers, paths, strict=True):
        join = JoinFile(
            federation=federation.id,
            site=card.site,
            address=federation.address,
            ca=ca,
            node_key=keys.node_key,
            identity=keys.identity,
            directory=directory,
        )
        write_join_file(join, path)
    _write(folder, federation)
    sign_directory(folder)
    (folder / UNFINISHED).unlink()


def _recover(folder: Path) -> Sequence[str] | None:
    """Finishes what a killed `serve_init` or `add_site` had registered, and undoes what it had not.

    Returns the sites whose registration was finished here; None if there was nothing to finish.
    """
    path = folder / UNFINISHED
    remove_temporary(path)
    try:
        unfinished = Unfinished.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged. Delete it, and the files that an interrupted command left.") from None
    files = [folder / name for name in unfinished.files]
    _remove_temporary(files, folder)
    registered = (folder / FEDERATION).exists() and read_federation(folder).sites.keys() >= set(unfinished.sites)
    if registered:
        sign_directory(folder)
    else:
        for file in files:
            file.unlink(missing_ok=True)
    path.unlink()
    return unfinished.sites if registered else None


def _remove_temporary(files: Iterable[Path], folder: Path) -> None:
    """Deletes what killed commands left of these files and of what every command writes."""
    for file in (*files, folder / FEDERATION, folder / DIRECTORY):
        remove_temporary(file)


def _are_just_added(
    federation: Federation, newcomers: Sequence[tuple[SitePublicKeys, Keys]], finished: Sequence[str] | None
) -> bool:
    """Returns whether a killed command had registered exactly these sites, so that nothing is left to do."""
    return finished == [card.site for card, _ in newcomers] and all(
        keys.node_key or federation.sites[card.site].node_key == card.node_key for card, keys in newcomers
    )


def _join_path(folder: Path, card: SitePublicKeys) -> Path:
    return folder / "joins" / f"{card.site}.join"


def _newcomers(sites: Sequence[str]) -> list[tuple[SitePublicKeys, Keys]]:
    """Raises UserError for a name that no site can have, or that is there twice."""
    newcomers = [_newcomer(site) for site in sites]
    check_names([card.site for card, _ in newcomers])
    return newcomers


def _newcomer(site: str) -> tuple[SitePublicKeys, Keys]:
    """(its public keys, its private ones), of a name, for which they are made; those of a card stay with its site."""
    if site.endswith(CARD):
        return read_card(Path(site)), Keys(node_key="", identity="")
    (node_private, node_public), (private, public) = certificates.new_node_key(), certificates.new_identity()
    return SitePublicKeys(site=site, node_key=node_public, identity=public), Keys(
        node_key=node_private, identity=private
    )


def _write(folder: Path, federation: Federation) -> None:
    write_atomic(folder / FEDERATION, (federation.model_dump_json(indent=2) + "\n").encode())


def _directory(folder: Path, federation: Federation) -> Directory:
    sites = {name: site.identity for name, site in federation.members.items()}
    directory = Directory(federation=federation.id, serial=federation.serial, sites=sites)
    return directory.model_copy(update={"signature": certificates.sign(_authority_key(folder), directory.text)})


def _check_hosts(hosts: Sequence[str]) -> None:
    """Raises UserError for what a certificate cannot name."""
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not _HOST.fullmatch(host):
                raise UserError(
                    f"host {host!r} is no name and no address: give it alone, as fedsb.example.org or 10.0.0.5, "
                    "and the port with --port"
                ) from None


def _authority_key(folder: Path) -> str:
    try:
        return (folder / CA_KEY).read_text()
    except FileNotFoundError:
        raise UserError(
            f"{folder / CA_KEY} is not there, and who takes part is signed with it: bring it back"
        ) from None
