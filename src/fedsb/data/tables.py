"""The tables that a configuration names: loaded, without excluded rows, and reduced to the rows that are drawn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fedsb.config.schema import Config
from fedsb.data.names import SHOWN
from fedsb.data.readers import FileFormat
from fedsb.data.rows import Table, make_table, require_columns, with_values
from fedsb.data.sources import load_table
from fedsb.data.tasks.answers import Answers
from fedsb.data.tasks.base import Task
from fedsb.utils.errors import UserError, did_you_mean
from fedsb.utils.rng import keyed_generator

TEST_SEED = 0  # runs with different seeds are scored on the same rows


def load_tables(config: Config) -> tuple[Table, Table | None]:
    """Returns (training table, test table). Raises UserError if a table is missing or unusable."""
    data = config.data
    test: Table | None = None
    if data.train is None:
        raise UserError(
            "data.train is not set. Name the rows to train on: a file, hub:owner/name, or python-docs. Only "
            "`fedsb serve` runs without it, because its rows are at the sites."
        )
    if data.train == "python-docs":
        from fedsb.data import python_docs

        train, test = python_docs.tables()
    else:
        train = _load(data.train, data.revision, data.train_split, format_of(config))
    if data.validation_fraction:
        test = None  # not even read: tuning must not see it
    elif data.test is not None:
        test = _load(data.test, data.revision, data.test_split, format_of(config))
    train, test = _exclude_from_both(train, test, data.exclude)
    train = draw_rows(train, data.train_rows, config.seed, "train rows")
    return train, None if test is None else draw_rows(test, data.test_rows, TEST_SEED, "test rows")


def load_client_table(
    config: Config,
    task: Task,
    source: str,
    columns: Mapping[str, str],
    *,
    allowed: Collection[str] | None = None,
    revision: str | None = None,
    split: str = "train",
    form: FileFormat | None = None,
) -> Table:
    """Returns a site's own table with the columns that the task reads.

    Args:
        columns: the task's columns by the site's names for them.
        allowed: columns that are kept; None keeps all.
        revision, split: of a Hub data set. The site chooses them, because it decides which rows it uses.
    """
    table = _load(source, revision, split, form)
    if allowed is not None:
        kept = [with_values(row, {key: row[key] for key in row if key in allowed}) for row in table.rows]
        table = replace(table, rows=kept)
    require_columns(table, list(columns.values()))
    ours = {theirs: name for name, theirs in columns.items()}
    rows = [with_values(row, {ours.get(key, key): value for key, value in row.items()}) for row in table.rows]
    if columns or allowed is not None:
        table = replace(table, rows=rows, fingerprint=make_table(rows, table.origin).fingerprint, class_names={})
    table = _exclude(table, config.data.exclude)[0]
    task.columns_of(table)
    return table


def load_test(config: Config, task: Task) -> Table | None:
    """Returns the test table of a run whose training rows are at the sites."""
    data = config.data
    if data.test is None:
        return None
    table = _exclude(_load(data.test, data.revision, data.test_split, format_of(config)), data.exclude)[0]
    table = draw_rows(table, data.test_rows, TEST_SEED, "test rows")
    task.columns_of(table)
    return table


def load_rows(config: Config, task: Task, source: str | None) -> Table:
    """Returns the rows to score: those of `source`, or of the run's test table. Raises UserError if neither exists."""
    if source is not None:
        table: Table | None = _load(source, None, config.data.test_split, format_of(config))
    else:
        table = load_test(config, task) if config.data.train is None else load_tables(config)[1]
    if table is None:
        raise UserError("This run has no test table of its own. Name one with --data PATH.")
    task.columns_of(table)
    return table


def load_unlabelled(config: Config, task: Task, source: str) -> Table:
    """Returns rows to predict. Raises UserError if a column that the model reads is missing."""
    table = _load(source, None, config.data.test_split, format_of(config))
    require_read_columns(task, table)
    return table


def require_read_columns(task: Task, table: Table) -> None:
    """Raises UserError if a table lacks a column that the model reads. Labels are not needed."""
    if isinstance(task, Answers):
        task.prompt_layout(table.columns, table.origin)
    else:
        require_columns(table, task.reads)


def draw_rows(table: Table, rows: int | None, seed: int, key: str) -> Table:
    """Returns `rows` rows of the table, drawn by the seed, in their order: a file may be sorted by label."""
    if rows is None or rows >= len(table.rows):
        return table
    drawn = sorted(keyed_generator(seed, key).permutation(len(table.rows))[:rows].tolist())
    return replace(table, rows=[table.rows[i] for i in drawn], total=len(table.rows))


def format_of(config: Config) -> FileFormat:
    """Returns how the files of the configuration are read."""
    data = config.data
    return FileFormat(
        delimiter=data.delimiter, quoting=data.quoting, encoding=data.encoding, columns=tuple(data.columns)
    )


def table_facts(table: Table) -> dict[str, Any]:
    """Returns what the manifest says of a table."""
    return {"origin": table.origin, "rows": len(table.rows), "fingerprint": table.fingerprint}


def _load(source: str, revision: str | None, split: str, form: FileFormat | None = None) -> Table:
    """Loads a table. Revision and split apply to Hub data sets only, the format to files only."""
    if source.startswith("hub:"):
        return load_table(source, revision=revision, split=split)
    return load_table(source, form=form)


def _exclude_from_both(train: Table, test: Table | None, exclude: Mapping[str, Any]) -> tuple[Table, Table | None]:
    """Returns the tables without the rows that data.exclude names. Raises UserError for a value that no row has."""
    left, counts = _exclude(train, exclude)
    left_test, more = (None, {}) if test is None else _exclude(test, exclude)
    for (column, value), rows in counts.items():
        if rows + more.get((column, value), 0) == 0:
            names = list(dict.fromkeys("" if row[column] is None else str(row[column]) for row in train.rows))
            known = did_you_mean(str(value), names) if len(names) <= 4 * SHOWN else f"as {', '.join(names[:SHOWN])} ..."
            raise UserError(
                f"data.exclude leaves out rows with {value!r} in the column {column!r}, and no row has it: {known}. "
                "Correct the value, or remove it from data.exclude."
            )
    return left, left_test


def _exclude(table: Table, exclude: Mapping[str, Any]) -> tuple[Table, dict[tuple[str, str], int]]:
    """Returns (the table without the rows that have one of these values, how many rows have each value).

    Raises UserError if no row is left.
    """
    values = [(key, value) for key, of in exclude.items() for value in (of if isinstance(of, list) else [of])]
    if not values:
        return table, {}
    require_columns(table, list(exclude))
    counts = {(key, str(value)): 0 for key, value in values}
    left = []
    for row in table.rows:
        found = [(key, str(value)) for key, value in values if _has_value(row[key], value)]
        for each in found:
            counts[each] += 1
        if not found:
            left.append(row)
    fingerprint = make_table(left, table.origin).fingerprint
    return replace(table, rows=left, fingerprint=fingerprint, dropped=len(table.rows) - len(left)), counts


def _has_value(cell: object, value: object) -> bool:
    """Returns whether a cell equals a value of the TOML.

    Files may store numbers and true or false as text, and "" also means null.
    """
    if isinstance(value, bool) or isinstance(cell, bool):
        return str(cell).strip().lower() == str(value).lower()
    if isinstance(value, int | float) and isinstance(cell, int | float | str):
        try:
            return float(cell) == float(value)
        except (ValueError, OverflowError):
            return False
    return str("" if cell is None else cell) == str(value)
