"""What a site tries before it joins: its files, the door, its rows, its rules. Nothing leaves it."""

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
    """A line for each thing that is well. Raises UserError at the first that is not."""
    join = read_join_file(folder / JOIN_FILE)
    yield f"join file: site {join.site} of federation {join.federation}, whose sites are, by fingerprint of their key:"
    for name, key in sorted(join.directory.sites.items()):
        yield f"  {fingerprint(bytes.fromhex(key))}  {name}"
    site = load_site(folder / SITE)
    allowed = ", ".join(f"{key} = {value}" for key, value in site.allow.model_dump(exclude_defaults=True).items())
    yield f"site.toml: rules {allowed or 'none, so all is allowed'}"
    yield from _rows(folder, site, config)
    check_tls(join.address, join.ca)
    yield f"door: {join.address} shows a certificate of this federation"


def _rows(folder: Path, site: SiteConfig, config: str | None) -> Iterator[str]:
    """This site's own rows; with the run's TOML also its rules and the base model."""
    if config is None:
        from fedsb.data.sources import load_table

        table = load_table(site.data, form=site.form)
        yield f"rows: {len(table.rows):,} with the columns {', '.join(table.columns)}"
        yield "not tried: the run's own needs; name its TOML with --config"
        return
    from fedsb.client.session import Participant
    from fedsb.config.find import load
    from fedsb.deployment.site_folder import identity_of
    from fedsb.methods import build_method
    from fedsb.training.resolved import sum_threshold

    settings = load(config, []).config
    refuse_run(site.allow, settings, build_method(settings.method.name, settings.method.options))
    yield "rules: this site takes part in such a run"
    identity = identity_of(read_join_file(folder / JOIN_FILE))
    if settings.server.secure_aggregation:
        others = {name: key for name, key in identity.directory.items() if name != identity.name}
        _, threshold = sum_threshold(settings.server, len(identity.directory))
        refuse_sum(site.allow, threshold)
        refuse_peers(site.allow, others)
        yield f"secure sums: of {threshold} of {len(identity.directory)} sites at least"
    part = Participant(folder / "runs" / "dryrun", site, identity, settings, "dryrun")
    if len(part.labels) == 1:  # the classes are those of all sites
        part.task.label_names = [str(part.labels[0]), "of another site"]
    else:
        part.task.fit_labels(part.table.rows, [])
    part.open(part.task.label_names)
    if part.labels:
        told = ", ".join(map(str, part.labels[:SHOWN])) + (" ..." if len(part.labels) > SHOWN else "")
        yield f"labels: {len(part.labels)} here, which the coordinator is told: {told}"
    yield f"rows: {part.site.rows:,} to train on, {len(part.site.held_out):,} held out; {part.cut:,} are cut"
    yield f"base model: {part.trainer.base.name}, {part.trainer.base.parameters:,} parameters"
    for choice in part.trainer.preflight.choices:
        yield f"{choice.key}: {choice.value}: {choice.reason}"


def check_tls(address: str, ca: str) -> None:
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
