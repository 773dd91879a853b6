"""What a coordinator is told of a site whose rows cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.in_process import Federation
from fedsb.config import load_config
from fedsb.errors import RunError
from fedsb.run import federate
from laws.test_engines import federation, remote_of


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "site 1: .*rows.jsonl is empty"),
        ([{"note": "red1", "label": "red"}], "site 1: .*has no column 'text'"),
        ([{"text": "", "label": "red"}, {"text": " ", "label": "blue"}], "rows have no text that the tokenizer reads"),
        ([{"text": "red1", "label": None}], "site 1: refused: row 1 has the label None"),
    ],
)
def test_rows_that_cannot_be_used(
    rows: list[dict[str, Any]], said: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    own = {**federation(tmp_path).rows, "site 1": rows}
    with pytest.raises(RunError, match=said):
        federate(load_config(remote_of(tiny_config, {})), open_engine=Federation(tmp_path / "bad", own).open_engine)
