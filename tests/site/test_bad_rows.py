"""What a site, and what a coordinator, is told of a site's rows that cannot be used."""

from __future__ import annotations

import re
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
        ([], r"site 1/rows.jsonl is empty"),
        ([{"note": "red1", "label": "red"}], "has no column 'text'"),
        ([{"text": "", "label": "red"}, {"text": " ", "label": "blue"}], "rows have no text that the tokenizer reads"),
        (
            [{"text": "red1", "label": None}],
            r"refused: .*site 1/rows.jsonl, line 1 has the label None in the column 'label'",
        ),
    ],
)
def test_rows_that_cannot_be_used(
    rows: list[dict[str, Any]],
    said: str,
    tiny_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = {**federation(tmp_path).rows, "site 1": rows}
    with pytest.raises(RunError) as told:
        federate(load_config(remote_of(tiny_config, {})), open_engine=Federation(tmp_path / "bad", own).open_engine)
    reason = str(told.value).splitlines()[1].strip()
    assert reason == "site 1: refused: what it has does not fit this run (its own log says more)"
    assert re.search(said, capsys.readouterr().out)
