"""`data.exclude` leaves rows out, `data.classes` says how many classes there must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import labelled_rows, set_all, write_rows
from fedsb.config.load import load_config
from fedsb.data.clients import open_data, rows_by_client
from fedsb.models.tokenizer import load_tokenizer
from fedsb.utils.errors import UserError


def opened(config: dict[str, Any]) -> Any:
    settings = load_config(config).config
    return open_data(settings, load_tokenizer(settings.model))


def test_rows_without_a_class_are_left_out(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """As SNLI's -1, in train and in test."""
    numbers = {"red": 0, "blue": 1, "green": 2}
    rows = [{**row, "label": numbers[row["label"]]} for row in labelled_rows(60, 0)]
    rows[3]["label"] = rows[9]["label"] = -1
    data = {"train": str(write_rows(tmp_path / "a.jsonl", rows)), "test": str(write_rows(tmp_path / "b.jsonl", rows))}
    config = set_all(tiny_config, data={**data, "exclude": {"label": -1}, "classes": 3})
    found = opened(config)
    assert found.task.label_names == ["0", "1", "2"]
    assert found.tables["train"]["rows"] == found.tables["test"]["rows"] == 58
    whole = opened(set_all(config, data=data))
    assert whole.task.label_names == ["-1", "0", "1", "2"] and whole.tables["train"]["rows"] == 60
    assert whole.tables["train"]["fingerprint"] != found.tables["train"]["fingerprint"]
    with pytest.raises(UserError, match=r"data.classes = 3, but the rows have 4: -1, 0, 1, 2.*data.exclude"):
        opened(set_all(config, data={**data, "classes": 3}))


def test_a_column_that_is_not_there_and_nothing_left(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="has no column 'labell'"):
        opened(set_all(tiny_config, data={**tiny_config["data"], "exclude": {"labell": "red"}}))
    with pytest.raises(UserError, match="two classes are needed"):
        opened(
            set_all(
                tiny_config, data={"train": tiny_config["data"]["train"], "exclude": {"label": "red"}, "train_rows": 1}
            )
        )


@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_numbers_in_files_of_text_are_dropped_too(tiny_config: dict[str, Any], tmp_path: Path, extension: str) -> None:
    """-1 of a TOML is "-1" in a .csv; no class is made of it, and it is said how many rows there were."""
    mark = "," if extension == "csv" else "\t"
    rows = labelled_rows(60, 0)
    for row in rows[:7]:
        row["label"] = "-1"
    text = "".join(mark.join(row.values()) + "\n" for row in rows)
    train = tmp_path / f"train.{extension}"
    train.write_text(mark.join(rows[0]) + "\n" + text)
    found = opened(set_all(tiny_config, data={"train": str(train), "exclude": {"label": -1}}))
    assert found.task.label_names == ["blue", "green", "red"]
    assert found.tables["train"]["rows"] == 53 and found.card.train.dropped == 7
    assert (
        "53 of train" in found.card.headline()["rows"] and "7 left out by data.exclude" in found.card.headline()["rows"]
    )


@pytest.mark.parametrize(
    ("cells", "value", "left"),
    [
        (["-1", "-1.0", "1"], -1, ["1"]),
        ([-1, 0, 1], "-1", [0, 1]),
        (["True", "false", "x"], True, ["false", "x"]),
        ([True, False], "true", [False]),
        ([None, "", "a"], "", ["a"]),
        (["", "NaN", "a", "b"], ["", "NaN"], ["a", "b"]),
        ([0.5, "0.50", "a"], 0.5, ["a"]),
    ],
)
def test_values_are_compared_as_labels_are(
    tiny_config: dict[str, Any], tmp_path: Path, cells: list[Any], value: Any, left: list[Any]
) -> None:
    rows = [{**row, "note": cell} for row, cell in zip(labelled_rows(60, 0), cells * 10, strict=False)]
    rows += [{**row, "note": "kept"} for row in labelled_rows(60, 0)]
    config = set_all(
        tiny_config,
        data={"train": str(write_rows(tmp_path / "a.jsonl", rows)), "exclude": {"note": value}},
        clients={"partition": "iid", "count": 1},
    )
    settings = load_config(config).config
    ((_, found),) = rows_by_client(settings, load_tokenizer(settings.model))[0].items()
    assert {repr(row["note"]) for row in found} == {repr(cell) for cell in [*left, "kept"]}
    assert opened(config).card.train.dropped == len(rows) - len(found)


def test_a_value_that_no_row_has(tiny_config: dict[str, Any]) -> None:
    data = tiny_config["data"]
    with pytest.raises(UserError, match=r"'rad' in the column 'label', and no row has it: did you mean 'red'\?"):
        opened(set_all(tiny_config, data={**data, "exclude": {"label": "rad"}}))
    with pytest.raises(UserError, match=r"leaves out rows with '-1' in the column 'label', and no row has it"):
        opened(set_all(tiny_config, data={**data, "exclude": {"label": ["red", -1]}}))


def test_a_value_that_the_test_alone_has_is_dropped_there(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [*labelled_rows(20, 1), {"text": "red1", "label": "-1", "client": "x"}]
    data = {**tiny_config["data"], "test": str(write_rows(tmp_path / "test.jsonl", rows)), "exclude": {"label": -1}}
    found = opened(set_all(tiny_config, data=data))
    assert found.card.test.dropped == 1 and len(found.test) == 20
