"""`data.drop` leaves rows out, `data.classes` says how many classes there must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import labelled_rows, set_all, write_rows
from fedsb.config import load_config
from fedsb.data.sites import open_data
from fedsb.errors import UserError
from fedsb.models.load import load_tokenizer


def opened(config: dict[str, Any]) -> Any:
    settings = load_config(config).config
    return open_data(settings, load_tokenizer(settings.model))


def test_rows_without_a_class_are_left_out(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """As SNLI's -1, in train and in test."""
    numbers = {"red": 0, "blue": 1, "green": 2}
    rows = [{**row, "label": numbers[row["label"]]} for row in labelled_rows(60, 0)]
    rows[3]["label"] = rows[9]["label"] = -1
    data = {"train": str(write_rows(tmp_path / "a.jsonl", rows)), "test": str(write_rows(tmp_path / "b.jsonl", rows))}
    config = set_all(tiny_config, data={**data, "drop": {"label": -1}, "classes": 3})
    found = opened(config)
    assert found.task.label_names == ["0", "1", "2"]
    assert found.tables["train"]["rows"] == found.tables["test"]["rows"] == 58
    whole = opened(set_all(config, data=data))
    assert whole.task.label_names == ["-1", "0", "1", "2"] and whole.tables["train"]["rows"] == 60
    assert whole.tables["train"]["fingerprint"] != found.tables["train"]["fingerprint"]
    with pytest.raises(UserError, match=r"data.classes = 3, but the rows have 4: -1, 0, 1, 2.*data.drop"):
        opened(set_all(config, data={**data, "classes": 3}))


def test_a_column_that_is_not_there_and_nothing_left(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="has no column 'labell'"):
        opened(set_all(tiny_config, data={**tiny_config["data"], "drop": {"labell": "red"}}))
    with pytest.raises(UserError, match="two classes are needed"):
        opened(
            set_all(
                tiny_config, data={"train": tiny_config["data"]["train"], "drop": {"label": "red"}, "train_rows": 1}
            )
        )
