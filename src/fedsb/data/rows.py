"""Rows that know the file and line that they come from, and tables of rows with a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsb.utils.errors import BadRowError, UserError, did_you_mean

Row = dict[str, Any]


class PlacedRow(dict[str, Any]):
    """A row that knows where it was read, for error messages."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place

    def __or__(self, other: Mapping[str, Any]) -> PlacedRow:  # type: ignore[override]
        return PlacedRow({**self, **other}, self.place)


def place_of(row: Row, number: int) -> str:
    """Returns the file and line of a row, as "train.csv, line 4"; its number if it was made in memory."""
    return row.place if isinstance(row, PlacedRow) else f"row {number}"


def with_values(row: Row, values: Row) -> Row:
    """Returns a row with these columns and the place of `row`."""
    return PlacedRow(values, row.place) if isinstance(row, PlacedRow) else values


@contextmanager
def errors_at(row: Row, number: int) -> Iterator[None]:
    """Adds the file and line of a row to errors that are raised inside."""
    try:
        yield
    except BadRowError:
        raise
    except UserError as error:
        raise BadRowError(f"{place_of(row, number)}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that all have the same columns."""

    rows: list[Row]
    origin: str  # the path, or the Hub name@revision
    fingerprint: str  # sha256 of the rows, independent of the file format and compression
    notes: tuple[str, ...] = ()  # decisions made while the file was read, as sentences
    warnings: tuple[str, ...] = ()  # suspicious contents of the file, as sentences
    dropped: int = 0  # rows that data.exclude left out
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> names of its labels 0, 1, ...
    total: int = 0  # rows before data.train_rows or data.test_rows drew some; 0: none were left out

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


def make_table(rows: list[Row], origin: str) -> Table:
    """Returns a table with its fingerprint. Raises UserError if there are no rows."""
    if not rows:
        raise UserError(f"{origin} contains no rows. Give a file with at least one row.")
    digest = hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        try:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        except RecursionError as fault:
            raise BadRowError(f"{place_of(row, number)} is nested too deeply. Flatten its values.") from fault
    return Table(rows=rows, origin=origin, fingerprint=digest.hexdigest())


def require_columns(table: Table, names: Sequence[str]) -> None:
    """Raises UserError for the first column that the table lacks."""
    for name in names:
        if name not in table.columns:
            separated = Path(table.origin.removesuffix(".gz")).suffix.lower() in (".csv", ".tsv")
            hint = " If the file has no header, name its columns in data.columns, or header of site.toml." * separated
            raise UserError(
                f"{table.origin} has no column {name!r}: {did_you_mean(name, table.columns)}. The columns to read are "
                f"set in [task] and [clients], as --set task.text=COLUMN, and at a site in columns of site.toml.{hint}"
            )
