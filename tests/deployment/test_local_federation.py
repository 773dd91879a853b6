"""`fedsb run --engine flower`: every client in a process of its own, over TLS, makes the adapter of a run in one
process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Said, adapter_bytes, set_all, write_toml
from fedsb.deployment.join_file import read_join_file
from fedsb.reporting.run_directory import read_rows


def test_real_processes_make_the_same_adapter(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    config = set_all(tiny_config, rounds=2, server={"clients_per_round": 2}, engine={"clients_per_forward": 1})
    path = write_toml(tmp_path / "my.toml", config)
    assert cli("run", path).code == 0
    said = cli("run", path, "--engine", "flower")
    assert said.code == 0, said.err
    here, federation = tmp_path / "runs" / "tiny", tmp_path / "runs" / "tiny-federation"
    there = federation / "coordinator" / "runs" / "tiny"
    assert adapter_bytes(there) == adapter_bytes(here)
    for join in (federation / "coordinator" / "joins").iterdir():
        assert read_join_file(join).node_key == ""  # sites made their own keys
    for name in ("site 0", "site 1", "site 2"):
        left = [row["what"] for row in read_rows(federation / "sites" / name / "outbox.jsonl")]
        assert left[:3] == ["describe", "prepare", "start"]
        assert left[-1] == "finish"
    assert json.loads((there / "result.json").read_text())["score"] is not None
    assert "already exists" in cli("run", path, "--engine", "flower").err
