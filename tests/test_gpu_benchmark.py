"""The prepared benchmark of a GPU, tried on a small model: every row runs, and the time limit and memory skip rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(FOLDER))

from run import STEPS, Recorder  # noqa: E402


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(torch.device("cpu"), time.monotonic() + 60, lambda rows: None)


def test_a_row_is_skipped_fails_or_is_measured(recorder: Recorder) -> None:
    def too_large() -> dict[str, Any]:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ..."
        )

    def wrong() -> Any:
        raise RuntimeError("a shape\nand its details")

    said = "CUDA out of memory. Tried to allocate 20.00 GiB"
    assert recorder.row({"what": "a"}, too_large)["skipped"] == said
    assert recorder.row({"what": "b"}, wrong)["failed"] == "RuntimeError: a shape"
    assert recorder.row({"what": "c"}, lambda: {"step_seconds": 1.0})["step_seconds"] == 1.0
    recorder.ends = time.monotonic()
    assert recorder.row({"what": "d"}, lambda: {"step_seconds": 1.0})["skipped"] == "no time was left"
    recorder.part("1B", wrong)
    assert [row["what"] for row in recorder.rows] == ["a", "b", "c", "d", "part"]
    assert recorder.rows[-1]["failed"] == "RuntimeError: a shape"


def test_steps_end_by_their_count_and_by_the_limit(recorder: Recorder) -> None:
    def endless(stamp: Any) -> None:
        while True:
            stamp()

    assert recorder.timed(endless, 1, 64)["steps"] == STEPS
    recorder.ends = time.monotonic()
    assert recorder.timed(endless, 1, 64) == {"skipped": "no time was left for a step"}


@pytest.mark.long
@pytest.mark.parametrize("device", ["cpu", "pretend"])
def test_every_row_runs_on_a_small_model(device: str) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--tiny", "--device", device]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    kinds = {"base", "step", "private step", "same seed twice", "generation", "4-bit base"}
    assert {row["what"] for row in rows} == kinds
    assert {row["what"] for row in rows if "skipped" in row} == ({"4-bit base"} if device == "pretend" else set())
    assert all("step_seconds" in row for row in rows if row["what"] in ("step", "private step"))
