"""What a site, and what a coordinator, is told of a site's rows that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from conftest import adapter_bytes
from fedsb.client.policy import SiteConfig
from fedsb.config.load import load_config
from fedsb.runs.run import federate
from fedsb.utils.errors import RunError
from laws.test_channels import federation, remote_of
from support.sites import Federation


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
        federate(
            load_config(remote_of(tiny_config, {})), open_federation=Federation(tmp_path / "bad", own).open_federation
        )
    reason = str(told.value).splitlines()[1].strip()
    assert reason == "site 1: refused: the site's data or settings do not fit this run (the site's log has the reason)"
    assert re.search(said, capsys.readouterr().out)


def test_a_sites_own_file_format(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """A headerless file of another encoding and separator gives the adapter that the same rows give as .jsonl."""
    sites = federation(tmp_path)
    plain = federate(load_config(remote_of(tiny_config, {"rounds": 1})), open_federation=sites.open_federation).folder
    own = Federation(tmp_path / "own", sites.rows)
    for name, rows in sites.rows.items():
        lines = [f"{row['text']};{row['label']};{row['client']}\n" for row in rows]
        (tmp_path / "own" / name / "rows.csv").write_bytes("".join(lines).encode("utf-16"))
    form = {"delimiter": ";", "encoding": "utf-16", "header": ["text", "label", "client"]}
    for name, handle in own.channel.handles.items():
        data = {"data": str(tmp_path / "own" / name / "rows.csv"), **form}
        handle.settings = SiteConfig.model_validate(data)
    config = remote_of(tiny_config, {"rounds": 1, "out": str(tmp_path / "other")})
    assert adapter_bytes(federate(load_config(config), open_federation=own.open_federation).folder) == adapter_bytes(
        plain
    )
