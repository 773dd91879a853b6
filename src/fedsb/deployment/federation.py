"""Creates a federation in the coordinator's folder; adds and revokes sites; renews the server's certificate.

federation.json    the site registry: the federation's id, its address, and every site's public keys
ca.pem, ca.key     the certificate authority; ca.key is needed only to add, revoke and renew, so keep it elsewhere
server.pem, .key   the server's TLS certificate
joins/NAME.join    send one to each site; if it contains the site's private keys, send it privately and then delete it
directory.json     every site's identity key, signed; for sites that joined before the last change

`create_federation` and `add_site` write federation.json after the files that it needs, and list these files in
unfinished.json while they work. A command that was killed can be repeated: it then completes or undoes the first one.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsb.deployment import certificates
from fedsb.deployment.join_file import (
    PUBLIC_KEYS_SUFFIX,
    Directory,
    JoinFile,
    Keys,
    SitePublicKeys,
    check_names,
    read_public_keys,
    refuse_overwriting,
    write_secret,
)
from fedsb.deployment.registry import (
    CA,
    CA_KEY,
    FEDERATION,
    SERVER,
    SERVER_KEY,
    Federation,
    SiteEntry,
    read_federation,
    write_federation,
)
from fedsb.utils.errors import UserError, did_you_mean
from fedsb.utils.files import remove_temporary, write_atomic

DIRECTORY, UNFINISHED = "directory.json", "unfinished.json"
PORT = 9443
_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


class Unfinished(BaseModel):
    """The content of unfinished.json: what a `create_federation` or `add_site` is about to write."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sites: Sequence[str]
    files: Sequence[str]  # new files, relative to the folder


@dataclass(frozen=True, kw_only=True)
class NewSite:
    """A site to register. `private` is empty for a site that made its own keys."""

    public: SitePublicKeys
    private: Keys

    @property
    def name(self) -> str:
        return self.public.site

    @property
    def entry(self) -> SiteEntry:
        return SiteEntry(node_key=self.public.node_key, identity=self.public.identity)

    def join_path(self, folder: Path) -> Path:
        return folder / "joins" / f"{self.name}.join"


def create_federation(folder: Path, sites: Sequence[str], hosts: Sequence[str], port: int = PORT) -> list[Path]:
    """Creates a federation and returns the join file of each site.

    Writes the certificate authority and the server's certificate for `hosts`. A site is either a name, for which keys
    are made, or the path of its `NAME.site`. Raises UserError if the folder already contains a federation, and for a
    name that is not a valid file name.
    """
    if not hosts:
        raise UserError("No host is given. Give the name or address at which sites reach this machine, with --host.")
    _check_hosts(hosts)
    if not 1 <= port <= 65535:
        raise UserError(f"Port {port} is not valid. A port is from 1 to 65535.")
    new_sites = _new_sites(sites)
    finished = _recover(folder)
    if (folder / FEDERATION).exists():
        found = read_federation(folder)
        if (found.hosts, found.port) == (list(hosts), port) and _are_just_added(found, new_sites, finished):
            return [site.join_path(folder) for site in new_sites]
        raise UserError(
            f"{folder} already contains a federation. Add sites to it with `fedsb federation add`, or choose a "
            "different folder."
        )
    federation = Federation(id=secrets.token_hex(8), hosts=list(hosts), port=port, serial=0, sites={})
    paths = _new_join_paths(folder, federation, new_sites)
    _begin(folder, new_sites, [folder / CA_KEY, folder / CA, folder / SERVER_KEY, folder / SERVER, *paths])
    ca, ca_key = certificates.new_authority(federation.id)
    write_secret(folder / CA_KEY, ca_key)
    write_atomic(folder / CA, ca.encode())
    certificate, key = certificates.new_server(ca, ca_key, hosts)
    write_secret(folder / SERVER_KEY, key)
    write_atomic(folder / SERVER, certificate.encode())
    _register(folder, federation, new_sites, paths)
    return paths


def add_site(folder: Path, site: str) -> Path:
    """Adds a site, given by its name or its `NAME.site`, and returns its join file.

    A running coordinator accepts it at once. The other sites need the new `directory.json` before they take part in
    secure aggregation with it.
    """
    new_sites = _new_sites([site])
    finished = _recover(folder)
    federation = read_federation(folder)
    if _are_just_added(federation, new_sites, finished):
        return new_sites[0].join_path(folder)
    (path,) = paths = _new_join_paths(folder, federation, new_sites)
    _begin(folder, new_sites, paths)
    _register(folder, federation, new_sites, paths)
    return path


def revoke(folder: Path, site: str) -> bool:
    """Revokes a site permanently. A running coordinator refuses its next request.

    Returns whether the directory was signed again. That needs ca.key; without it, `directory.json` still lists the
    site until `sign_directory` is called. The call can be repeated.
    """
    federation = read_federation(folder)
    if site not in federation.sites:
        raise UserError(f"This federation has no site {site!r}; {did_you_mean(site, federation.members)}")
    _remove_temporary((), folder)
    if not federation.sites[site].revoked:
        sites = {**federation.sites, site: federation.sites[site].model_copy(update={"revoked": True})}
        write_federation(folder, federation.model_copy(update={"sites": sites, "serial": federation.serial + 1}))
    if not (folder / CA_KEY).exists():
        return False
    sign_directory(folder)
    return True


def sign_directory(folder: Path) -> Path:
    """Writes `directory.json`, the signed list of sites, and returns its path. Raises UserError without ca.key."""
    directory = _directory(folder, read_federation(folder))
    write_atomic(folder / DIRECTORY, (directory.model_dump_json(indent=2) + "\n").encode())
    return folder / DIRECTORY


def renew(folder: Path, hosts: Sequence[str] = ()) -> None:
    """Writes a new server certificate, before the old one expires or for additional hosts.

    Join files stay valid, because they contain the first host, which does not change.
    """
    federation = read_federation(folder)
    ca, ca_key = (folder / CA).read_text(), _authority_key(folder)
    remedy = "Create a new federation and send its join files to the sites."
    certificates.check_dates(ca, "The certificate of the federation's authority", remedy)
    _check_hosts(hosts)
    hosts = list(dict.fromkeys((*federation.hosts, *hosts)))
    certificate, key = certificates.new_server(ca, ca_key, hosts)
    _remove_temporary((folder / SERVER_KEY, folder / SERVER), folder)
    write_atomic(folder / SERVER_KEY, key.encode(), private=True)
    write_atomic(folder / SERVER, certificate.encode())
    write_federation(folder, federation.model_copy(update={"hosts": hosts}))


def _new_join_paths(folder: Path, federation: Federation, new_sites: Sequence[NewSite]) -> list[Path]:
    """Returns the join files to write. Raises UserError for a site whose name or keys are in use."""
    sites = dict(federation.sites)
    for site in new_sites:
        if (known := sites.get(site.name)) is not None:
            state = "was revoked, and its name cannot be reused" if known.revoked else "already exists"
            raise UserError(f"Site {site.name!r} {state}. Choose a different name.")
        for name, other in sites.items():
            if site.public.node_key == other.node_key or site.public.identity == other.identity:
                raise UserError(f"Site {site.name!r} has a key of site {name!r}. Every site needs its own keys.")
        sites[site.name] = site.entry
    return [site.join_path(folder) for site in new_sites]


def _begin(folder: Path, new_sites: Sequence[NewSite], files: Sequence[Path]) -> None:
    """Writes unfinished.json. Raises UserError if one of the files exists, since it is not ours to overwrite."""
    if (folder / FEDERATION).exists():
        _authority_key(folder)
    for path in files:
        refuse_overwriting(path)
    unfinished = Unfinished(
        sites=[site.name for site in new_sites], files=[str(path.relative_to(folder)) for path in files]
    )
    write_atomic(folder / UNFINISHED, unfinished.model_dump_json(indent=2).encode())


def _register(folder: Path, federation: Federation, new_sites: Sequence[NewSite], paths: Sequence[Path]) -> None:
    """Writes the join files, then the registry, and last the directory, which follows from the registry."""
    sites = {**federation.sites, **{site.name: site.entry for site in new_sites}}
    federation = federation.model_copy(update={"sites": sites, "serial": federation.serial + 1})
    directory = _directory(folder, federation)
    ca = (folder / CA).read_text()
    for site, path in zip(new_sites, paths, strict=True):
        join = JoinFile(
            federation=federation.id,
            site=site.name,
            address=federation.address,
            ca=ca,
            node_key=site.private.node_key,
            identity=site.private.identity,
            directory=directory,
        )
        write_secret(path, join.text)
    write_federation(folder, federation)
    sign_directory(folder)
    (folder / UNFINISHED).unlink()


def _recover(folder: Path) -> Sequence[str] | None:
    """Completes a killed `create_federation` or `add_site` if it had registered its sites, else undoes it.

    Returns the sites whose registration was completed here; None if there was nothing to complete.
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
    """Deletes the temporary files that killed commands left of these files and of those that every command writes."""
    for file in (*files, folder / FEDERATION, folder / DIRECTORY):
        remove_temporary(file)


def _are_just_added(federation: Federation, new_sites: Sequence[NewSite], finished: Sequence[str] | None) -> bool:
    """Returns whether a killed command had registered exactly these sites, so that nothing is left to do."""
    return finished == [site.name for site in new_sites] and all(
        site.private.node_key or federation.sites[site.name].node_key == site.public.node_key for site in new_sites
    )


def _new_sites(sites: Sequence[str]) -> list[NewSite]:
    """Returns the sites with their keys. Raises UserError for an invalid name and for a duplicate."""
    new_sites = [_new_site(site) for site in sites]
    check_names([site.name for site in new_sites])
    return new_sites


def _new_site(site: str) -> NewSite:
    """Reads a site's public keys from its `NAME.site`, or makes keys for a name."""
    if site.endswith(PUBLIC_KEYS_SUFFIX):
        return NewSite(public=read_public_keys(Path(site)), private=Keys(node_key="", identity=""))
    (node_private, node_public), (private, public) = certificates.new_node_key(), certificates.new_identity()
    return NewSite(
        public=SitePublicKeys(site=site, node_key=node_public, identity=public),
        private=Keys(node_key=node_private, identity=private),
    )


def _directory(folder: Path, federation: Federation) -> Directory:
    sites = {name: site.identity for name, site in federation.members.items()}
    directory = Directory(federation=federation.id, serial=federation.serial, sites=sites)
    return directory.model_copy(update={"signature": certificates.sign(_authority_key(folder), directory.text)})


def _check_hosts(hosts: Sequence[str]) -> None:
    """Raises UserError for a host that a certificate cannot name."""
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not _HOST.fullmatch(host):
                raise UserError(
                    f"Host {host!r} is not a valid name or address. Give it without a port, such as fedsb.example.org "
                    "or 10.0.0.5, and the port with --port."
                ) from None


def _authority_key(folder: Path) -> str:
    try:
        return (folder / CA_KEY).read_text()
    except FileNotFoundError:
        raise UserError(
            f"{folder / CA_KEY} does not exist. It signs the list of sites. Copy it back, and repeat the command."
        ) from None
