"""A site's folder: its site.toml, and the handle that answers the coordinator's requests with it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.client.policy import SITE, load_site
from fedsb.deployment.join_file import JOIN_FILE, JoinFile, read_join_file
from fedsb.utils.errors import UserError

if TYPE_CHECKING:
    from fedsb.client.handler import SiteHandler
    from fedsb.client.secure_sum import Identity

HANDLE = "fedsb.deployment.site_folder:open_handle"
TEMPLATE = """data = {data}

# What this site takes part in. A setting that is left out is not limited. docs/deploy.md describes all of them.
[allow]
# columns = ['text', 'label']
# labels = ['yes', 'no']
# methods = ['fed-sb']
# rounds = 50
# epsilon = 8.0
# sum_clients = 3
"""


def open_handle(folder: Path) -> SiteHandler:
    """Returns the handle of a site, which `fedsb site join` keeps running."""
    from fedsb.client.handler import SiteHandler  # imports torch, which the supervisor does not need

    join = read_join_file(folder / JOIN_FILE)
    return SiteHandler(folder, load_site(folder / SITE), identity_of(join), partial(print, flush=True))


def identity_of(join: JoinFile) -> Identity:
    """Returns the site's name and keys, with the identity keys of all sites."""
    from fedsb.client.secure_sum import Identity

    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(join.identity))
    directory = {name: bytes.fromhex(public) for name, public in join.directory.sites.items()}
    return Identity(name=join.site, key=key, directory=directory)


def write_site_toml(folder: Path, data: str | None) -> None:
    """Writes site.toml if the folder has none. Raises UserError if an existing one names different data."""
    path = folder / SITE
    if data is not None and not data.startswith("hub:"):
        if not (file := Path(data).expanduser()).exists():
            raise UserError(f"The file {data} does not exist. Give this site's data with --data, by its full path.")
        data = str(file.resolve())  # the site may be started from a different folder the next time
    if path.exists():
        site = load_site(path)
        if data is not None and site.data != data:
            raise UserError(
                f"{path} has data = {site.data!r}, but --data is {data!r}. Leave --data out, or change the file."
            )
        return
    if data is None:
        raise UserError(f"This site's data is not set. Give it once with --data, which writes it to {path}.")
    path.write_text(TEMPLATE.format(data=json.dumps(data)))
