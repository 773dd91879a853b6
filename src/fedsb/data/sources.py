"""Tables of rows from a local file or from the Hugging Face Hub, each with a fingerprint of what was read.

    data/train.jsonl.gz           .json .jsonl .csv .tsv .parquet, each also with .gz
    hub:owner/name                a data set of the Hub, at a revision, one split
    hub:owner/name:config         one of its configs

The fields of a .csv or .tsv stay text, and a row that lacks a column is an error. A .csv may quote its fields; a .tsv
does not, as in GLUE, SNLI and QQP, unless `quoting` is "standard". A .csv whose header has no comma is read with the
semicolon, tab or bar that it has. Each row remembers the file and the line that it comes from.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fedsb.utils.errors import BadRowError, NotAvailableError, UserError, did_you_mean

Row = dict[str, Any]
Place = str  # where a row stands in its file, in words: "line 3" or "item 3"
Quoting = Literal["auto", "standard", "none"]
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}  # that a .csv may have instead of commas


class PlacedRow(dict[str, Any]):
    """A row that knows where it was read, for error messages."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place

    def __or__(self, other: Mapping[str, Any]) -> PlacedRow:  # type: ignore[override]
        return PlacedRow({**self, **other}, self.place)


def place_of(row: Row, number: int) -> str:
    """Returns the file and line of a row, as "train.csv, line 4"; of a row that was made in memory, its number."""
    return row.place if isinstance(row, PlacedRow) else f"row {number}"


def with_values(row: Row, values: Row) -> Row:
    """Returns a row with other columns and the place of `row`."""
    return PlacedRow(values, row.place) if isinstance(row, PlacedRow) else values


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How to read a text file; the defaults follow from its extension."""

    delimiter: str | None = None  # of .csv and .tsv
    quoting: Quoting = "auto"  # of .csv and .tsv
    encoding: str | None = None  # None: UTF-8, with or without a byte order mark
    columns: tuple[str, ...] = ()  # the names of the columns of a .csv or .tsv that has no header


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that all have the same columns."""

    rows: list[Row]
    origin: str  # the path, or the Hub name@revision
    fingerprint: str  # sha256 of the rows, the same whatever the file format or compression
    notes: tuple[str, ...] = ()  # what was decided while the file was read, in sentences
    warnings: tuple[str, ...] = ()  # what looks wrong in the file, in sentences
    dropped: int = 0  # rows that data.exclude left out
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> names of its labels 0, 1, ...
    total: int = 0  # rows before data.train_rows or data.test_rows drew some; 0: all are here

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


def make_table(rows: list[Row], origin: str) -> Table:
    """A table with its fingerprint. Raises UserError where there are no rows."""
    if not rows:
        raise UserError(f"{origin} holds no rows: give a file with at least one")
    digest = hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        try:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        except RecursionError as fault:
            raise BadRowError(f"{place_of(row, number)} is nested too deeply. Flatten its values.") from fault
    return Table(rows=rows, origin=origin, fingerprint=digest.hexdigest())


def load_table(
    source: str, *, revision: str | None = None, split: str | None = None, form: FileFormat | None = None
) -> Table:
    """The rows of `source`; `revision` and `split` (default "train") belong to Hub names only, `form` to files.

    Raises UserError: a missing, empty or broken file, an unknown extension, a Hub name that cannot be read.
    """
    if source.startswith("hub:"):
        return _load_hub(source, revision, split or "train")
    for option, value in (("revision", revision), ("split", split)):
        if value is not None:
            raise UserError(f"{option} = {value!r} is for Hub data sets, but {source!r} is a file: leave {option} out")
    return _load_file(Path(source).expanduser(), form or FileFormat())


def require_columns(table: Table, wanted: Sequence[str]) -> None:
    """Raises UserError for the first wanted column that the table lacks."""
    for name in wanted:
        if name not in table.columns:
            separated = Path(table.origin.removesuffix(".gz")).suffix.lower() in (".csv", ".tsv")
            raise UserError(
                f"{table.origin} has no column {name!r}: {did_you_mean(name, table.columns)}. The columns that are "
                "read are set in [task] and [clients], as --set task.text=COLUMN, and at a site in columns of site.toml"
                + (". If the file has no header, name its columns in data.columns, or header of site.toml" * separated)
            )


def _load_file(path: Path, form: FileFormat) -> Table:
    if path.is_dir():
        raise _missing(path)
    extension = Path(path.name.removesuffix(".gz")).suffix.lower()
    if extension not in _READERS:
        near = did_you_mean(extension, _READERS) + ", each also with .gz"
        raise UserError(f"{path}: the extension {extension!r} is not known: {near}; a Hub data set is hub:owner/name")
    if not path.is_file():
        raise _missing(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as fault:  # BadGzipFile is an OSError; EOFError is a torn gz
        raise UserError(f"{path} cannot be read: {fault}. Is it whole, and is it what its extension says?") from fault
    if not content.strip():
        raise UserError(f"{path} is empty: give a file with at least one row")
    file = _Opened(content, path, form)
    table = make_table(_same_columns(_READERS[extension](file), path), str(path))
    return replace(table, notes=tuple(file.notes), warnings=tuple(file.warnings))


@dataclass(frozen=True)
class _Opened:
    """A file that is being read; readers add what the user should know."""

    content: bytes
    path: Path
    form: FileFormat
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _missing(path: Path) -> UserError:
    """A file of nearly the same name beside it: a misspelling. Else the file may be elsewhere."""
    if path.is_dir():
        return UserError(f"{path} is a folder: name one file in it")
    if not path.parent.is_dir():
        return NotAvailableError(f"there is no file {path}: its folder {path.parent} does not exist either")
    known = [file.name for file in path.parent.iterdir() if file.is_file()]
    if near := difflib.get_close_matches(path.name, known, n=3):
        return UserError(f"there is no file {path}: near it there is {', '.join(near)}")
    return NotAvailableError(f"there is no file {path}: check the path")


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
        values = {name: row[name] for name in rows[0]} if rows else row
        rows.append(PlacedRow(values, f"{path}, {place}"))
    return rows


def _decode(file: _Opened) -> str:
    path, encoding = file.path, file.form.encoding or "utf-8-sig"
    if file.form.encoding is None and file.content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path} is UTF-16 text. Save it as UTF-8, or set data.encoding = 'utf-16'.")
    try:
        codec, marked = codecs.lookup(encoding).name, file.content.startswith(codecs.BOM_UTF8)
        wide = codec.startswith("utf-16")
        if (wide and b"\0" not in file.content) or (marked and not codec.startswith("utf-8")):  # no NUL: no line's end
            raise UserError(
                f"{path} is not {encoding} text. data.encoding applies to every file: save all files in one encoding."
            )
        text = file.content.decode("utf-8-sig" if marked else encoding)
    except LookupError as fault:
        raise UserError(
            f"data.encoding = {encoding!r} is not a known encoding. Use a name that Python knows, as 'utf-8', 'cp1252' "
            "or 'utf-16'."
        ) from fault
    except UnicodeError as fault:
        at = f" at byte {fault.start}" if isinstance(fault, UnicodeDecodeError) else ""
        name = file.form.encoding or "UTF-8"
        raise UserError(
            f"{path} is not {name} text{at}: save it as UTF-8, or set data.encoding to its encoding, as 'cp1252'."
        ) from fault
    if (at_null := text.find("\0")) >= 0:
        line = text.count("\n", 0, at_null) + 1
        raise UserError(
            f"{path}, line {line}: the file contains a NUL byte. It may be UTF-16 (then set data.encoding = "
            "'utf-16-le' or 'utf-16-be'), or not a text file."
        )
    return text


def _is_row(value: object, path: Path, place: Place) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {place}: a row is an object {{...}}, this is a {type(value).__name__}: {value!r:.60}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict. Raises ValueError for a key that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return found


def _parse_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text. Raises UserError for values that Python or a tokenizer cannot take.

    Raises json.JSONDecodeError for what is not JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text or "\\uD" in text:  # half of a surrogate pair is no character, and no tokenizer reads it
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError as fault:
        raise UserError(f"{where}: the JSON is nested too deeply. Flatten its values.") from fault
    except UnicodeEncodeError as fault:
        half = f"\\u{ord(fault.object[fault.start]):04x}"
        raise UserError(
            f"{where}: the text contains {half}, half of a surrogate pair, which is not a character. Write the whole "
            "pair, or remove it."
        ) from fault
    except ValueError as fault:  # a key that occurs twice; an integer of more digits than Python reads
        said = "an integer has more than 4,300 digits" if "digits" in str(fault) else str(fault)
        raise UserError(f"{where}: {said}. Correct the file.") from fault
    return value


def _read_jsonl(file: _Opened) -> Iterator[tuple[Place, Row]]:
    path = file.path
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = _parse_json(line, where)
        except json.JSONDecodeError as fault:
            raise UserError(f"{where} is not JSON ({fault.msg}, column {fault.colno}): {line:.60}") from fault
        yield f"line {number}", _is_row(value, path, f"line {number}")


def _read_json(file: _Opened) -> Iterator[tuple[Place, Row]]:
    path = file.path
    try:
        value = _parse_json(_decode(file), str(path))
    except json.JSONDecodeError as fault:
        hint = "; one object a line is called .jsonl" if fault.msg == "Extra data" else ""
        raise UserError(f"{path}, line {fault.lineno} is not JSON ({fault.msg}, column {fault.colno}){hint}") from fault
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        raise UserError(
            f"{path} contains an object of objects, as pandas writes it by index or by column. Write a list of rows "
            "instead: df.to_json('rows.jsonl', orient='records', lines=True)."
        )
    if not isinstance(value, list):
        raise UserError(f'{path} holds a {type(value).__name__}: give a list of objects, or {{"data": [...]}}')
    for number, item in enumerate(value, start=1):
        yield f"item {number}", _is_row(item, path, f"item {number}")


def _read_separated(file: _Opened, usual: str, quoted: bool) -> Iterator[tuple[Place, Row]]:
    path, form, text = file.path, file.form, _decode(file)
    separator = form.delimiter or _separator_of(text, usual, file)
    if form.quoting != "auto":
        quoted = form.quoting == "standard"
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    limit = csv.field_size_limit(sys.maxsize)  # a field may be a whole book; the module's limit is put back below
    begin, long = 0, list[int]()  # where the next record begins; records of several lines
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, quoting=quoting)
        header = list(form.columns) or next(reader)
        if len(set(header)) < len(header):
            names = ", ".join(map(repr, header))
            raise UserError(
                f"{path}: the header names a column twice: {names}. If the file has no header, name its columns in "
                "data.columns."
            )
        begin = reader.line_num
        for fields in reader:
            line, begin = begin + 1, reader.line_num
            if len(fields) not in (0, len(header)):
                advice = (
                    "put quotes around a field that holds the separator"
                    if quoted
                    else "quotes have no meaning here; if the file quotes its fields, set data.quoting = 'standard'"
                )
                raise UserError(
                    f"{path}, line {line}: {len(fields)} fields where the header has {len(header)} "
                    f"({', '.join(header)}); {advice}"
                )
            if form.columns and fields == header:
                raise UserError(f"{path}, line {line} is a header, the same as data.columns. Leave data.columns out.")
            if begin > line:
                long.append(line)
                if not file.warnings and _swallowed(fields, separator, len(header)):
                    file.warnings.append(
                        f"{path}, line {line}: a quoted field continues to line {begin}, over lines that look like "
                        "rows. If the file does not quote its fields, set data.quoting = 'none'."
                    )
            if fields:
                yield f"line {line}", dict(zip(header, fields, strict=True))
        if long:
            file.notes.append(f"{path}: fields of {len(long):,} rows span several lines, first in line {long[0]}.")
    except csv.Error as fault:
        raise UserError(
            f"{path}, line {reader.line_num} cannot be read: {fault}; is a quote left open (since line {begin + 1})? "
            "If the file does not quote its fields, set data.quoting = 'none'"
        ) from fault
    finally:
        csv.field_size_limit(limit)


def _separator_of(text: str, usual: str, file: _Opened) -> str:
    """Returns the separator of a file: the usual one, unless a .csv has none in its header and has another."""
    header = text.split("\n", 1)[0]
    other = [mark for mark in SEPARATORS if mark in header]
    if usual != "," or usual in header or file.form.columns or not other:
        return usual
    found = max(other, key=header.count)
    file.notes.append(f"{file.path} is separated by {SEPARATORS[found]}, and is read so.")
    return found


def _swallowed(fields: Sequence[str], separator: str, width: int) -> bool:
    """Returns whether the inner lines of a field are all whole rows, as those between two stray quotes."""
    inner = [line.count(separator) for value in fields for line in value.split("\n")[1:-1]]
    return len(inner) >= 2 and width >= 2 and set(inner) == {width - 1}


def _read_csv(file: _Opened) -> Iterator[tuple[Place, Row]]:
    return _read_separated(file, ",", quoted=True)


def _read_tsv(file: _Opened) -> Iterator[tuple[Place, Row]]:
    return _read_separated(file, "\t", quoted=False)


def _read_parquet(file: _Opened) -> Iterator[tuple[Place, Row]]:
    import pyarrow
    import pyarrow.parquet

    path = file.path
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(file.content)).to_pylist()
    except pyarrow.ArrowException as fault:
        raise UserError(f"{path} is not a readable parquet file: {fault}") from fault
    except (ValueError, OverflowError) as fault:  # text that is not UTF-8, a date that Python does not have
        raise UserError(f"{path} contains a value that cannot be read: {fault}. Write it as text.") from fault
    for number, row in enumerate(rows, start=1):
        yield f"item {number}", row


_READERS: dict[str, Callable[[_Opened], Iterator[tuple[Place, Row]]]] = {
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
            raise NotAvailableError(
                f"{source!r} is gated: accept its terms at https://huggingface.co/datasets/{name}, signed in, then set "
                "HF_TOKEN to a token of that account (or: hf auth login)"
            ) from fault
        raise UserError(
            f"{source!r} is not on the Hub or is private ({fault}): check the name, or set HF_TOKEN (or: hf auth login)"
        ) from fault
    except (ConnectionError, TimeoutError) as fault:
        raise NotAvailableError(
            f"{source!r} cannot be fetched from the Hub ({fault}). Without a network: fill the cache elsewhere, point "
            "HF_HOME at it and set HF_HUB_OFFLINE=1 (unset it to go online); or give a local file: "
            "--set data.train=PATH"
        ) from fault
    except (ValueError, RuntimeError, OSError) as fault:  # an unknown config or split, a data set that needs code
        raise UserError(f"{source!r}, revision {revision!r}, split {split!r} cannot be loaded: {fault}") from fault
    origin = f"{name}{f':{config}' if config else ''}@{revision or 'main'}"
    rows: list[Row] = [PlacedRow(row, f"{origin}, row {number}") for number, row in enumerate(loaded, start=1)]
    names = {
        column: tuple(feature.names)
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return replace(make_table(rows, origin), class_names=names)
