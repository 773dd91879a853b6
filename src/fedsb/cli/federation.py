"""`fedsb federation`: the coordinator's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsb.cli.common import Set, load, print_result
from fedsb.cli.status import status
from fedsb.utils.errors import RunError

app = typer.Typer(
    help="Create and serve a federation over a network. The coordinator's commands.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
UPDATE = "fedsb site update FILE directory.json"
FolderArgument = Annotated[Path, typer.Argument(metavar="FEDERATION", help="The coordinator's folder.")]
SiteArgument = Annotated[str, typer.Argument(metavar="SITE", help="The name of a site.")]


@app.command()
def create(
    folder: FolderArgument,
    site: Annotated[
        list[str],
        typer.Option("--site", help="A site's NAME.site, or a name to make its keys here. Repeat it per site."),
    ] = [],  # noqa: B006
    host: Annotated[
        list[str], typer.Option("--host", help="A name or address at which sites reach this machine. Repeatable.")
    ] = [],  # noqa: B006
    port: Annotated[int | None, typer.Option("--port", help="The port that sites connect to; default: 9443.")] = None,
) -> None:
    """Create a federation. Writes its certificates and a join file per site."""
    from fedsb.deployment.federation import PORT, create_federation

    paths = create_federation(folder, site, host, PORT if port is None else port)
    for name, path in zip(site, paths, strict=True):
        typer.echo(f"{path}\n    {_recipient(name, path)}")
    if site:
        typer.echo(f"Next, send each file to its site, and run\n    fedsb federation serve {folder} my.toml")
    else:
        typer.echo(f"{folder} has no sites yet. Add each one with\n    fedsb federation add {folder} NAME.site")


@app.command()
def add(
    folder: FolderArgument,
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's NAME.site, or a name to make its keys here.")],
) -> None:
    """Add a site. Writes its join file."""
    from fedsb.deployment.federation import DIRECTORY, add_site

    path = add_site(folder, site)
    typer.echo(
        f"{path}\n    {_recipient(site, path)}\nThe other sites need {folder / DIRECTORY} before they take part in "
        f"secure aggregation with it:\n    {UPDATE}"
    )


@app.command()
def revoke(folder: FolderArgument, site: SiteArgument) -> None:
    """Revoke a site permanently."""
    from fedsb.deployment.federation import DIRECTORY
    from fedsb.deployment.federation import revoke as revoke_site
    from fedsb.deployment.registry import CA_KEY

    signed, directory = revoke_site(folder, site), folder / DIRECTORY
    typer.echo(f"{site} is revoked. A running coordinator refuses its next request.")
    if signed:
        typer.echo(f"Send the new {directory} to the other sites, which run\n    {UPDATE}")
    else:
        typer.echo(
            f"{directory} still lists {site}, because {folder / CA_KEY}, which signs it, does not exist. Do not send "
            f"it to the sites. Copy {CA_KEY} back and run\n    fedsb federation sign {folder}\n"
            f"Then send the new {directory} to the other sites, which run\n    {UPDATE}"
        )


@app.command()
def renew(
    folder: FolderArgument,
    host: Annotated[
        list[str], typer.Option("--host", help="An additional name or address of this machine. Repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Renew the server's certificate."""
    from fedsb.deployment.federation import renew as renew_certificate

    renew_certificate(folder, host)
    typer.echo("The server's certificate is renewed. A running coordinator uses it after a restart.")


@app.command()
def sign(folder: FolderArgument) -> None:
    """Sign the directory of sites again. Needed after a site was revoked without ca.key."""
    from fedsb.deployment.federation import sign_directory

    typer.echo(f"{sign_directory(folder)} is signed. Send it to the sites, which run\n    {UPDATE}")


@app.command()
def serve(
    folder: FolderArgument,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The run: a TOML file, or the name of a recipe.")],
    port: Annotated[
        int | None, typer.Option("--port", help="The local port, if it is not the one that sites connect to.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="The local address to listen on; default: all addresses.")
    ] = None,
    overrides: Set = [],  # noqa: B006
) -> None:
    """Serve a run to the sites over TLS. Repeat the command to resume."""
    from fedsb.deployment.coordinate import PROGRAM, prepare, run_folder
    from fedsb.deployment.registry import read_federation
    from fedsb.deployment.run import serve as serve_federation

    read_federation(folder)
    loaded = load(config, overrides)
    where = run_folder(folder, loaded)
    try:
        serve_federation(folder, PROGRAM, lambda: prepare(folder, loaded), listen=listen, port=port)
    except (KeyboardInterrupt, RunError):
        if where.exists():
            typer.echo(f"Completed rounds are in {where}. Repeat the same command to resume.", err=True)
        raise
    print_result(where, as_json=False)


app.command()(status)


def _recipient(site: str, join_file: Path) -> str:
    from fedsb.deployment.join_file import PUBLIC_KEYS_SUFFIX

    if site.endswith(PUBLIC_KEYS_SUFFIX):
        return f"Send it to site {join_file.stem}, which has the private keys."
    return f"Send it to site {join_file.stem} privately, because it contains the site's private keys."
