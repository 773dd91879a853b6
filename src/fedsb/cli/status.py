"""`fedsb federation status` and `fedsb site status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsb.utils.errors import UserError
from fedsb.utils.signals import Interrupts


def status(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the coordinator or the site.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it every two seconds, until Ctrl-C.")] = False,
    web: Annotated[
        bool, typer.Option("--web", help="Serve a page on this machine only, with /metrics, /health and /state.json.")
    ] = False,
    port: Annotated[int | None, typer.Option("--port", help="The port of --web; default: 9444.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")] = False,
) -> None:
    """Show the state of the coordinator or the site. Changes nothing; exit code 2 if something is wrong."""
    from fedsb.deployment.monitoring import show, state_of

    if web and (watch or as_json):
        raise UserError("--web cannot be combined with --watch or --json. Run a command for each.")
    if port is not None and not web:
        raise UserError("--port is for --web only. Add --web, or leave --port out.")
    if web:
        from fedsb.deployment.monitoring.web import PORT, open_web

        state_of(folder)  # reports an unreadable folder now
        with open_web(lambda: state_of(folder), PORT if port is None else port) as server:
            typer.echo(
                f"Serving http://localhost:{server.server_port} (also /metrics, /health, /state.json). Press Ctrl-C to "
                "stop."
            )
            with Interrupts().installed():
                server.serve_forever()
    elif watch:
        with Interrupts().installed():
            show.watch(lambda: state_of(folder), as_json=as_json)
    else:
        state = state_of(folder)
        show.show(state, as_json=as_json)
        if state["health"]["faults"]:
            raise typer.Exit(2)
