"""The commands that check, run and compare configurations."""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedsb.cli import common
from fedsb.cli.common import ConfigArgument, Json, RunArgument, Set, Verbose
from fedsb.utils.errors import RunError


class Engine(StrEnum):
    in_process = "in_process"
    flower = "flower"


def init(
    recipe: Annotated[str, typer.Argument(help="The recipe to start from.")] = "quickstart", as_json: Json = False
) -> None:
    """Print a recipe to start from. Save it and edit it: fedsb init quickstart > my.toml."""
    from fedsb.runs.find import recipe_path

    text = recipe_path(recipe).read_text()
    if as_json:
        common.print_json(tomllib.loads(text))
    else:
        typer.echo(text, nl=False)


def check(
    config: ConfigArgument,
    overrides: Set = [],  # noqa: B006
    gpu: Annotated[
        float | None, typer.Option(min=1, metavar="GB", help="Estimate for a GPU with this memory, such as 80.")
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Check a configuration and estimate bytes, memory and time. Trains nothing; exit code 1 with all errors."""
    from fedsb.comparison.contenders import methods_to_price
    from fedsb.reporting.terminal import print_estimate
    from fedsb.runs.estimate import estimate

    loaded = common.load(config, overrides)
    found = estimate(loaded, also=methods_to_price(loaded), gpu=gpu)
    if as_json:
        common.print_json(found)
    else:
        print_estimate(found, verbose=verbose)


def run(
    config: ConfigArgument,
    engine: Annotated[
        Engine, typer.Option("--engine", help="In this process, or as the processes of a federation on this machine.")
    ] = Engine.in_process,
    overrides: Set = [],  # noqa: B006
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run a federation from start to adapter."""
    from fedsb.runs.run import federate

    loaded = common.load(config, overrides)
    if engine is Engine.flower:
        from fedsb.deployment.local_federation import run_local_federation

        common.print_result(run_local_federation(loaded), as_json)
        return
    folder = Path(loaded.config.out) / loaded.config.name
    with common.all_ranks(loaded.config.model) as open_federation:
        if open_federation is None:
            return
        with common.shown_run(folder, as_json, verbose=verbose) as display:
            result = federate(loaded, display, open_federation)
    common.print_result(result.folder, as_json)


def resume(
    folder: RunArgument,
    config: Annotated[
        str | None, typer.Option("--config", help="A TOML file that must agree with the run's settings.")
    ] = None,
    overrides: Set = [],  # noqa: B006
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Resume a run after its last completed round."""
    from fedsb.config.load import load_config
    from fedsb.models.hub import stay_offline_without_network
    from fedsb.reporting.run_directory import read_manifest, refuse_old_format
    from fedsb.runs.run import resume as resume_run

    stay_offline_without_network()
    changed = None if config is None else common.load(config, overrides)
    manifest = read_manifest(folder)
    if config is None and overrides:
        changed = load_config(manifest["config"], overrides)
    refuse_old_format(folder, manifest)
    model = load_config(manifest["config"]).config.model
    with common.all_ranks(model, folder) as open_federation:
        if open_federation is None:
            return
        with common.shown_run(folder, as_json, verbose=verbose) as display:
            result = resume_run(folder, display, changed, open_federation)
    common.print_result(result.folder, as_json)


def compare(
    config: ConfigArgument,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B@RANK,...",
            help="The methods to compare, instead of those in the TOML file. The first is the reference.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs per method, with the seeds 0, 1, ...")] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Learning rates to try per method; 0 keeps train.lr.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The output folder; default: comparisons/NAME.")] = None,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Compare methods with equal tuning. Reports scores over seeds and bytes; repeat the command to resume."""
    from fedsb.comparison.compare import compare as run_all
    from fedsb.comparison.terminal import print_comparison
    from fedsb.reporting.terminal import Terminal

    chosen = [f"compare.{name}={value}" for name, value in (("seeds", seeds), ("trials", trials)) if value is not None]
    if methods is not None:
        names = [name.strip() for name in methods.split(",")]
        chosen += [f"compare.methods={json.dumps(names)}", "compare.contenders=[]", "compare.reference=none"]
    loaded = common.load(config, [*chosen, *overrides])
    folder = out or Path("comparisons") / loaded.config.name
    try:
        found = run_all(loaded, folder, Terminal(quiet=as_json).note)
    except KeyboardInterrupt as error:
        again = f"  Completed runs are in {folder}. To resume:\n    {shlex.join(['fedsb', *sys.argv[1:]])}"
        raise typer.Exit(common.fail(f"interrupted\n{again}", 130)) from error
    if as_json:
        common.print_json({"comparison": str(folder), **found})
    else:
        print_comparison(folder, found)
    if found["failed"]:
        raise RunError("Some runs failed:\n" + "\n".join(f"  {name}: {why}" for name, why in found["failed"].items()))


def audit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, the name of a recipe, or a run directory.")
    ],
    client: Annotated[
        str | None, typer.Option("--client", help="The client to audit; default: the one with the largest epsilon.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Rounds to train; default: all rounds of the client.")
    ] = None,
    canaries: Annotated[int, typer.Option("--canaries", help="The number of canaries.")] = 1000,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Audit a private configuration with canaries. Discards the run; exit code 2 if its epsilon cannot be true."""
    from fedsb.reporting.terminal import Terminal, print_audit
    from fedsb.runs.audit import audit as run_audit

    loaded = common.load(config, overrides)
    found = run_audit(loaded, client=client, rounds=rounds, canaries=canaries, note=Terminal(quiet=as_json).note)
    if as_json:
        common.print_json(found)
    else:
        print_audit(found)
    if found["broken"]:
        raise RunError(f"The audit failed: {found['says']}")


COMMANDS: tuple[Callable[..., None], ...] = (init, check, run, resume, compare, audit)
