"""The commands that use a run's adapter: score, predict, export and report."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedsb.cli.common import Json, RunArgument, print_json, print_result
from fedsb.utils.errors import UserError


class Backend(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


def evaluate(
    folder: RunArgument,
    data: Annotated[
        list[str],
        typer.Option("--data", help="Other data to score: a file or hub:owner/name. Repeat it for several tables."),
    ] = [],  # noqa: B006
    backend: Annotated[
        Backend | None, typer.Option("--backend", help="What generates answers; default: transformers.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Run these tasks of lm-eval instead: gsm8k,piqa."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a run's adapter, loaded with PEFT. On its test data or other data; answers are stored in evals/."""
    from fedsb.models.hub import stay_offline_without_network
    from fedsb.reporting.terminal import Terminal, print_scores, print_table
    from fedsb.runs.evaluate import evaluate_by_lm_eval, evaluate_tables

    if lm_eval is not None and (data or backend):
        raise UserError("--lm-eval does not use --data or --backend. Leave them out.")
    stay_offline_without_network()
    if lm_eval is not None:
        print_json(evaluate_by_lm_eval(folder, lm_eval))
        return
    backend = backend or Backend.transformers
    found = evaluate_tables(folder, data or [None], backend=backend.value, note=Terminal(quiet=as_json).note)
    single = found["tables"][0] if len(data) < 2 else None
    if as_json:
        print_json(single or found)
    elif single:
        print_table([single])
    else:
        print_scores(found)


def predict(
    folder: RunArgument,
    data: Annotated[str, typer.Option("--data", help="The rows, without labels: a file or hub:owner/name.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="A new file, .jsonl or .csv; default: print the predictions.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", help="The limit of a generated answer; default: the run's own.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also answer with the base model, to compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout; logs go to stderr.")] = False,
) -> None:
    """Predict with a run's adapter, loaded with PEFT. Classes with probabilities, numbers, or generated answers."""
    from fedsb.models.hub import stay_offline_without_network
    from fedsb.reporting.terminal import print_predictions
    from fedsb.runs.predictions import predict as predict_rows
    from fedsb.runs.predictions import refuse_output, write_predictions
    from fedsb.utils.files import json_lines

    stay_offline_without_network()
    if out is not None:
        refuse_output(out)
    rows = predict_rows(folder, data, new_tokens=new_tokens, base=base)
    if out is not None:
        write_predictions(rows, out)
        if as_json:
            print_json({"run": str(folder), "data": data, "rows": len(rows), "out": str(out)})
        else:
            typer.echo(f"{len(rows):,} predictions written to {out}")
    elif as_json:
        typer.echo(json_lines(rows, default=str).decode(), nl=False)
    else:
        print_predictions(rows)


def export(
    folder: RunArgument,
    to: Annotated[str, typer.Option("--to", help="A new folder, or hub:owner/name (needs HF_TOKEN).")],
    merged: Annotated[bool, typer.Option("--merged", help="The base model with the adapter merged in.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository on the Hub public; default: private.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export the adapter or the merged model. To a new folder or to the Hub."""
    from fedsb.adapters.serving import serving_lines
    from fedsb.reporting.run_directory import read_result
    from fedsb.runs.evaluate import export_to

    where = export_to(folder, to, merged=merged, public=public)
    servers = [] if merged else (read_result(folder) or {}).get("serving", [])  # of the plain adapter
    if as_json:
        print_json({"exported": where, "serving": servers})
    else:
        typer.echo("\n  ".join([f"exported to {where}", *serving_lines(servers)]))


def report(folder: RunArgument, as_json: Json = False) -> None:
    """Write a run's report.html again, and print a summary. The run can be unfinished."""
    from fedsb.reporting.report import write_report

    write_report(folder)
    print_result(folder, as_json)


COMMANDS: tuple[Callable[..., None], ...] = (evaluate, predict, export, report)
