"""The verbs of a real federation: serve at the coordinator, join at a site."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import typer

from fedsb.utils.errors import RunError, UserError
from fedsb.utils.signals import Interrupts

FolderArgument = Annotated[Path, typer.Argument(metavar="FEDERATION", help="The coordinator's folder.")]
HANDLE = "fedsb.client.handler:open_handle"

# What a command does, by the option that asks for it ("": no such option), and the other options that this uses.
SERVE = {
    "--init": ("--site", "--host", "--port"),
    "--add": (),
    "--revoke": (),
    "--renew": ("--host",),
    "--sign": (),
    "": ("CONFIG", "--port", "--listen", "--set"),
}
JOIN = {
    "--new": ("--folder",),
    "--directory": ("--folder",),
    "--dry-run": ("--data", "--folder", "--config"),
    "": ("--data", "--folder"),
}
STATUS = {"--web": ("--port",), "--watch": ("--json",), "": ("--json",)}


def check_options(context: typer.Context, actions: Mapping[str, Collection[str]]) -> None:
    """Raises UserError where a command line asks for two actions, or has an option that its action does not use."""
    given = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.required is False:
            is_option = parameter.param_type_name == "option"
            given.append(parameter.opts[0] if is_option else str(parameter.name).upper())
    chosen = [option for option in given if option in actions]
    command = f"fedsb {context.info_name}"
    if len(chosen) > 1:
        raise UserError(
            f"{command} does one thing at a time. This command asks for {' and '.join(chosen)}. Run a command for each."
        )
    action = chosen[0] if chosen else ""
    for option in given:
        if option != action and option not in actions[action]:
            users = [f"`{_usage(command, context, other)}`" for other, used in actions.items() if option in used]
            raise UserError(
                f"`{_usage(command, context, action)}` does not use {option}. Leave it out. It is for "
                f"{' and '.join(users)}."
            )


def _usage(command: str, context: typer.Context, action: str) -> str:
    """`fedsb serve FEDERATION --init`, or `fedsb serve FEDERATION CONFIG` without an action."""
    arguments = [each for each in context.command.params if each.param_type_name == "argument"]
    shown = [str(each.metavar or each.name).strip("[]") for each in arguments if each.required or not action]
    return " ".join([command, *shown, *([action] if action else [])])


def serve(
    context: typer.Context,
    folder: FolderArgument,
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="The run: a TOML file, or the name of a recipe.")
    ] = None,
    init: Annotated[bool, typer.Option("--init", help="Make the federation: certificates and join files.")] = False,
    site: Annotated[
        list[str],
        typer.Option("--site", help="With --init: a site's name, or the NAME.site that it made; several for several."),
    ] = [],  # noqa: B006
    host: Annotated[
        list[str], typer.Option("--host", help="With --init: the name or address under which sites reach this machine.")
    ] = [],  # noqa: B006
    port: Annotated[int | None, typer.Option("--port", help="The one port that sites reach; default 9443.")] = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", help="The local address to listen on; default: all of this machine's addresses."),
    ] = None,
    add: Annotated[
        str | None, typer.Option("--add", metavar="SITE", help="Make one more site's join file; as --site.")
    ] = None,
    revoke: Annotated[str | None, typer.Option("--revoke", metavar="SITE", help="Shut a site out for good.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Make a new server certificate.")] = False,
    sign: Annotated[bool, typer.Option("--sign", help="Sign the directory anew, after a site was revoked.")] = False,
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = [],  # noqa: B006
) -> None:
    """Serve a federation over TLS. First --init, which makes a join file for each site; then with the run's TOML."""
    from fedsb.deployment import federation as register
    from fedsb.deployment import run

    check_options(context, SERVE)
    if init:
        paths = register.create_federation(folder, site, host, register.PORT if port is None else port)
        for name, path in zip(site, paths, strict=True):
            typer.echo(f"{path}\n    {_to_whom(name, path)}")
        if site:
            typer.echo(f"next: hand these out, then\n    fedsb serve {folder} my.toml")
        else:
            typer.echo(f"{folder} has no site yet; next, for each\n    fedsb serve {folder} --add NAME.site")
        return
    if add is not None:
        path = register.add_site(folder, add)
        typer.echo(
            f"{path}\n    {_to_whom(add, path)}. The others take {folder / register.DIRECTORY} before they are in a "
            "secure sum with it:\n    fedsb join FILE --directory directory.json"
        )
        return
    if revoke is not None:
        signed = register.revoke(folder, revoke)
        typer.echo(f"{revoke} is revoked. A coordinator that is serving refuses its next request.")
        directory = folder / register.DIRECTORY
        if signed:
            typer.echo(f"Send the new {directory} to the other sites: fedsb join FILE --directory directory.json")
        else:
            typer.echo(
                f"{directory} still lists {revoke}, because it is signed with {folder / register.CA_KEY}, which is not "
                f"here. Do not send it out. Put {register.CA_KEY} back and run\n    fedsb serve {folder} --sign\n"
                f"Then send the new {directory} to the other sites: fedsb join FILE --directory directory.json"
            )
        return
    if renew:
        register.renew(folder, host)
        typer.echo("The server certificate is renewed. A coordinator that is serving uses it after a restart.")
        return
    if sign:
        typer.echo(
            f"{register.sign_directory(folder)} is signed. Send it to the sites: fedsb join FILE --directory "
            "directory.json"
        )
        return
    if config is None:
        raise UserError(
            f"fedsb serve needs the run's TOML file or the name of a recipe: fedsb serve {folder} my.toml. A new "
            "federation is made with --init."
        )
    from fedsb.config.find import load
    from fedsb.deployment.coordinate import PROGRAM, prepare, run_folder

    register.read_federation(folder)
    loaded = load(config, overrides)
    where = run_folder(folder, loaded)
    try:
        run.serve(folder, PROGRAM, lambda: prepare(folder, loaded), listen=listen, port=port)
    except (KeyboardInterrupt, RunError):
        if where.exists():
            typer.echo(f"What was finished is in {where}. The same command continues the run.", err=True)
        raise
    typer.echo(f"the federation is done; everything is in {where}")


def join(
    context: typer.Context,
    join_file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The join file that the coordinator made; with --new: NAME.site.")
    ],
    new: Annotated[
        bool, typer.Option("--new", help="First: make this site's keys, and FILE for the coordinator, which has none.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="This site's rows: a file or hub:owner/name; kept in site.toml.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="This site's own; default: the join file's name, here.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try the door, the rows and the rules, and send nothing.")
    ] = False,
    config: Annotated[
        str | None, typer.Option("--config", metavar="TOML", help="With --dry-run: the run, as the coordinator has it.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Take a newer directory of sites, and end.")
    ] = None,
) -> None:
    """Take part in a federation, until it is stopped. What this site allows is in its site.toml."""
    from fedsb.client.policy import fingerprint
    from fedsb.deployment import run
    from fedsb.deployment.join_file import CARD, make_keys, store_join_file, update_directory

    check_options(context, JOIN)
    here = folder or Path(join_file.name.removesuffix(".join").removesuffix(CARD))
    if new:
        card = make_keys(join_file, here)
        typer.echo(
            f"{join_file}\n    for the coordinator, which adds this site with it; nothing in it is secret\n"
            f"{here}\n    holds the private keys; they never leave it\n"
            f"fingerprint {fingerprint(bytes.fromhex(card.identity))}\n    to tell the other sites, by another way"
        )
        return
    site = store_join_file(join_file, here).site
    if directory is not None:
        found = update_directory(here, directory)
        typer.echo(f"{here} knows {len(found.sites)} sites: {', '.join(found.sites)}")
        return
    _say_what_there_is(here, data)
    if dry_run:
        from fedsb.deployment.dry_run import check_site

        for line in check_site(here, config):
            typer.echo(line)
        return
    typer.echo(f"joining as {site}; logs in {here / 'logs'}, what leaves in {here / 'outbox.jsonl'}")
    try:
        run.join(join_file, here, HANDLE)
    except KeyboardInterrupt:
        typer.echo(f"{site} is stopped. The same command lets it take part again.", err=True)
        raise typer.Exit(130) from None


def _to_whom(site: str, join_file: Path) -> str:
    from fedsb.deployment.join_file import CARD

    if site.endswith(CARD):
        return f"for the site {join_file.stem}, which has the keys to it"
    return f"for the site {join_file.stem}, in private: it holds the site's keys"


def _say_what_there_is(folder: Path, data: str | None) -> None:
    """Makes site.toml where it is not there yet. Raises UserError where it says another thing than the command."""
    from fedsb.client.policy import SITE, load_site

    path = folder / SITE
    if data is not None and not data.startswith("hub:"):
        if not (file := Path(data).expanduser()).exists():
            raise UserError(f"there is no file {data}: give this site's rows, best by their full path")
        data = str(file.resolve())  # the site may be started from elsewhere the next time
    if path.exists():
        site = load_site(path)
        if data is not None and site.data != data:
            raise UserError(
                f"{path} says data = {site.data!r}, the command says {data!r}: leave --data out, or change the file"
            )
        return
    if data is None:
        raise UserError(f"which rows? fedsb join FILE --data rows.jsonl; they are then kept in {path}")
    path.write_text(
        f"data = {json.dumps(data)}\n\n"
        "# What this site takes part in; what is not set is not limited. All of it is in docs/deploy.md.\n"
        "[allow]\n# columns = ['text', 'label']\n# labels = ['yes', 'no']\n# methods = ['fed-sb']\n# rounds = 50\n"
        "# epsilon = 8.0\n# sum_clients = 3\n"
    )


def status(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A coordinator's folder, or a site's.")],
    watched: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until Ctrl-C.")] = False,
    web: Annotated[
        bool, typer.Option("--web", help="As a page on this machine alone, with /metrics, /health and /state.json.")
    ] = False,
    port: Annotated[int | None, typer.Option("--port", help="With --web: default 9444.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")] = False,
) -> None:
    """Show what a coordinator or a site is at. Exit code 2 where something is wrong there; it changes nothing."""
    from fedsb.deployment.monitoring import show, state_of

    check_options(context, STATUS)
    if web:
        from fedsb.deployment.monitoring.web import PORT, open_web

        state_of(folder)  # what cannot be read is said now
        with open_web(lambda: state_of(folder), PORT if port is None else port) as server:
            typer.echo(f"http://localhost:{server.server_port} (also /metrics, /health, /state.json); Ctrl-C ends it")
            with Interrupts().installed():
                server.serve_forever()
        return
    if watched:
        with Interrupts().installed():
            show.watch(lambda: state_of(folder), as_json=as_json)
        return
    state = state_of(folder)
    show.show(state, as_json=as_json)
    if state["health"]["faults"]:
        raise typer.Exit(2)
