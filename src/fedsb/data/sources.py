"""Tables of rows from a local file or from the Hugging Face Hub, each with a fingerprint of what was read.

    data/train.jsonl.gz           .json .jsonl .csv .tsv .parquet, each also with .gz
    hub:owner/name                a data set of the Hub, at a revision, one split
    hub:owner/name:config         one of its configs

Nothing is guessed: the fields of a .csv or .tsv stay text, and a row that lacks a column is an error.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsb.errors import NotAtHandError, UserError, did_you_mean

Row = dict[str, Any]
Place = str  # where a row stands in its file, in words: "line 3" or "item 3"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that all have the same columns."""

    rows: list[Row]
    origin: str  # the path, or the Hub name@revision
    fingerprint: str  # sha256 of the rows, the same whatever the file format or compression

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


def make_table(rows: list[Row], origin: str) -> Table:
    """A table with its fingerprint. Raises UserError where there are no rows."""
    if not rows:
        raise UserError(f"{origin} holds no rows: give a file with at least one")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Table(rows=rows, origin=origin, fingerprint=digest.hexdigest())


def load_table(source: str, *, revision: str | None = None, split: str | None = None) -> Table:
    """The rows of `source`; `revision` and `split` (default "train") belong to Hub names only.

    Raises UserError: a missing, empty or broken file, an unknown extension, a Hub name that cannot be read.
    """
    if source.startswith("hub:"):
        return _load_hub(source, revision, split or "train")
    for option, value in (("revision", revision), ("split", split)):
        if value is not None:
            raise UserError(f"{option} = {value!r} is for Hub data sets, but {source!r} is a file: leave {option} out")
    return _load_file(Path(source).expanduser())


def place_of(source: str, number: int) -> Place:
    """Returns where the row of that number, from 1, stands: "data.csv, line 3"; by its number where that is unknown."""
    path = Path(source).expanduser()
    reader = _READERS.get(Path(path.name.removesuffix(".gz")).suffix.lower())
    if reader is None or not path.is_file():
        return f"{source}, row {number}"
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    places = [place for place, _ in reader(content, path)]
    return f"{source}, {places[number - 1]}"


def require_columns(table: Table, wanted: Sequence[str]) -> None:
    """Raises UserError for the first wanted column that the table lacks."""
    for name in wanted:
        if name not in table.columns:
            raise UserError(
                f"{table.origin} has no column {name!r}: {did_you_mean(name, table.columns)}. The columns that are "
                "read are set in [task] and [clients], as --set task.text=COLUMN, and at a site in columns of site.toml"
            )


def _load_file(path: Path) -> Table:
    extension = Path(path.name.removesuffix(".gz")).suffix.lower()
    if extension not in _READERS:
        near = did_you_mean(extension, _READERS) + ", each also with .gz"
        raise UserError(f"{path}: the extension {extension!r} is not known: {near}; a Hub data set is hub:owner/name")
    if not path.is_file():
        raise _missing(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as fault:  # BadGzipFile is an OSError; EOFError is a torn gz
        raise UserError(f"{path} cannot be read: {fault}. Is it whole, and is it what its extension says?") from fault
    if not content.strip():
        raise UserError(f"{path} is empty: give a file with at least one row")
    return make_table(_same_columns(_READERS[extension](content, path), path), str(path))


def _missing(path: Path) -> UserError:
    """A file of nearly the same name beside it: a misspelling. Else the file may be elsewhere."""
    if path.is_dir():
        return UserError(f"{path} is a folder: name one file in it")
    if not path.parent.is_dir():
        return NotAtHandError(f"there is no file {path}: its folder {path.parent} does not exist either")
    known = [file.name for file in path.parent.iterdir() if file.is_file()]
    if near := difflib.get_close_matches(path.name, known, n=3):
        return UserError(f"there is no file {path}: near it there is {', '.join(near)}")
    return NotAtHandError(f"there is no file {path}: check the path")


def _same_columns(placed: Iterable[tuple[Place, Row]], path: Path) -> list[Row]:
    """The rows, their columns in the order of the first row. Raises UserError at the first row that differs."""
    rows: list[Row] = []
    first: Place = ""
    for place, row in placed:
        if rows and row.keys() != rows[0].keys():
            lacks, more = [sorted(a.keys() - b.keys()) for a, b in ((rows[0], row), (row, rows[0]))]
            said = [f"lacks the column {name!r} that {first} has" for name in lacks]
            said += [f"has the column {name!r} that {first} lacks" for name in more]
            raise UserError(f"{path}, {place}: the row {' and '.join(said)}; give all rows the same columns, or null")
        first = first or place
        rows.append({name: row[name] for name in rows[0]} if rows else row)
    return rows


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is not UTF-8 text at byte {fault.start}: save it as UTF-8") from fault


def _is_row(value: object, path: Path, place: Place) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {place}: a row is an object {{...}}, this is a {type(value).__name__}: {value!r:.60}")
    return value


def _read_jsonl(content: bytes, path: Path) -> Iterator[tuple[Place, Row]]:
    for number, line in enumerate(_decode(content, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as fault:
            where = f"{path}, line {number}"
            raise UserError(f"{where} is not JSON ({fault.msg}, column {fault.colno}): {line:.60}") from fault
        yield f"line {number}", _is_row(value, path, f"line {number}")


def _read_json(content: bytes, path: Path) -> Iterator[tuple[Place, Row]]:
    try:
        value = json.loads(_decode(content, path))
    except json.JSONDecodeError as fault:
        hint = "; one object a line is called .jsonl" if fault.msg == "Extra data" else ""
        raise UserError(f"{path}, line {fault.lineno} is not JSON ({fault.msg}, column {fault.colno}){hint}") from fault
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise UserError(f'{path} holds a {type(value).__name__}: give a list of objects, or {{"data": [...]}}')
    for number, item in enumerate(value, start=1):
        yield f"item {number}", _is_row(item, path, f"item {number}")


def _read_separated(content: bytes, path: Path, separator: str) -> Iterator[tuple[Place, Row]]:
    limit = csv.field_size_limit(sys.maxsize)  # a field may be a whole book; the module's limit is put back below
    try:
        reader = csv.reader(io.StringIO(_decode(content, path), newline=""), delimiter=separator, strict=True)
        header = next(reader)
        if len(set(header)) < len(header):
            raise UserError(f"{path}: the header names a column twice: {', '.join(header)}")
        for fields in reader:
            if len(fields) not in (0, len(header)):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields where the header has {len(header)} "
                    f"({', '.join(header)}); put quotes around a field that holds the separator"
                )
            if fields:
                yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
    except csv.Error as fault:
        raise UserError(f"{path}, line {reader.line_num} cannot be read: {fault}; is a quote left open?") from fault
    finally:
        csv.field_size_limit(limit)


def _read_csv(content: bytes, path: Path) -> Iterator[tuple[Place, Row]]:
    return _read_separated(content, path, ",")


def _read_tsv(content: bytes, path: Path) -> Iterator[tuple[Place, Row]]:
    return _read_separated(content, path, "\t")


def _read_parquet(content: bytes, path: Path) -> Iterator[tuple[Place, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as fault:
        raise UserError(f"{path} is not a readable parquet file: {fault}") from fault
    for number, row in enumerate(rows, start=1):
        yield f"item {number}", row


_READERS: dict[str, Callable[[bytes, Path], Iterator[tuple[Place, Row]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _load_hub(source: str, revision: str | None, split: str) -> Table:
    named = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?", source)
    if named is None:
        raise UserError(f"{source!r} is not a Hub name: write hub:owner/name or hub:owner/name:config")
    name, config = named.groups()
    if Path(name).exists():  # `datasets` would read the folder and we would call it the Hub
        raise UserError(f"{source!r}: the folder {name} here hides the Hub data set: name a file in it, or move")
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, revision=revision, split=split)
    except datasets.exceptions.DatasetNotFoundError as fault:
        if "gated" in str(fault):
            raise NotAtHandError(
                f"{source!r} is gated: accept its terms at https://huggingface.co/datasets/{name}, signed in, then set "
                "HF_TOKEN to a token of that account (or: hf auth login)"
            ) from fault
        raise UserError(
            f"{source!r} is not on the Hub or is private ({fault}): check the name, or set HF_TOKEN (or: hf auth login)"
        ) from fault
    except (ConnectionError, TimeoutError) as fault:
        raise NotAtHandError(
            f"{source!r} cannot be fetched from the Hub ({fault}). Without a network: fill the cache elsewhere, point "
            "HF_HOME at it and set HF_HUB_OFFLINE=1 (unset it to go online); or give a local file: "
            "--set data.train=PATH"
        ) from fault
    except (ValueError, RuntimeError, OSError) as fault:  # an unknown config or split, a data set that needs code
        raise UserError(f"{source!r}, revision {revision!r}, split {split!r} cannot be loaded: {fault}") from fault
    rows: list[Row] = [dict(row) for row in loaded]
    return make_table(rows, f"{name}{f':{config}' if config else ''}@{revision or 'main'}")
