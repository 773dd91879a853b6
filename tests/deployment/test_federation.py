"""Making a federation, its certificates and join files; adding and revoking sites."""

from __future__ import annotations

import datetime
import json
import os
import ssl
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.deployment import certificates
from fedsb.deployment.federation import add_site, create_federation, renew, revoke, sign_directory
from fedsb.deployment.join_file import make_keys, read_join_file, store_join_file, update_directory
from fedsb.deployment.registry import SiteRegistry, read_federation
from fedsb.utils.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_federation(tmp_path / "co", ["north", "south"], ["fed.example.org", "10.0.0.5"], 9443)
    return tmp_path / "co"


def test_what_init_makes(folder: Path) -> None:
    federation, join = read_federation(folder), read_join_file(folder / "joins" / "north.join")
    assert list(federation.members) == ["north", "south"]
    assert (join.site, join.address, join.federation) == ("north", "fed.example.org:9443", federation.id)
    identity = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(join.identity)).public_key().public_bytes_raw().hex()
    assert join.directory.sites == {name: site.identity for name, site in federation.members.items()}
    assert join.directory.sites["north"] == identity
    for secret in ("ca.key", "server.key", "joins/north.join", "joins/south.join"):
        assert stat.S_IMODE((folder / secret).stat().st_mode) == 0o600, secret
    public = (folder / "federation.json").read_text()
    assert "PRIVATE" not in public and join.identity not in public


def test_the_server_certificate_is_for_its_hosts_and_localhost(folder: Path) -> None:
    certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5", "127.0.0.1", "::1"]
    assert isinstance(certificates.tls_client((folder / "ca.pem").read_text()), ssl.SSLContext)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A federation with a site that made its own keys, north, and one that did not, south."""
    make_keys(tmp_path / "north.site", tmp_path / "site")
    create_federation(tmp_path / "own", [str(tmp_path / "north.site"), "south"], ["localhost"])
    return tmp_path / "own"


def test_a_site_that_makes_its_own_keys_alone_has_them(own: Path, tmp_path: Path) -> None:
    keys = json.loads((tmp_path / "site" / "site.keys").read_text())
    assert stat.S_IMODE((tmp_path / "site" / "site.keys").stat().st_mode) == 0o600
    for path in [tmp_path / "north.site", *(path for path in own.rglob("*") if path.is_file())]:
        assert not any(secret in path.read_text() for secret in (keys["node_key"], keys["identity"])), path
    join = store_join_file(own / "joins" / "north.join", tmp_path / "site")
    assert (
        join
        == read_join_file(tmp_path / "site" / "site.join")
        == store_join_file(own / "joins" / "north.join", tmp_path / "site")
    )
    assert certificates.public_identity(join.identity) == join.directory.sites["north"]
    assert (join.node_key, join.identity) == (keys["node_key"], keys["identity"])


def test_keys_that_are_not_the_sites(own: Path, tmp_path: Path) -> None:
    join, other = own / "joins" / "north.join", tmp_path / "other"
    with pytest.raises(UserError, match="is for the coordinator"):
        store_join_file(tmp_path / "north.site", tmp_path / "site")
    with pytest.raises(UserError, match=r"site.keys does not exist. Give the folder of"):
        store_join_file(join, other)
    make_keys(tmp_path / "else" / "north.site", other)
    with pytest.raises(UserError, match="does not match the keys"):
        store_join_file(join, other)
    with pytest.raises(UserError, match="keys that the coordinator made, but this site has made its own"):
        store_join_file(own / "joins" / "south.join", other)
    with pytest.raises(UserError, match="Keys are never overwritten"):
        make_keys(tmp_path / "north.site", tmp_path / "site")
    assert not (other / "site.join").exists()


def test_sites_files_that_are_not_good(own: Path, tmp_path: Path) -> None:
    card, before = json.loads((tmp_path / "north.site").read_text()), read_federation(own)
    for change, match in [
        ({"node_key": "none"}, "an invalid key"),
        ({"identity": "00"}, "an invalid key"),
        ({"extra": 1}, "damaged .extra."),
        ({}, "Site 'north' already exists"),
        ({"site": "east"}, "'east' has a key of site 'north'"),
        ({"site": "../east"}, "not a valid site name"),
    ]:
        (tmp_path / "bad.site").write_text(json.dumps({**card, **change}))
        with pytest.raises(UserError, match=match):
            add_site(own, str(tmp_path / "bad.site"))
    with pytest.raises(UserError, match=r"none\.site does not exist. Ask the site for it"):
        create_federation(tmp_path / "new", ["none.site"], ["localhost"])
    with pytest.raises(UserError, match="Write NAME"):
        make_keys(tmp_path / "north.join", tmp_path / "new")
    assert read_federation(own) == before and not (tmp_path / "new").exists()


def test_nothing_is_overwritten(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already contains a federation"):
        create_federation(folder, ["east"], ["localhost"])
    with pytest.raises(UserError, match="already exists"):
        add_site(folder, "north")
    (folder / "joins" / "east.join").write_text("of somebody else")
    with pytest.raises(UserError, match="never overwritten"):
        add_site(folder, "east")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("sites", "match"),
    [(["a/b"], "not a valid site name"), ([""], "not a valid site name"), (["a", "a"], "Duplicate site names: a")],
)
def test_names_that_no_site_can_have(tmp_path: Path, sites: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        create_federation(tmp_path / "co", sites, ["localhost"])


def test_adding_and_revoking(folder: Path, tmp_path: Path) -> None:
    site, register = tmp_path / "site", SiteRegistry(folder)
    store_join_file(folder / "joins" / "north.join", site)
    join = read_join_file(add_site(folder, "east"))
    assert sorted(join.directory.sites) == ["east", "north", "south"]
    assert list(register().members) == ["east", "north", "south"]
    assert sorted(update_directory(site, folder / "directory.json").sites) == ["east", "north", "south"]
    revoke(folder, "south")
    assert list(register().members) == ["east", "north"]
    update_directory(site, folder / "directory.json")
    assert sorted(read_join_file(site / "site.join").directory.sites) == ["east", "north"]
    assert stat.S_IMODE((site / "site.join").stat().st_mode) == 0o600
    with pytest.raises(UserError, match="did you mean 'north'"):
        revoke(folder, "nort")
    with pytest.raises(UserError, match="cannot be reused"):
        add_site(folder, "south")


def test_a_directory_that_was_tampered_with(folder: Path, tmp_path: Path) -> None:
    store_join_file(folder / "joins" / "north.join", tmp_path / "site")
    directory = json.loads((folder / "directory.json").read_text())
    directory["sites"]["south"] = directory["sites"]["north"]
    (tmp_path / "directory.json").write_text(json.dumps(directory))
    with pytest.raises(UserError, match="not signed by the federation's authority"):
        update_directory(tmp_path / "site", tmp_path / "directory.json")


def test_without_the_authority_key_nobody_is_added(folder: Path) -> None:
    (folder / "ca.key").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="Copy it back"):
        add_site(folder, "east")
    revoke(folder, "south")  # that cannot wait
    assert list(read_federation(folder).members) == ["north"]
    assert "south" in (folder / "directory.json").read_text()
    (folder / "elsewhere").rename(folder / "ca.key")
    assert "south" not in sign_directory(folder).read_text()


def test_revoking_says_whether_the_directory_was_signed_and_can_be_repeated(folder: Path) -> None:
    (folder / "ca.key").rename(folder / "elsewhere")
    assert revoke(folder, "south") is False
    (folder / "elsewhere").rename(folder / "ca.key")
    assert revoke(folder, "south") is True
    assert read_federation(folder).serial == 2  # one of the start, one of the revocation
    assert "south" not in (folder / "directory.json").read_text()


WRITES = ("os.rename", "os.remove", "os.mkdir", "open")
KILLED = 99


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a process that ends, as by kill -9, before its `step`-th change of the disk.

    Returns whether it was killed; not where there are fewer changes.
    """
    if (pid := os.fork()) == 0:
        left = [step]

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            writes = event in WRITES and not (event == "open" and not int(str(arguments[2])) & os.O_CREAT)
            left[0] -= writes
            if writes and left[0] < 0:
                os._exit(KILLED)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def assert_whole(folder: Path, sites: list[str]) -> None:
    """The register, the join files, the signed directory and the server's certificate belong together."""
    federation = read_federation(folder)
    assert list(federation.members) == sites
    directory = json.loads((folder / "directory.json").read_text())
    assert (directory["serial"], sorted(directory["sites"])) == (federation.serial, sites)
    for name in sites:
        join = read_join_file(folder / "joins" / f"{name}.join")
        assert join.federation == federation.id
        if join.identity:
            assert certificates.public_identity(join.identity) == federation.sites[name].identity
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.pem", folder / "server.key")
    left = {path.name for path in folder.rglob("*") if path.is_file()} - {f"{name}.join" for name in sites}
    made = {"ca.key", "ca.pem", "directory.json", "federation.json", "server.key", "server.pem"}
    assert left == made, "an interrupted command left files, which may hold keys"


def test_making_a_federation_can_be_repeated_wherever_it_was_killed(tmp_path: Path) -> None:
    step = 0
    while True:
        folder = tmp_path / str(step)
        make_keys(folder / "north.site", folder / "north")

        def make(folder: Path = folder) -> list[Path]:
            return create_federation(folder / "co", [str(folder / "north.site"), "south"], ["localhost"])

        killed = killed_at(step, make)
        if not killed:
            break
        assert [path.name for path in make()] == ["north.join", "south.join"]
        assert_whole(folder / "co", ["north", "south"])
        store_join_file(folder / "co" / "joins" / "north.join", folder / "north")
        step += 1
    assert step > 15
    with pytest.raises(UserError, match="already contains a federation"):
        make()


def test_adding_a_site_can_be_repeated_wherever_it_was_killed(tmp_path: Path) -> None:
    for other in ("east", "west"):  # the same command again, or another one
        step = 0
        while True:
            folder = tmp_path / f"{other}-{step}"
            create_federation(folder, ["north"], ["localhost"])
            if not killed_at(step, lambda folder=folder: add_site(folder, "east")):  # type: ignore[misc]
                break
            assert add_site(folder, other) == folder / "joins" / f"{other}.join"
            done = {"north", other} | ({"east"} & read_federation(folder).sites.keys())
            assert_whole(folder, sorted(done))
            step += 1
        assert step > 5


def test_a_site_can_make_its_keys_again_wherever_that_was_killed(tmp_path: Path) -> None:
    step = 0
    while True:
        card, here = tmp_path / f"{step}.site", tmp_path / str(step)
        if not killed_at(step, lambda card=card, here=here: make_keys(card, here)):  # type: ignore[misc]
            break
        if not (here / "site.keys").exists():
            make_keys(card, here)
        keys = json.loads((here / "site.keys").read_text())
        assert certificates.public_identity(keys["identity"]) == json.loads(card.read_text())["identity"]
        assert [path.name for path in here.iterdir()] == ["site.keys"]
        step += 1
    assert step > 3


def test_renewing_can_be_repeated_wherever_it_was_killed(tmp_path: Path) -> None:
    step = 0
    while True:
        folder = tmp_path / str(step)
        create_federation(folder, ["north"], ["localhost"])
        if not killed_at(step, lambda folder=folder: renew(folder, ["10.0.0.5"])):  # type: ignore[misc]
            break
        renew(folder, ["10.0.0.5"])
        assert_whole(folder, ["north"])
        step += 1
    assert step > 3


def test_keys_that_no_interrupted_command_left_are_not_deleted(tmp_path: Path) -> None:
    create_federation(tmp_path / "co", ["north"], ["localhost"])
    (tmp_path / "co" / "federation.json").unlink()  # lost, and to be restored from a backup
    before = {path: path.read_bytes() for path in (tmp_path / "co").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"ca.key exists. Keys are never overwritten"):
        create_federation(tmp_path / "co", ["north"], ["localhost"])
    assert {path: path.read_bytes() for path in (tmp_path / "co").rglob("*") if path.is_file()} == before


def test_renewing_keeps_join_files_good(folder: Path) -> None:
    old = (folder / "server.pem").read_bytes()
    renew(folder, ["other.example.org"])
    assert (folder / "server.pem").read_bytes() != old
    assert read_federation(folder).hosts == ["fed.example.org", "10.0.0.5", "other.example.org"]
    join = read_join_file(folder / "joins" / "north.join")
    authority = x509.load_pem_x509_certificate(join.ca.encode())
    x509.load_pem_x509_certificate((folder / "server.pem").read_bytes()).verify_directly_issued_by(authority)


def test_join_files_that_are_not_good(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bad = folder / "joins" / "north.join", tmp_path / "bad.join"
    found = json.loads(path.read_text())
    for content, match in [
        ("", "damaged"),
        (json.dumps({**found, "version": 2}), "of version 2, but this fedsb reads version 1"),
        (json.dumps({key: value for key, value in found.items() if key != "node_key"}), "damaged .node_key."),
        (json.dumps({**found, "federation": "other"}), "this site is in other"),
    ]:
        bad.write_text(content)
        with pytest.raises(UserError, match=match):
            read_join_file(bad)
    with pytest.raises(UserError, match="Ask the coordinator for it"):
        read_join_file(tmp_path / "none.join")
    monkeypatch.setattr(certificates, "CA_DAYS", 0)
    monkeypatch.setattr(certificates, "SERVER_DAYS", 0)
    create_federation(tmp_path / "old", ["north"], ["localhost"])
    with pytest.raises(UserError, match=f"expired on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}"):
        read_join_file(tmp_path / "old" / "joins" / "north.join")


def test_a_folder_is_of_one_site_of_one_federation(folder: Path, tmp_path: Path) -> None:
    store_join_file(folder / "joins" / "north.join", tmp_path / "site")
    store_join_file(folder / "joins" / "north.join", tmp_path / "site")
    with pytest.raises(UserError, match="Choose a different folder"):
        store_join_file(folder / "joins" / "south.join", tmp_path / "site")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ca": "none"}, "an invalid key"),
        ({"node_key": "none"}, "an invalid key"),
        ({"identity": "00"}, "an invalid key"),
        ({"address": "localhost"}, "not HOST:PORT"),
        ({"address": "localhost:none"}, "not HOST:PORT"),
    ],
)
def test_a_join_file_that_is_damaged_inside(folder: Path, tmp_path: Path, change: dict[str, str], match: str) -> None:
    join = json.loads((folder / "joins" / "north.join").read_text())
    (tmp_path / "bad.join").write_text(json.dumps({**join, **change}))
    with pytest.raises(UserError, match=match):
        store_join_file(tmp_path / "bad.join", tmp_path / "site")
    (tmp_path / "bytes.join").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a join file, or it is damaged"):
        store_join_file(tmp_path / "bytes.join", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_site_takes_the_address_of_the_join_file_that_it_is_given(folder: Path, tmp_path: Path) -> None:
    path, site = folder / "joins" / "north.join", tmp_path / "site"
    store_join_file(path, site)
    add_site(folder, "east")
    update_directory(site, folder / "directory.json")
    join = json.loads(path.read_text())
    path.write_text(json.dumps({**join, "address": "elsewhere:9443"}))
    kept = store_join_file(path, site)
    assert kept == read_join_file(site / "site.join")
    assert kept.address == "elsewhere:9443" and "east" in kept.directory.sites


@pytest.mark.parametrize("host", ["https://fed.example.org", "fed.example.org:9443", "[::1]", "", "fed example"])
def test_hosts_that_no_certificate_can_name(tmp_path: Path, folder: Path, host: str) -> None:
    with pytest.raises(UserError, match="is not a valid name or address"):
        create_federation(tmp_path / "new", ["north"], [host])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="is not a valid name or address"):
        renew(folder, [host])
