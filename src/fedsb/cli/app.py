"""The command line: verbs only. Each says what it does, calls the library, and prints."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fedsb import __version__
from fedsb.cli import federation as cli_federation
from fedsb.config.find import load, recipe_path
from fedsb.utils.errors import RunError, UserError

if TYPE_CHECKING:
    from fedsb.reporting.terminal import Terminal

app = typer.Typer(
    help="Federated fine-tuning of language models at a fraction of the bytes that LoRA sends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout; logs go to stderr.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in train.lr=0.01.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show every setting with its reason, and all prices.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a recipe.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/quickstart.")]
EVAL = {"--lm-eval": ("--json",), "": ("--data", "--backend", "--json")}  # options that each way of scoring uses


class Listed(StrEnum):
    methods = "methods"
    recipes = "recipes"
    tasks = "tasks"
    bases = "bases"
    settings = "settings"


class Engine(StrEnum):
    embedded = "embedded"
    flower = "flower"


class Backend(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


def _version(asked: bool) -> None:
    if asked:
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
    what: Annotated[Listed | None, typer.Argument(help="What to list; default: the names of all.")] = None,
    as_json: Json = False,
) -> None:
    """List methods, recipes, tasks, bases or settings."""
    from fedsb.cli import listing as catalogue
    from fedsb.reporting.terminal import print_table

    rows = catalogue.everything() if what is None else getattr(catalogue, what.value)()
    if as_json:
        _print_json(rows)
    else:
        print_table(rows)


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="The recipe to start from.")] = "quickstart", as_json: Json = False
) -> None:
    """Print a recipe to start from. To be saved and changed: fedsb init quickstart > my.toml."""
    text = recipe_path(recipe).read_text()
    if as_json:
        _print_json(tomllib.loads(text))
    else:
        typer.echo(text, nl=False)


@app.command()
def check(
    config: ConfigArgument,
    overrides: Set = [],  # noqa: B006
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Check a run and price it. Bytes, memory and time before it starts; exit code 1 with all faults."""
    from fedsb.planning.estimate import estimate
    from fedsb.reporting.terminal import print_estimate

    found = estimate(load(config, overrides))
    if as_json:
        _print_json(found)
    else:
        print_estimate(found, verbose=verbose)


@app.command()
def run(
    config: ConfigArgument,
    engine: Annotated[
        Engine, typer.Option("--engine", help="In this process, or as processes of a real federation, all here.")
    ] = Engine.embedded,
    overrides: Set = [],  # noqa: B006
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run a federation, from the start to the adapter."""
    from fedsb.runs.run import federate

    loaded = load(config, overrides)
    if engine is Engine.flower:
        from fedsb.deployment.local_federation import run_local_federation

        _print_result(run_local_federation(loaded), as_json)
        return
    with _watched(Path(loaded.config.out) / loaded.config.name, as_json, verbose=verbose) as display:
        result = federate(loaded, display)
    _print_result(result.folder, as_json)


@app.command()
def resume(
    folder: RunArgument,
    config: Annotated[
        str | None, typer.Option("--config", help="A TOML to compare with the run's own settings.")
    ] = None,
    overrides: Set = [],  # noqa: B006
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Resume a run after its last completed round."""
    from fedsb.config.load import load_config
    from fedsb.models.hub import stay_offline_without_network
    from fedsb.reporting.run_directory import read_manifest
    from fedsb.runs.run import resume as take_up

    stay_offline_without_network()
    changed = None
    if config is not None:
        changed = load(config, overrides)
    elif overrides:
        changed = load_config(read_manifest(folder)["config"], overrides)
    with _watched(folder, as_json, verbose=verbose) as display:
        result = take_up(folder, display, changed)
    _print_result(result.folder, as_json)


@app.command()
def compare(
    config: ConfigArgument,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B@RANK,...",
            help="What to compare, not what the TOML names; the first is the reference.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs of each, with the seeds 0, 1, ...")] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Learning rates tried for each; 0: train.lr as it stands.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Its folder; default: comparisons/NAME.")] = None,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Compare methods, tuned alike. Scores over seeds and bytes; started again, it goes on where it stopped."""
    from fedsb.comparison.compare import compare as run_all
    from fedsb.reporting.terminal import Terminal, print_comparison

    chosen = [f"compare.{name}={value}" for name, value in (("seeds", seeds), ("trials", trials)) if value is not None]
    if methods is not None:
        names = [name.strip() for name in methods.split(",")]
        chosen += [f"compare.methods={json.dumps(names)}", "compare.contenders=[]", "compare.reference=none"]
    loaded = load(config, [*chosen, *overrides])
    folder = out or Path("comparisons") / loaded.config.name
    try:
        found = run_all(loaded, folder, Terminal(quiet=as_json).note)
    except KeyboardInterrupt as error:
        again = f"  what was finished is in {folder}; to go on:\n    {shlex.join(['fedsb', *sys.argv[1:]])}"
        raise typer.Exit(_fail(f"interrupted\n{again}", 130)) from error
    if as_json:
        _print_json({"comparison": str(folder), **found})
    else:
        print_comparison(folder, found)
    if found["failed"]:
        raise RunError("not everything ran:\n" + "\n".join(f"  {name}: {why}" for name, why in found["failed"].items()))


@app.command()
def audit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, the name of a recipe, or a run directory.")
    ],
    client: Annotated[str | None, typer.Option("--client", help="Default: the one with the largest epsilon.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Default: all of the client's.")] = None,
    canaries: Annotated[int, typer.Option("--canaries", help="How many canaries there are.")] = 1000,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Audit a private run. A throw-away run with canaries; exit code 2 where its epsilon cannot be true."""
    from fedsb.reporting.terminal import Terminal, print_audit
    from fedsb.runs.audit import audit as carry_out

    loaded = load(config, overrides)
    found = carry_out(loaded, client=client, rounds=rounds, canaries=canaries, note=Terminal(quiet=as_json).note)
    if as_json:
        _print_json(found)
    else:
        print_audit(found)
    if found["broken"]:
        raise RunError(f"the audit failed: {found['says']}")


@app.command("eval")
def evaluate(
    context: typer.Context,
    folder: RunArgument,
    data: Annotated[
        list[str],
        typer.Option("--data", help="Other rows to score: a file or hub:owner/name; several for each and their mean."),
    ] = [],  # noqa: B006
    backend: Annotated[Backend, typer.Option("--backend", help="What writes answers.")] = Backend.transformers,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Run lm-eval's own tasks instead: gsm8k,piqa."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a run's adapter, loaded by PEFT. On its test rows or on others; written answers are kept in evals/."""
    from fedsb.models.hub import stay_offline_without_network
    from fedsb.reporting.terminal import Terminal, print_scores, print_table
    from fedsb.runs.evaluate import evaluate_by_lm_eval, evaluate_tables

    cli_federation.check_options(context, EVAL)
    stay_offline_without_network()
    if lm_eval is not None:
        found = evaluate_by_lm_eval(folder, lm_eval)
        _print_json(found)
        return
    found = evaluate_tables(folder, data or [None], backend=backend.value, note=Terminal(quiet=as_json).note)
    one = found["tables"][0] if len(data) < 2 else None
    if as_json:
        _print_json(one or found)
    elif one:
        print_table([one])
    else:
        print_scores(found)


@app.command()
def predict(
    folder: RunArgument,
    data: Annotated[str, typer.Option("--data", help="Rows, which need no label: a file or hub:owner/name.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write them to a new file, .jsonl or .csv; default: print them.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", help="Limit of a written answer; default: the run's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout; logs go to stderr.")] = False,
) -> None:
    """Predict rows with a run's adapter, loaded by PEFT. Classes with probabilities, numbers, or written answers."""
    from fedsb.models.hub import stay_offline_without_network
    from fedsb.reporting.terminal import print_predictions
    from fedsb.runs.predictions import json_lines, refuse_output, write_predictions
    from fedsb.runs.predictions import predict as predict_rows

    stay_offline_without_network()
    if out is not None:
        refuse_output(out)
    rows = predict_rows(folder, data, new_tokens=new_tokens)
    if out is not None:
        write_predictions(rows, out)
        if as_json:
            _print_json({"run": str(folder), "data": data, "rows": len(rows), "out": str(out)})
        else:
            typer.echo(f"{len(rows):,} predictions written to {out}")
    elif as_json:
        typer.echo(json_lines(rows), nl=False)
    else:
        print_predictions(rows)


@app.command()
def export(
    folder: RunArgument,
    to: Annotated[str, typer.Option("--to", help="A new folder, or hub:owner/name (needs HF_TOKEN).")],
    merged: Annotated[bool, typer.Option("--merged", help="The base model with the adapter merged in.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository on the Hub public; default: private.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy the adapter or the merged model. To a new folder or to the Hub."""
    from fedsb.adapters.serving import serving_lines
    from fedsb.reporting.run_directory import read_result
    from fedsb.runs.evaluate import export_to

    where = export_to(folder, to, merged=merged, public=public)
    servers = [] if merged else (read_result(folder) or {}).get("serving", [])  # of the plain adapter
    if as_json:
        _print_json({"exported": where, "serving": servers})
    else:
        typer.echo("\n  ".join([f"exported to {where}", *serving_lines(servers)]))


@app.command()
def report(folder: RunArgument, as_json: Json = False) -> None:
    """Write a run's report.html anew. Finished or not; prints its headline."""
    from fedsb.reporting.report import write_report

    write_report(folder)
    _print_result(folder, as_json)


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions and machine, for bug reports."""
    from fedsb.utils.environment import describe_machine

    found = describe_machine()
    if as_json:
        _print_json(found)
    else:
        for key, value in found.items():
            typer.echo(f"{key:>15}  {value}")


app.command()(cli_federation.serve)
app.command()(cli_federation.join)
app.command()(cli_federation.status)


@contextmanager
def _watched(folder: Path, as_json: bool, *, verbose: bool) -> Iterator[Terminal]:
    """Shows a run; where it stops early, says how to go on with it."""
    from fedsb.reporting.terminal import Terminal

    try:
        with Terminal(quiet=as_json, verbose=verbose) as display:
            yield display
    except RunError as error:
        raise typer.Exit(_fail(f"{error}\n{_how_to_go_on(folder)}", 2)) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(_fail(f"interrupted\n{_how_to_go_on(folder)}", 130)) from error


def _how_to_go_on(folder: Path) -> str:
    if not folder.is_dir():
        return f"  there is no folder {folder}: if it was deleted or moved during the run, start the run again"
    if not (folder / "manifest.json").exists():
        return f"  there is no run in {folder}: start it again"
    return f"  what was finished is in {folder}; to go on:\n    fedsb resume {shlex.quote(str(folder))}"


def _print_result(folder: Path, as_json: bool) -> None:
    from fedsb.reporting.report import summary
    from fedsb.reporting.terminal import print_summary

    found = summary(folder)
    if as_json:
        there = {what: str(path) for what in ("adapter", "report.html") if (path := folder / what).exists()}
        _print_json({"run": str(folder), **there, **found})
    else:
        print_summary(folder, found)


def _print_json(found: Any) -> None:
    typer.echo(json.dumps(found, indent=1, default=str))


def _command() -> Any:
    """Returns the command line with the help texts of its arguments, which click 8.4 and newer drop for typer 0.20."""
    command: Any = typer.main.get_command(app)
    for one in command.commands.values():
        one.format_arguments = lambda *_: None  # typer writes the arguments itself
        hints = get_type_hints(one.callback, include_extras=True)
        for param in one.params:
            if param.param_type_name == "argument" and param.help is None:
                param.help = getattr(hints[param.name].__metadata__[0], "help", None)
    return command


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 the user's input, 2 a run that failed, 130 interrupted."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it would speak of faster kernels
    try:
        code = _command().main(prog_name="fedsb", standalone_mode=False)
    except UserError as error:
        code = _fail(str(error), 1)
    except RunError as error:
        code = _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", 130)
    except OSError as error:  # a disk or a file that the machine refuses; what fedsb writes is atomic
        code = _fail(str(error), 2)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("click", "typer"):
            raise
        if type(error).__name__ == "NoSuchCommand":  # click 8.4 and newer repeat what typer says already
            error.possibilities = None  # type: ignore[attr-defined]
        show = getattr(error, "show", None)
        show() if show else _fail(str(error), 1)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    typer.echo(f"fedsb: {message}", err=True)
    return code
