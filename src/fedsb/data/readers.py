"""Readers of .json, .jsonl, .csv, .tsv and .parquet files, which name the line of a fault.

The fields of a .csv or .tsv stay text, and a row that lacks a column is an error. A .csv may quote its fields; a .tsv
does not, as in GLUE, SNLI and QQP, unless `quoting` is "standard". A .csv whose header has no comma is read with the
semicolon, tab or bar that it has. pyarrow reads parquet; its readers of CSV and JSON infer types and do not give the
line of a row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedsb.data.rows import Row
from fedsb.utils.errors import UserError

Place = str  # the position of a row in its file: "line 3" or "item 3"
Quoting = Literal["auto", "standard", "none"]
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}  # that a .csv may have instead of commas


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """The format of a text file. The defaults follow from its extension."""

    delimiter: str | None = None  # of .csv and .tsv
    quoting: Quoting = "auto"  # of .csv and .tsv
    encoding: str | None = None  # None: UTF-8, with or without a byte order mark
    columns: tuple[str, ...] = ()  # the names of the columns of a .csv or .tsv that has no header


@dataclass(frozen=True)
class OpenedFile:
    """A file that is being read. Readers add notes and warnings."""

    content: bytes
    path: Path
    form: FileFormat
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _decode(file: OpenedFile) -> str:
    """Returns the text of a file. Raises UserError if its encoding is wrong."""
    path, encoding = file.path, file.form.encoding or "utf-8-sig"
    if file.form.encoding is None and file.content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path} is UTF-16 text. Save it as UTF-8, or set data.encoding = 'utf-16'.")
    try:
        codec, marked = codecs.lookup(encoding).name, file.content.startswith(codecs.BOM_UTF8)
        wide = codec.startswith("utf-16")
        if (wide and b"\0" not in file.content) or (marked and not codec.startswith("utf-8")):  # no NUL: no newline
            raise UserError(
                f"{path} is not {encoding} text. data.encoding applies to every file: save all files in one encoding."
            )
        text = file.content.decode("utf-8-sig" if marked else encoding)
    except LookupError as fault:
        raise UserError(
            f"data.encoding = {encoding!r} is not a known encoding. Use a name that Python knows, such as 'utf-8', "
            "'cp1252' or 'utf-16'."
        ) from fault
    except UnicodeError as fault:
        at = f" at byte {fault.start}" if isinstance(fault, UnicodeDecodeError) else ""
        name = file.form.encoding or "UTF-8"
        raise UserError(
            f"{path} is not {name} text{at}. Save it as UTF-8, or set data.encoding to its encoding, such as 'cp1252'."
        ) from fault
    if (at_null := text.find("\0")) >= 0:
        line = text.count("\n", 0, at_null) + 1
        raise UserError(
            f"{path}, line {line}: the file contains a NUL byte. It may be UTF-16 (then set data.encoding = "
            "'utf-16-le' or 'utf-16-be'), or not a text file."
        )
    return text


def _as_row(value: object, path: Path, place: Place) -> Row:
    """Returns a JSON object. Raises UserError for any other value."""
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{path}, {place}: a row must be an object {{...}}, not the {kind} {value!r:.60}.")
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
    """Returns the value of a JSON text. Raises UserError for values that Python or a tokenizer cannot read.

    Raises json.JSONDecodeError for a text that is not JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text or "\\uD" in text:  # half of a surrogate pair is not a character, and no tokenizer reads it
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


def _read_jsonl(file: OpenedFile) -> Iterator[tuple[Place, Row]]:
    path = file.path
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = _parse_json(line, where)
        except json.JSONDecodeError as fault:
            raise UserError(f"{where} is not valid JSON ({fault.msg}, column {fault.colno}): {line:.60}") from fault
        yield f"line {number}", _as_row(value, path, f"line {number}")


def _read_json(file: OpenedFile) -> Iterator[tuple[Place, Row]]:
    path = file.path
    try:
        value = _parse_json(_decode(file), str(path))
    except json.JSONDecodeError as fault:
        hint = " A file with one object per line must be named .jsonl." if fault.msg == "Extra data" else ""
        where = f"{path}, line {fault.lineno}"
        raise UserError(f"{where} is not valid JSON ({fault.msg}, column {fault.colno}).{hint}") from fault
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        raise UserError(
            f"{path} contains an object of objects, as pandas writes it by index or by column. Write a list of rows "
            "instead: df.to_json('rows.jsonl', orient='records', lines=True)."
        )
    if not isinstance(value, list):
        kind = type(value).__name__
        raise UserError(f'{path} contains a value of type {kind}. Write a list of objects, or {{"data": [...]}}.')
    for number, item in enumerate(value, start=1):
        yield f"item {number}", _as_row(item, path, f"item {number}")


def _read_separated(file: OpenedFile, usual: str, quoted: bool) -> Iterator[tuple[Place, Row]]:
    """Reads a file of separated fields. `usual` and `quoted` are the conventions of its extension."""
    path, form, text = file.path, file.form, _decode(file)
    separator = form.delimiter or _separator_of(text, usual, file)
    if form.quoting != "auto":
        quoted = form.quoting == "standard"
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    limit = csv.field_size_limit(sys.maxsize)  # a field may be a whole book; the module's limit is restored below
    begin, long = 0, list[int]()  # the line before the next record; records of several lines
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
                    "Put quotes around a field that contains the separator."
                    if quoted
                    else "Quotes have no meaning in this file. If it quotes its fields, set data.quoting = 'standard'."
                )
                raise UserError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}). {advice}"
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
            f"{path}, line {reader.line_num} cannot be read: {fault}. A quote may be left open since line {begin + 1}. "
            "If the file does not quote its fields, set data.quoting = 'none'."
        ) from fault
    finally:
        csv.field_size_limit(limit)


def _separator_of(text: str, usual: str, file: OpenedFile) -> str:
    """Returns the separator of a file: the usual one, unless the header of a .csv has only a different one."""
    header = text.split("\n", 1)[0]
    other = [mark for mark in SEPARATORS if mark in header]
    if usual != "," or usual in header or file.form.columns or not other:
        return usual
    found = max(other, key=header.count)
    file.notes.append(f"{file.path} is separated by {SEPARATORS[found]} and is read that way.")
    return found


def _swallowed(fields: Sequence[str], separator: str, width: int) -> bool:
    """Returns whether the inner lines of a field are all complete rows, as between two stray quotes."""
    inner = [line.count(separator) for value in fields for line in value.split("\n")[1:-1]]
    return len(inner) >= 2 and width >= 2 and set(inner) == {width - 1}


def _read_parquet(file: OpenedFile) -> Iterator[tuple[Place, Row]]:
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


READERS: dict[str, Callable[[OpenedFile], Iterator[tuple[Place, Row]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": partial(_read_separated, usual=",", quoted=True),
    ".tsv": partial(_read_separated, usual="\t", quoted=False),
    ".parquet": _read_parquet,
}
