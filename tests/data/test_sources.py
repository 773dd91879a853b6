"""Files of every kind give the same table; every fault names its place."""

import gzip
import json

import datasets
import pytest

from fedsb.data.rows import make_table, require_columns
from fedsb.data.sources import load_table
from fedsb.utils.errors import UserError

ROWS = [{"text": "one", "label": "a"}, {"text": "two, or more", "label": "b"}]
JSONL = "\n".join(json.dumps(row) for row in ROWS)
CSV = 'text,label\none,a\n"two, or more",b\n'


def _parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


CONTENTS = {
    ".jsonl": (JSONL + "\n\n").encode(),
    ".json": json.dumps(ROWS).encode(),
    ".csv": CSV.encode("utf-8-sig"),
    ".tsv": b"text\tlabel\none\ta\ntwo, or more\tb\n",
    ".parquet": _parquet(),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("extension", CONTENTS)
def test_every_format_gives_the_same_table(tmp_path, extension, packed):
    path = tmp_path / f"rows{extension}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(CONTENTS[extension]) if packed else CONTENTS[extension])
    table = load_table(str(path))
    assert table == make_table(ROWS, str(path))
    assert table.columns == ["text", "label"]
    assert len(table.fingerprint) == 64


def test_json_under_data_and_a_fingerprint_of_content(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": ROWS}))
    assert load_table(str(path)).rows == ROWS
    assert make_table(ROWS, "here").fingerprint == make_table(ROWS, "there").fingerprint
    assert make_table(ROWS, "here").fingerprint != make_table(ROWS[:1], "here").fingerprint


def test_a_field_may_be_longer_than_the_csv_module_likes(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"text\n{'a' * 200_000}\n")
    assert len(load_table(str(path)).rows[0]["text"]) == 200_000


FAULTS = {
    "empty": ("rows.jsonl", b"", "is empty"),
    "blank": ("rows.jsonl", b"\n\n", "is empty"),
    "no rows": ("rows.json", b"[]", "contains no rows"),
    "header only": ("rows.csv", b"text,label\n", "contains no rows"),
    "broken line": ("rows.jsonl", b'{"text": 1}\n{"text": \n', "line 2 is not valid JSON"),
    "not a row": ("rows.jsonl", b'{"text": 1}\n[1]\n', "line 2: a row must be an object"),
    "broken json": ("rows.json", b'[{"text": 1},\n{"text": }]', "line 2 is not valid JSON"),
    "jsonl called json": ("rows.json", b'{"a": 1}\n{"a": 2}', "one object per line must be named .jsonl"),
    "not a list": ("rows.json", b"3", "a value of type int"),
    "lacks a column": (
        "rows.jsonl",
        b'{"a": 1, "b": 2}\n\n{"a": 1}',
        "line 3: the row lacks the column 'b' that line 1",
    ),
    "more columns": (
        "rows.json",
        b'[{"a": 1}, {"a": 1, "b": 2}]',
        "item 2: the row has the column 'b' that item 1 lacks",
    ),
    "short csv": ("rows.csv", b"a,b\n1,2\n3\n", "line 3: 1 fields, but the header has 2"),
    "open quote": ("rows.csv", b'a,b\n1,"2\n', "quote may be left open"),
    "twice": ("rows.csv", b"a,a\n1,2\n", "names a column twice"),
    "latin-1": ("rows.csv", "text\ncafé\n".encode("latin-1"), "not UTF-8 text at byte 8"),
    "extension": ("rows.jsnl", b"{}", "did you mean '.json"),
    "torn gz": ("rows.jsonl.gz", gzip.compress(JSONL.encode())[:-9], "cannot be read"),
    "no gz": ("rows.jsonl.gz", JSONL.encode(), "cannot be read"),
    "no parquet": ("rows.parquet", b"PAR1", "not a readable parquet"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused(tmp_path, fault):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_table(str(tmp_path / name))
    assert message in str(raised.value)
    assert name in str(raised.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"There is no file .*trian.jsonl.gz. Did you mean train.jsonl.gz\?"):
        load_table(str(tmp_path / "trian.jsonl.gz"))
    with pytest.raises(UserError, match=r"its folder .* does not exist"):
        load_table(str(tmp_path / "no" / "train.jsonl"))
    with pytest.raises(UserError, match=r"is a folder\. Name one file in it"):
        load_table(str(tmp_path))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        load_table(str(tmp_path / "folder.csv"))


def test_hub_options_do_not_fit_a_file(tmp_path):
    with pytest.raises(UserError, match="revision = 'main' is for Hub data sets"):
        load_table("rows.csv", revision="main")


def test_an_unknown_column_is_named_with_the_nearest():
    table = make_table(ROWS, "rows.csv")
    require_columns(table, ["label", "text"])
    with pytest.raises(UserError, match=r"rows.csv has no column 'txt': did you mean 'text'\? There are: label, text"):
        require_columns(table, ["label", "txt"])


@pytest.mark.parametrize(("name", "hint"), [("rows.csv.gz", True), ("rows.tsv", True), ("rows.json", False)])
def test_a_missing_column_may_be_a_missing_header(name: str, hint: bool) -> None:
    with pytest.raises(UserError, match="has no column 'text'") as raised:
        require_columns(make_table([{"2": "3", "How far is it?": "How much?"}], name), ["text"])
    assert ("If the file has no header, name its columns in data.columns" in str(raised.value)) is hint


def test_no_network_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as raised:
        load_table("hub:no-such-owner/no-such-data", revision="abc")
    for part in ("no-such-owner/no-such-data", "HF_HUB_OFFLINE", "HF_HOME", "--set data.train=PATH"):
        assert part in str(raised.value)


def test_the_hub_gets_name_config_revision_and_split(tmp_path, monkeypatch):
    """The real `load_dataset`, over a local folder in the Hub's place."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "train.jsonl").write_text(JSONL)
    monkeypatch.chdir(tmp_path)
    real, asked = datasets.load_dataset, []

    def from_folder(name, config, *, revision, split):
        asked.append((name, config, revision, split))
        return real("store", data_files={"train": "train.jsonl"}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    table = load_table("hub:me/data:main", revision="v1")
    assert (table.rows, table.origin) == (ROWS, "me/data:main@v1")
    assert asked == [("me/data", "main", "v1", "train")]
    with pytest.raises(UserError, match=r"split 'nope' cannot be loaded: .*\['train'\]"):
        load_table("hub:me/data", split="nope")


def test_a_hub_name_has_an_owner_and_no_folder_in_its_way(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Write hub:owner/name"):
        load_table("hub:gsm8k")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "data").mkdir(parents=True)
    with pytest.raises(UserError, match="the folder me/data in this directory hides"):
        load_table("hub:me/data")
