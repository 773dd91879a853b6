"""What `fedsb site join` keeps running: the handler of a site, from its folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.client.handler import SiteHandler
from fedsb.client.policy import SITE, load_site
from fedsb.client.secure_sum import Identity
from fedsb.deployment.join_file import KEPT, read_join_file


def open_handler(folder: Path) -> SiteHandler:
    """Returns the handler of a site's folder, with its site.toml and the join file that it keeps."""
    join = read_join_file(folder / KEPT)
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(join.identity))
    directory = {name: bytes.fromhex(public) for name, public in join.directory.sites.items()}
    identity = Identity(name=join.site, key=key, directory=directory)
    return SiteHandler(folder, load_site(folder / SITE), identity, partial(print, flush=True))
