"""Options and output helpers that several commands use."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsb.utils.errors import RunError

if TYPE_CHECKING:
    from fedsb.config.inputs import ModelConfig
    from fedsb.config.load import ResolvedConfig
    from fedsb.reporting.terminal import Terminal
    from fedsb.server.opened import OpenFederation

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout; logs go to stderr.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in train.lr=0.01.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show every setting with its reason, and all estimates.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a recipe.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/quickstart.")]


def load(config: str, overrides: Sequence[str]) -> ResolvedConfig:
    """Loads a configuration, and prints to stderr which of its settings were renamed."""
    from fedsb.runs.find import load as find_and_load

    loaded = find_and_load(config, overrides)
    if not Path(config).is_dir():  # a run directory was written by fedsb, not by the user
        for notice in loaded.notices:
            typer.echo(f"Notice: {notice}.", err=True)
    return loaded


def fail(message: str, code: int) -> int:
    """Prints an error message and returns the exit code."""
    typer.echo(f"fedsb: {message}", err=True)
    return code


@contextmanager
def shown_run(folder: Path, as_json: bool, *, verbose: bool) -> Iterator[Terminal]:
    """Shows the progress of a run. If it stops early, prints how to resume it."""
    from fedsb.reporting.terminal import Terminal

    try:
        with Terminal(quiet=as_json, verbose=verbose) as display:
            yield display
    except RunError as error:
        raise typer.Exit(fail(f"{error}\n{_how_to_resume(folder)}", 2)) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(fail(f"interrupted\n{_how_to_resume(folder)}", 130)) from error


def _how_to_resume(folder: Path) -> str:
    if not folder.is_dir():
        return f"  The folder {folder} does not exist. If it was deleted or moved during the run, start the run again."
    if not (folder / "manifest.json").exists():
        return f"  No run exists in {folder}. Start it again."
    return f"  Completed rounds are in {folder}. To resume:\n    fedsb resume {shlex.quote(str(folder))}"


@contextmanager
def all_ranks(model: ModelConfig, resumed: Path | None = None) -> Iterator[OpenFederation | None]:
    """Yields how to open a federation: in this process, or with all processes of a torchrun launch.

    Yields None where another process of the launch has the run. `resumed`: the run directory that is resumed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        from fedsb.channels.in_process import open_in_process

        yield open_in_process
        return
    from fedsb.channels.process_group import launched
    from fedsb.channels.sharded import launched_sharded
    from fedsb.runs.run import replicate

    sharded = model.placement == "sharded"
    with launched_sharded(model, replicate, resumed) if sharded else launched() as open_federation:
        yield open_federation


def print_result(folder: Path, as_json: bool) -> None:
    """Prints the summary of a run."""
    from fedsb.reporting.report import summary
    from fedsb.reporting.terminal import print_summary

    found = summary(folder)
    if as_json:
        paths = {name: str(path) for name in ("adapter", "report.html") if (path := folder / name).exists()}
        print_json({"run": str(folder), **paths, **found})
    else:
        print_summary(folder, found)


def print_json(found: Any) -> None:
    typer.echo(json.dumps(found, indent=1, default=str))
