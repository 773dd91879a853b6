"""The command line: verbs only. Each says what it does, calls the library, and prints."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsb.errors import RunError, UserError

if TYPE_CHECKING:
    from fedsb.config import Loaded

app = typer.Typer(
    help="Federated fine-tuning of language models at a fraction of the bytes that LoRA sends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout; logs go to stderr.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in train.lr=0.01.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a recipe.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/quickstart.")]


class Listed(StrEnum):
    methods = "methods"
    recipes = "recipes"
    tasks = "tasks"
    bases = "bases"


@app.command("ls")
def list_things(what: Annotated[Listed, typer.Argument(help="What to list.")], as_json: Json = False) -> None:
    """List the methods, recipes, tasks or bases that there are, with their facts."""
    from fedsb import catalogue
    from fedsb.terminal import print_table

    rows = getattr(catalogue, what.value)()
    if as_json:
        _print_json(rows)
    else:
        print_table(rows)


@app.command()
def init(recipe: Annotated[str, typer.Argument(help="The recipe to start from.")] = "quickstart") -> None:
    """Print a recipe, to be saved and changed: fedsb init quickstart > my.toml."""
    from fedsb.catalogue import recipe_path

    typer.echo(recipe_path(recipe).read_text(), nl=False)


@app.command()
def check(config: ConfigArgument, overrides: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Check a configuration and price its run before it starts: bytes, memory, time. Exit code 1 with all faults."""
    from fedsb.pricing import estimate
    from fedsb.terminal import print_estimate

    found = estimate(_load(config, overrides))
    if as_json:
        _print_json(found)
    else:
        print_estimate(found)


@app.command()
def run(config: ConfigArgument, overrides: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Run a federation, from the start to the adapter."""
    from fedsb.run import federate

    loaded = _load(config, overrides)
    with _watched(as_json) as display:
        result = federate(loaded, display)
    _print_result(result.folder, as_json)


@app.command()
def resume(
    folder: RunArgument,
    config: Annotated[
        str | None, typer.Option("--config", help="A TOML to compare with the run's own settings.")
    ] = None,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Take up a run behind its last finished round."""
    from fedsb.config import load_config
    from fedsb.record import read_manifest
    from fedsb.run import resume as take_up

    changed = None
    if config is not None:
        changed = _load(config, overrides)
    elif overrides:
        changed = load_config(read_manifest(folder)["config"], overrides)
    with _watched(as_json) as display:
        result = take_up(folder, display, changed)
    _print_result(result.folder, as_json)


@app.command("eval")
def evaluate(
    folder: RunArgument,
    data: Annotated[str | None, typer.Option("--data", help="Other rows to score: a file or hub:owner/name.")] = None,
    as_json: Json = False,
) -> None:
    """Score a run's exported adapter, loaded by PEFT, on its test rows or on others."""
    from fedsb.evaluate import evaluate_adapter
    from fedsb.terminal import print_table

    found = evaluate_adapter(folder, data)
    if as_json:
        _print_json(found)
    else:
        print_table([found])


@app.command()
def export(
    folder: RunArgument,
    to: Annotated[str, typer.Option("--to", help="A new folder, or hub:owner/name (needs HF_TOKEN).")],
    merged: Annotated[bool, typer.Option("--merged", help="The base model with the adapter merged in.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a run's adapter, or the merged model, to a folder or to the Hub."""
    from fedsb.evaluate import export_to

    where = export_to(folder, to, merged=merged)
    if as_json:
        _print_json({"exported": where})
    else:
        typer.echo(f"exported to {where}")


@app.command()
def report(folder: RunArgument, as_json: Json = False) -> None:
    """Write a run's report.html anew, finished or not, and print its headline."""
    from fedsb.report import write_report

    page = write_report(folder)
    _print_result(folder, as_json)
    typer.echo(f"report: {page}", err=as_json)


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions and machine, for bug reports."""
    from fedsb.environment import describe_machine

    found = describe_machine()
    if as_json:
        _print_json(found)
    else:
        for key, value in found.items():
            typer.echo(f"{key:>15}  {value}")


def _load(config: str, overrides: list[str]) -> Loaded:
    """A TOML file by path; a recipe by name where there is no such file."""
    from fedsb.catalogue import recipe_path
    from fedsb.config import load_config

    path = Path(config)
    return load_config(path if path.suffix == ".toml" or path.exists() else recipe_path(config), overrides)


def _watched(as_json: bool) -> Any:
    from fedsb.terminal import Terminal

    return Terminal(quiet=as_json)


def _print_result(folder: Path, as_json: bool) -> None:
    from fedsb.report import summary
    from fedsb.terminal import print_summary

    found = summary(folder)
    if as_json:
        _print_json({"run": str(folder), **found})
    else:
        print_summary(folder, found)


def _print_json(found: Any) -> None:
    typer.echo(json.dumps(found, indent=1, default=str))


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 the user's input, 2 a run that failed, 130 interrupted."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        code = _fail(str(error), 1)
    except RunError as error:
        code = _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; what was finished is on disk: `fedsb resume RUN` goes on", 130)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer"):
            raise
        show = getattr(error, "show", None)
        show() if show else _fail(str(error), 1)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    typer.echo(f"fedsb: {message}", err=True)
    return code
