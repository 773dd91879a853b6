"""The command line `fedsb`: its commands, errors and exit codes. The commands import the library when they run."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import typer

from fedsb import __version__
from fedsb.cli import federation, run, site, use
from fedsb.cli.common import Json, fail, print_json
from fedsb.cli.renamed import new_arguments
from fedsb.utils.errors import RunError, UserError

app = typer.Typer(
    help="Federated fine-tuning of language models at a fraction of the bytes that LoRA sends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Listed(StrEnum):
    methods = "methods"
    recipes = "recipes"
    tasks = "tasks"
    bases = "bases"
    settings = "settings"


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"fedsb {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("ls")
def list_things(
    what: Annotated[Listed | None, typer.Argument(help="What to list; default: all names.")] = None,
    as_json: Json = False,
) -> None:
    """List methods, recipes, tasks, bases or settings."""
    from fedsb.cli import listing
    from fedsb.reporting.terminal import print_table

    rows = listing.everything() if what is None else getattr(listing, what.value)()
    if as_json:
        print_json(rows)
    else:
        print_table(rows)


for command in (*run.COMMANDS, *use.COMMANDS):
    app.command("eval" if command is use.evaluate else None)(command)
app.add_typer(federation.app, name="federation")
app.add_typer(site.app, name="site")


@app.command()
def env(as_json: Json = False) -> None:
    """Print the versions and the machine, for bug reports."""
    from fedsb.utils.environment import describe_machine

    found = describe_machine()
    if as_json:
        print_json(found)
    else:
        for key, value in found.items():
            typer.echo(f"{key:>15}  {value}")


def build_command() -> Any:
    """Returns the click command, with the help texts of arguments, which click 8.4 and newer drop with typer 0.20."""
    command: Any = typer.main.get_command(app)
    groups = [command, *(each for each in command.commands.values() if hasattr(each, "commands"))]
    for one in (each for group in groups for each in group.commands.values() if not hasattr(each, "commands")):
        one.format_arguments = lambda *_: None  # typer prints the arguments itself
        hints = get_type_hints(one.callback, include_extras=True)
        for param in one.params:
            if param.param_type_name == "argument" and param.help is None:
                param.help = getattr(hints[param.name].__metadata__[0], "help", None)
    return command


def main() -> None:
    """Runs the command line. Exit codes: 0 success, 1 invalid input, 2 a failed run, 130 interrupted."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it logs about faster kernels
    try:
        arguments, notice = new_arguments(sys.argv[1:])
        if notice:
            typer.echo(f"Notice: {notice}", err=True)
        code = build_command().main(arguments, prog_name="fedsb", standalone_mode=False)
    except UserError as error:
        code = fail(str(error), 1)
    except RunError as error:
        code = fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = fail("interrupted", 130)
    except OSError as error:  # of the disk; files that fedsb writes are atomic
        code = fail(str(error), 2)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer"):
            raise
        if type(error).__name__ == "NoSuchCommand":  # click 8.4 and newer repeat typer's suggestions
            error.possibilities = None  # type: ignore[attr-defined]
        show = getattr(error, "show", None)
        show() if show else fail(str(error), 1)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
