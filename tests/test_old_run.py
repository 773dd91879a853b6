"""A run directory of version 0.1, with old setting names in its manifest, is still scored, exported and reported.

tests/fixtures/run_0_1 was written by version 0.1 at commit a1250e3, with the tiny configuration of conftest.py, 2
rounds, rank 2 and 2 clients per round. Its model and data are those of conftest.py, in the current folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fedsb
from conftest import Said

OLD = Path(__file__).parent / "fixtures" / "run_0_1"


@pytest.fixture
def run(tiny_bert: Path, tables: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bert, "tiny-bert")
    shutil.copy(tables[0], "train.jsonl")
    shutil.copy(tables[1], "test.jsonl")
    return Path(shutil.copytree(OLD, Path("runs") / "old"))


def test_the_fixture_has_the_old_names() -> None:
    assert "max_tokens" in json.loads((OLD / "manifest.json").read_text())["config"]["model"]
    assert "beside" in json.loads((OLD / "result.json").read_text())


def test_eval(cli: Callable[..., Said], run: Path) -> None:
    said = cli("eval", run, "--json")
    assert (said.code, said.err) == (0, "")
    found, result = json.loads(said.out), json.loads((run / "result.json").read_text())
    assert found["accuracy"] == result["score"] and found["f1"] == pytest.approx(result["beside"]["f1"])


def test_predict(cli: Callable[..., Said], run: Path) -> None:
    said = cli("predict", run, "--data", "test.jsonl", "--json")
    assert (said.code, said.err) == (0, "")
    assert len(said.out.splitlines()) == 40


@pytest.mark.parametrize("more", [[], ["--merged"]])
def test_export(cli: Callable[..., Said], run: Path, more: list[str]) -> None:
    said = cli("export", run, "--to", "copy", *more)
    assert (said.code, said.err) == (0, "")
    assert list(Path("copy").glob("*.safetensors"))


def test_report(cli: Callable[..., Said], run: Path) -> None:
    said = cli("report", run)
    assert (said.code, said.err) == (0, "")
    assert "old: finished" in said.out and "fedit (rank 1)" in said.out
    assert "f1 16.4\N{NO-BREAK SPACE}%, matthews 0" in (run / "report.html").read_text()
    assert fedsb.summary(run)["extra_metrics"].keys() == {"f1", "matthews"}


def test_check_uses_its_settings_without_notices(cli: Callable[..., Said], run: Path) -> None:
    said = cli("check", run)
    assert (said.code, said.err) == (0, "") and "bytes" in said.out
