"""What a site tries before it joins: its files, the door, its rows, its rules. Nothing leaves it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from fedsb.deployment.join_file import KEPT, read_join_file
from fedsb.errors import UserError
from fedsb.site.settings import SITE, SiteConfig, fingerprint, load_site, refuse_run

SECONDS = 10.0


def try_out(folder: Path, config: str | None) -> Iterator[str]:
    """A line for each thing that is well. Raises UserError at the first that is not."""
    join = read_join_file(folder / KEPT)
    yield f"join file: site {join.site} of federation {join.federation}, whose sites are, by fingerprint of their key:"
    for name, key in sorted(join.directory.sites.items()):
        yield f"  {fingerprint(bytes.fromhex(key))}  {name}"
    site = load_site(folder / SITE)
    yield f"site.toml: {site.allow.model_dump(exclude_none=True)}"
    yield from _rows(folder, site, config)
    knock(join.address, join.ca)
    yield f"door: {join.address} shows a certificate of this federation"


def _rows(folder: Path, site: SiteConfig, config: str | None) -> Iterator[str]:
    """This site's own rows; with the run's TOML also its rules and the base model."""
    if config is None:
        from fedsb.data.sources import load_table

        table = load_table(site.data)
        yield f"rows: {len(table.rows):,} with the columns {', '.join(table.columns)}"
        yield "not tried: the run's own needs; name its TOML with --config"
        return
    from fedsb.cli import load
    from fedsb.methods import build_method
    from fedsb.site.handle import open_handle
    from fedsb.site.participant import Participant

    settings = load(config, []).config
    refuse_run(site.allow, settings, build_method(settings.method.name, settings.method.options))
    yield "rules: this site takes part in such a run"
    identity = open_handle(folder).identity
    part = Participant(folder / "runs" / "dryrun", site, identity, settings, "dryrun")
    part.task.fit_labels(part.table.rows, [])
    part.open(part.task.label_names)
    yield f"rows: {part.site.rows:,} to train on, {len(part.site.held_out):,} held out; {part.cut:,} are cut"
    yield f"base model: {part.bench.base.name}, {part.bench.base.parameters:,} parameters"


def knock(address: str, ca: str) -> None:
    """A TLS handshake with the coordinator. Raises UserError where there is none."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cadata=ca)
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host.strip("[]")),
        ):
            pass
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{address} shows a certificate that is not of this federation ({error.verify_message}): is it the right "
            "machine, and the clock right?"
        ) from error
    except OSError as error:
        raise UserError(
            f"{address} cannot be reached ({error}): does the coordinator serve, and does the network let you out?"
        ) from error
