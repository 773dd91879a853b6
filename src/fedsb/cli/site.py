"""`fedsb site`: the commands of a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsb.cli.status import status

app = typer.Typer(
    help="Take part in a federation over a network. The commands of a site.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

JoinFileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The join file from the coordinator.")]
Folder = Annotated[
    Path | None, typer.Option("--folder", help="The site's folder; default: the name of the file, in this folder.")
]
Data = Annotated[
    str | None, typer.Option("--data", help="This site's data: a file or hub:owner/name. Stored in site.toml.")
]


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(metavar="NAME.site", help="A new file for the public keys.")],
    folder: Folder = None,
) -> None:
    """Make this site's keys. The private keys stay in its folder; NAME.site is for the coordinator."""
    from fedsb.client.policy import fingerprint
    from fedsb.deployment.join_file import make_keys

    here = _site_folder(path, folder)
    keys = make_keys(path, here)
    typer.echo(
        f"{path}\n    Send it to the coordinator, which adds this site with it. It contains no secret.\n"
        f"{here}\n    contains the private keys, which never leave it.\n"
        f"fingerprint {fingerprint(bytes.fromhex(keys.identity))}\n    Send it to the other sites over a different "
        "channel, so that they can compare it."
    )


@app.command()
def check(
    join_file: JoinFileArgument,
    config: Annotated[
        str | None, typer.Option("--config", metavar="TOML", help="The run's TOML file, to check it against the rules.")
    ] = None,
    data: Data = None,
    folder: Folder = None,
) -> None:
    """Check a site before it joins: its files, the connection, its data and its rules. Sends nothing."""
    from fedsb.deployment.dry_run import check_site
    from fedsb.deployment.join_file import store_join_file
    from fedsb.deployment.site_folder import write_site_toml

    here = _site_folder(join_file, folder)
    store_join_file(join_file, here)
    write_site_toml(here, data)
    for line in check_site(here, config):
        typer.echo(line)


@app.command()
def join(join_file: JoinFileArgument, data: Data = None, folder: Folder = None) -> None:
    """Take part in a federation until stopped. The rules of this site are in its site.toml."""
    from fedsb.deployment.join_file import store_join_file
    from fedsb.deployment.run import join as join_federation
    from fedsb.deployment.site_folder import HANDLE, write_site_toml

    here = _site_folder(join_file, folder)
    name = store_join_file(join_file, here).site
    write_site_toml(here, data)
    typer.echo(f"joining as {name}; logs are in {here / 'logs'}, sent messages in {here / 'outbox.jsonl'}")
    try:
        join_federation(join_file, here, HANDLE)
    except KeyboardInterrupt:
        typer.echo(f"{name} is stopped. Repeat the same command to take part again.", err=True)
        raise typer.Exit(130) from None


@app.command()
def update(
    join_file: JoinFileArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The coordinator's directory.json.")],
    folder: Folder = None,
) -> None:
    """Store a newer directory of sites, after a site was added or revoked."""
    from fedsb.deployment.join_file import store_join_file, update_directory

    here = _site_folder(join_file, folder)
    store_join_file(join_file, here)
    found = update_directory(here, directory)
    typer.echo(f"The directory in {here} has {len(found.sites)} sites: {', '.join(found.sites)}")


app.command()(status)


def _site_folder(path: Path, folder: Path | None) -> Path:
    return folder or Path(path.name.removesuffix(".join").removesuffix(".site"))
