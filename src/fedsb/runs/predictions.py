"""Predicts rows without labels with the adapter of a finished run: in Python, as JSON lines, or as CSV.

    classification    prediction (a class) and probabilities (of every class)
    regression        prediction (a number)
    generation        prediction (the text, greedy decoding) and ended (false if it reached the limit of new tokens)
    score = options   prediction (the most likely answer)
    base              base_prediction and base_ended as well: the answer of the base model without the adapter

The LoRA adapter is loaded with PEFT, and batches are those of `fedsb eval`. So the score computed from the predictions
for a labelled table is the score that `fedsb eval` prints. Shapes: b rows, c classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedsb.data.rows import Row, make_table
from fedsb.data.tables import load_unlabelled, require_read_columns
from fedsb.data.tasks.answers import Answers
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.classification import Classification, pooled
from fedsb.models.load import matmul_precision
from fedsb.reporting.terminal import PREDICTION_COLUMNS
from fedsb.runs.evaluate import adapted_model, finished_run, fitted_task
from fedsb.training.generation import write_answers
from fedsb.training.scoring import batches_by_length, forward, likeliest, prompts_of
from fedsb.utils.errors import UserError
from fedsb.utils.files import json_lines, write_atomic

FORMATS = (".jsonl", ".csv")
Data = str | Path | Sequence[Mapping[str, Any]]


def predict(folder: Path | str, data: Data, *, new_tokens: int | None = None, base: bool = False) -> list[Row]:
    """Returns a copy of every row with the prediction columns that the module's docstring lists.

    Args:
        folder: the run directory.
        data: a file, "hub:owner/name", or rows. Columns that the model does not read are kept.
        new_tokens: the limit of a generated text, by default the run's own.
        base: whether to answer with the base model too, to compare.

    Raises:
        UserError: PEFT cannot load the run's adapter, `base` with a task that has a head, a column is missing or would
            be overwritten, or a row is not valid. The message names the row's file and line.
    """
    manifest, config, adapter = finished_run(Path(folder))
    task = fitted_task(manifest, config, new_tokens)
    if base and isinstance(task, Classification):
        raise UserError("The base model has no trained task head, so it cannot answer. Leave out --base.")
    if isinstance(data, str | Path):
        table = load_unlabelled(config, task, str(data))
    else:
        table = make_table([dict(row) for row in data], "the rows")
        require_read_columns(task, table)
    if taken := sorted(set(PREDICTION_COLUMNS) & set(table.columns)):
        raise UserError(f"{table.origin} has a column {taken[0]!r}, which a prediction would overwrite. Rename it.")
    made: list[Row]
    with matmul_precision(config.model.float32_matmul_precision):
        if isinstance(task, Classification):
            inputs, _ = task.inputs(table.rows)
            made = _classify(task, adapted_model(config, task, adapter), inputs, config.eval.batch_size)
        else:
            assert isinstance(task, CausalTask)
            questions = task.questions(table.rows)
            model = adapted_model(config, task, adapter)
            made = _write(task, model, questions, config.eval.batch_size)
            if base:
                with model.disable_adapter():
                    before = _write(task, model, questions, config.eval.batch_size)
                made = [
                    row | {"base_prediction": own["prediction"], "base_ended": own["ended"]}
                    for row, own in zip(made, before, strict=True)
                ]
    return [{**row, **columns} for row, columns in zip(table.rows, made, strict=True)]


@torch.no_grad()
def _classify(task: Classification, model: Any, inputs: list[Any], batch_size: int) -> list[Row]:
    """Returns the columns of a class or a number for each input."""
    made: list[Row] = [{} for _ in inputs]
    for chosen in batches_by_length(inputs, batch_size):
        logits_bc = pooled(*forward(model, task, [inputs[i] for i in chosen])).cpu()
        for i, logits_c in zip(chosen, logits_bc, strict=True):
            if task.problem_type == "regression":
                made[i] = {"prediction": float(logits_c[0])}
                continue
            shares = dict(zip(task.class_names, logits_c.softmax(dim=-1).tolist(), strict=True))
            made[i] = {"prediction": task.class_names[int(logits_c.argmax())], "probabilities": shares}
    return made


def _write(task: CausalTask, model: Any, questions: list[Any], batch_size: int) -> list[Row]:
    """Returns the columns of a generated text or of the most likely answer for each question."""
    made: list[Row] = [{} for _ in questions]
    if isinstance(task, Answers) and task.scoring == "options":
        for answered in likeliest(model, task, questions, batch_size):
            made[answered.position] = {"prediction": answered.verdict.extracted}
        return made
    ends, stops = task.end_tokens(model), task.stops()
    written = write_answers(model, task.tokenizer, prompts_of(questions), ends=ends, stops=stops, batch_size=batch_size)
    for position, answer in written:
        made[position] = {"prediction": answer.text, "ended": answer.ended}
    return made


def write_predictions(rows: Sequence[Row], path: Path) -> None:
    """Writes predictions to a .jsonl or .csv file. A CSV file has a column for each probability."""
    if path.suffix == ".jsonl":
        write_atomic(path, json_lines(rows, default=str))
        return
    flat = [_flat(row) for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    write_atomic(path, text.getvalue().encode())


def refuse_output(path: Path) -> None:
    """Raises UserError for a file that exists, and for an unknown format."""
    if path.suffix not in FORMATS:
        raise UserError(f"--out {path} has an unknown format. Use a name that ends with {' or '.join(FORMATS)}.")
    if path.exists():
        raise UserError(f"--out {path} already exists. Choose a different name.")


def _flat(row: Row) -> Row:
    """Returns a row with one cell per column of the CSV file."""
    shares = {f"probability of {name}": share for name, share in row.get("probabilities", {}).items()}
    cells = {name: value for name, value in row.items() if name != "probabilities"} | shares
    return {
        name: json.dumps(value, default=str) if isinstance(value, list | dict) else value
        for name, value in cells.items()
    }
