"""A site's checks before it joins: its files, the public port, its rows, its policy. No data leaves the site."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from fedsb.client.policy import SITE, SiteConfig, fingerprint, load_site, refuse_peers, refuse_run, refuse_sum
from fedsb.deployment.join_file import JOIN_FILE, read_join_file
from fedsb.utils.errors import UserError

SECONDS = 10.0
SHOWN = 12  # labels


def check_site(folder: Path, config: str | None) -> Iterator[str]:
    """Yields a line for each check that succeeds. Raises UserError at the first that fails."""
    join = read_join_file(folder / JOIN_FILE)
    yield f"join file: site {join.site} of federation {join.federation}, whose sites are, by fingerprint of their key:"
    for name, key in sorted(join.directory.sites.items()):
        yield f"  {fingerprint(bytes.fromhex(key))}  {name}"
    site = load_site(folder / SITE)
    allowed = ", ".join(f"{key} = {value}" for key, value in site.allow.model_dump(exclude_defaults=True).items())
    yield f"site.toml: rules {allowed or 'none, so all is allowed'}"
    yield from _rows(folder, site, config)
    check_tls(join.address, join.ca)
    yield f"public port: {join.address} shows a certificate of this federation"


def _rows(folder: Path, site: SiteConfig, config: str | None) -> Iterator[str]:
    """Checks this site's rows and, with the run's TOML, its policy and the base model."""
    if config is None:
        from fedsb.data.sources import load_table

        table = load_table(site.data, form=site.form)
        yield f"rows: {len(table.rows):,} with the columns {', '.join(table.columns)}"
        yield "not tried: the run's own needs; name its TOML with --config"
        return
    from fedsb.deployment.site_folder import open_handle
    from fedsb.privacy.shared import noise_kind
    from fedsb.runs.find import load
    from fedsb.secagg.threshold import honest_in_sum

    settings = load(config, []).config
    refuse_run(site.allow, settings, settings.method)
    yield "rules: this site takes part in such a run"
    handler = open_handle(folder)
    if settings.server.secure_aggregation:
        directory = handler.identity.directory
        shared = noise_kind(settings, settings.method)[0] == "shared"
        asked, threshold = settings.server.sum_threshold(len(directory), settings.privacy if shared else None)
        colluding = settings.privacy.colluding_clients
        refuse_sum(site.allow, honest_in_sum(asked, threshold, colluding, signed=False) if shared else threshold)
        refuse_peers(site.allow, {name: key for name, key in directory.items() if name != handler.identity.name})
        yield f"secure aggregation: of {threshold} of {len(directory)} sites at least"
    described = handler.describe("dryrun", settings)
    task, labels = described.task, described.labels
    if len(labels) == 1:  # the classes are those of all sites
        task.label_names = [str(labels[0]), "of another site"]
    else:
        task.fit_labels(described.table.rows, [])
    prepared = described.prepare(task.label_names, None)
    if labels:
        shown = ", ".join(map(str, labels[:SHOWN])) + (" ..." if len(labels) > SHOWN else "")
        yield f"labels: {len(labels)} here, which are sent to the coordinator: {shown}"
    data, base = prepared.data, prepared.trainer.base
    yield f"rows: {data.rows:,} to train on, {len(data.held_out):,} held out; {prepared.cut:,} are cut"
    yield f"base model: {base.name}, {base.parameters:,} parameters"
    for setting in prepared.trainer.preflight.choices:
        yield f"{setting.key}: {setting.value}: {setting.reason}"


def check_tls(address: str, ca: str) -> None:
    """Performs a TLS handshake with the coordinator. Raises UserError if it fails."""
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
