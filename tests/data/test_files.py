"""Files as they come from other tools: quotes in .tsv, other separators, torn or odd content."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedsb.data.readers import FileFormat
from fedsb.data.rows import place_of
from fedsb.data.sources import load_table
from fedsb.utils.errors import UserError


def test_a_quote_in_a_tsv_is_text(tmp_path: Path) -> None:
    """As in GLUE, SNLI and QQP: no cell is quoted, and a cell may begin or end with a quote."""
    lines = [f"{i}\ttext {i}\tlabel {i % 2}" for i in range(24)]
    lines[2], lines[8] = '2\t"so he said\tlabel 0', '8\tand left"\tlabel 0'
    (tmp_path / "rows.tsv").write_text("id\ttext\tlabel\n" + "\n".join(lines) + "\n")
    table = load_table(str(tmp_path / "rows.tsv"))
    assert len(table.rows) == 24
    assert (table.rows[2]["text"], table.rows[8]["text"]) == ('"so he said', 'and left"')
    assert table.rows[8]["label"] == "label 0"


def test_a_tsv_that_is_quoted_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"a\tb"\tx\n')
    with pytest.raises(UserError, match=r"line 2: 3 fields, .* set data.quoting = 'standard'"):
        load_table(str(path))
    assert load_table(str(path), form=FileFormat(quoting="standard")).rows == [{"text": "a\tb", "label": "x"}]


def test_rows_that_a_stray_quote_swallows_are_announced(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"text {i},label {i % 2}" for i in range(24)]
    lines[3], lines[9] = '"so he said,label 1', 'and left",label 1'
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    table = load_table(str(path))
    assert len(table.rows) == 18
    assert "line 5: a quoted field continues to line 11, over lines that look like rows" in table.warnings[0]
    assert len(load_table(str(path), form=FileFormat(quoting="none")).rows) == 24
    path.write_text('text,label\n"a letter,\nof two\nlines",x\nb,y\n')  # a field that is meant so
    table = load_table(str(path))
    assert (len(table.rows), table.warnings) == (2, ())
    assert "fields of 1 rows span several lines, first in line 2" in table.notes[0]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_csv_with_another_separator(tmp_path: Path, mark: str, name: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'text{mark}label\n"one{mark} two, three"{mark}a\nfour{mark}b\n')
    table = load_table(str(path))
    assert table.rows == [{"text": f"one{mark} two, three", "label": "a"}, {"text": "four", "label": "b"}]
    assert f"is separated by {name}" in table.notes[0]


def test_a_file_without_a_header_and_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("café#a\nthé#b\n".encode("cp1252"))
    form = FileFormat(delimiter="#", encoding="cp1252", columns=("text", "label"))
    table = load_table(str(path), form=form)
    assert table.rows == [{"text": "café", "label": "a"}, {"text": "thé", "label": "b"}]
    assert place_of(table.rows[1], 0) == f"{path}, line 2"
    path.write_text("text#label\nthe#b\n")
    with pytest.raises(UserError, match=r"line 1 is a header, the same as data.columns"):
        load_table(str(path), form=form)
    with pytest.raises(UserError, match=r"data.encoding = 'latin-x' is not a known encoding"):
        load_table(str(path), form=FileFormat(encoding="latin-x"))


@pytest.mark.parametrize("encoding", ["utf-16", "UTF-16-le", "utf_16_be"])
def test_a_file_that_is_not_in_the_encoding_of_the_others(tmp_path: Path, encoding: str) -> None:
    """Pairs of bytes of a UTF-8 file are characters of UTF-16: the file would be one line of Chinese."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\none,a\ntwo,bb\n")
    with pytest.raises(UserError, match=rf"rows.csv is not {encoding} text. data.encoding applies to every file"):
        load_table(str(path), form=FileFormat(encoding=encoding))
    path.write_text("text,label\nthé,a\n", encoding=encoding)
    assert load_table(str(path), form=FileFormat(encoding=encoding)).rows == [{"text": "thé", "label": "a"}]


def test_a_byte_order_mark_is_never_part_of_a_column_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nthé,a\n", encoding="utf-8-sig")
    for encoding in (None, "utf-8", "UTF8", "utf-8-sig"):
        assert load_table(str(path), form=FileFormat(encoding=encoding)).columns == ["text", "label"]
    for encoding in ("cp1252", "utf-16"):
        with pytest.raises(UserError, match=rf"rows.csv is not {encoding} text"):
            load_table(str(path), form=FileFormat(encoding=encoding))


def test_a_row_knows_its_place(tmp_path: Path) -> None:
    """Empty lines and lines inside a field count."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "rows.csv").write_text('text,label\n"a\nb",x\n\nc,y\n')
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": "b"}]')
    for name, places in (
        ("rows.jsonl", ["line 1", "line 3"]),
        ("rows.csv", ["line 2", "line 5"]),
        ("rows.json", ["item 1", "item 2"]),
    ):
        rows = load_table(str(tmp_path / name)).rows
        assert [place_of(row | {"more": 1}, 0) for row in rows] == [f"{tmp_path / name}, {place}" for place in places]


def torn_gzip() -> bytes:
    """Valid at its beginning; then bytes that no deflate stream has."""
    packed = bytearray(gzip.compress(b'{"text": "a"}\n' * 200))
    packed[10:30] = b"\xff" * 20
    return bytes(packed)


def parquet(**columns: object) -> bytes:
    import io

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
FAULTS = {
    "half a surrogate pair": (
        "rows.jsonl",
        b'{"text": "a"}\n{"text": "b\\ud83d c"}',
        "line 2: the text contains \\ud83d",
    ),
    "half a pair in a list": ("rows.json", b'[{"text": "b\\uD83D c"}]', "the text contains \\ud83d"),
    "a large integer": (
        "rows.jsonl",
        b'{"text": ' + b"1" * 5000 + b"}",
        "line 1: an integer has more than 4,300 digits",
    ),
    "a large integer in a list": ("rows.json", b'[{"text": ' + b"1" * 5000 + b"}]", "an integer has more than 4,300"),
    "deep": ("rows.jsonl", DEEP.encode(), "line 1: the JSON is nested too deeply"),
    "deep in a list": ("rows.json", f"[{DEEP}]".encode(), "the JSON is nested too deeply"),
    "a key twice": ("rows.jsonl", b'{"text": 1}\n{"text": 1, "text": 2}', "line 2: the key 'text' occurs twice"),
    "corrupt gzip": ("rows.jsonl.gz", torn_gzip(), "cannot be read"),
    "utf-16": ("rows.csv", "text\ncafé\n".encode("utf-16"), "is UTF-16 text. Save it as UTF-8, or set data.encoding"),
    "utf-16 without a mark": ("rows.csv", "text\ncafe\n".encode("utf-16-le"), "line 1: the file contains a NUL byte"),
    "a NUL byte": ("rows.tsv", b"text\na\nb\0c\n", "line 3: the file contains a NUL byte"),
    "by index": ("rows.json", b'{"0": {"text": "a"}, "1": {"text": "b"}}', "orient='records', lines=True"),
    "by column": ("rows.json", b'{"text": {"0": "a", "1": "b"}}', "orient='records', lines=True"),
    "two empty names": ("rows.csv", b",,text\n1,2,a\n", "the header names a column twice: '', '', 'text'"),
    "parquet, bad text": (
        "rows.parquet",
        parquet(text=pyarrow.array([b"a\xff"]).view(pyarrow.string())),
        "contains a value that cannot be read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_says_where(tmp_path: Path, fault: str) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_table(str(tmp_path / name))
    assert message in str(raised.value) and name in str(raised.value)


def test_whole_pairs_and_large_numbers_are_read(tmp_path: Path) -> None:
    row = {"text": "\U0001f600", "note": 10**4000, "nan": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert load_table(str(tmp_path / "rows.jsonl")).rows == [row]


def test_parquet_with_two_columns_of_a_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet is not a readable parquet file"):
        load_table(str(tmp_path / "rows.parquet"))
