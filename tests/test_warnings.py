"""Tests what a run says against itself: in the terminal, the report, the model card and result.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import WORDS, labelled_rows, set_all, write_rows, write_toml
from fedsb.config.load import load_config
from fedsb.data.tasks.base import TaskOptions
from fedsb.data.tasks.classification import Classification
from fedsb.reporting.warnings import counted_rounds, run_warnings
from fedsb.runs.run import federate


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"round": number, "loss": 1.0, "score": 0.5, "cohort": ["a", "b"], "dropped": [], **more}


def manifest(**more: Any) -> dict[str, Any]:
    clients = [{"name": "a", "rows": 1486, "unseen": False}, {"name": "b", "rows": 14, "unseen": False}]
    task = {"metric": "accuracy", "label_names": ["no", "yes"]}
    return {"clients": clients, "task": task, "before": {"majority": 0.4, "majority_of_test": 0.4}, **more}


def texts(*args: Any) -> dict[str, str]:
    return {found["kind"]: found["text"] for found in run_warnings(*args)}


def test_a_good_run_says_nothing() -> None:
    rows = [row(1, confusion=[[3, 1], [0, 4]]), row(2, loss=0.4, confusion=[[3, 1], [0, 4]])]
    assert run_warnings(manifest(), rows) == []
    assert run_warnings({}, [row(1, score=None, loss=None)]) == []


def test_a_client_that_never_counted_is_named_with_its_share_of_the_rows() -> None:
    gone = {"client": "a", "reason": "its change is too large"}
    rows = [row(1, dropped=[gone]), row(2, dropped=[gone])]
    text = texts(manifest(), rows)["never_counted"]
    assert text == (
        "The updates of 1 of 2 clients (a) were dropped in every round. 1,486 of 1,500 training rows (99%) did not "
        "change the model. Reason for a: its change is too large"
    )
    assert counted_rounds(rows, "a") == 0 and counted_rounds(rows, "b") == 2
    assert "never_counted" not in texts(manifest(), [row(1, dropped=[gone]), row(2)])  # it counted once
    assert "never_counted" not in texts(manifest(), [row(1, cohort=["b"])])  # it was never called


def test_one_class_for_all_rows() -> None:
    text = texts(manifest(), [row(1, confusion=[[0, 3], [0, 5]])])["one_class"]
    assert text.startswith("The model predicts the class 'yes' for all 8 test rows.")
    assert "All test rows have the class 'yes'" in texts(manifest(), [row(1, confusion=[[0, 0], [0, 5]])])["one_class"]
    assert "one_class" not in texts(manifest(), [row(1, confusion=[[1, 2], [0, 5]])])
    named = manifest(task={"metric": "accuracy", "label_names": ["0", "1"], "class_names": ["no", "yes"]})
    text = texts(named, [row(1, confusion=[[0, 3], [0, 5]])])["one_class"]
    assert text.startswith("The model predicts the class 'yes' for all 8 test rows.")


def test_a_score_that_one_class_reaches_too() -> None:
    """MRPC: an F1 of 81.2 % is that of always saying yes, although the majority of train says less."""
    found = manifest(before={"majority": 0.4, "majority_of_test": 0.5})
    assert "is not above 0.5000" in texts(found, [row(1)])["not_above_majority"]
    assert "not_above_majority" not in texts(found, [row(1, score=0.51)])
    assert "not_above_majority" not in texts(manifest(before={"majority": None}), [row(1)])


def test_a_loss_that_rose() -> None:
    assert "rose from 1 in the first round to 8e+05" in texts(manifest(), [row(1), row(2, loss=8e5)])["loss_rose"]
    assert "loss_rose" not in texts(manifest(), [row(1), row(2, loss=1.04)])


def test_the_best_guess_and_the_confusion_of_a_task() -> None:
    task = Classification(tokenizer=None, options=TaskOptions(metric="f1"), max_tokens=8)
    task.label_names = ["0", "1"]
    examples: list[Any] = [{"labels": label} for label in (1, 1, 0)]
    assert task.best_guess(examples) == pytest.approx(0.8)  # F1 of always 1: precision 2/3, recall 1
    scored = [(torch_like([1, 1, 0]), torch_like([1, 0, 0]))]
    assert task.confusion(scored) == [[1, 1], [0, 1]]  # rows are the true classes
    task.label_names = [str(i) for i in range(51)]
    assert task.confusion(scored) is None


def torch_like(values: list[float]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float64)


# --- through whole runs ---


def test_unequal_clients_with_epochs_all_count(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """A client with most of the rows takes most of the steps, and moves further than the others: it is not an "
    "outlier."""
    draw = np.random.default_rng(0)
    sizes = {"large": 360, "small": 4, "other": 4}
    rows = [
        {"text": " ".join(draw.choice(WORDS, size=6)), "label": ("red", "blue")[i % 2], "client": name}
        for name, count in sizes.items()
        for i in range(count)
    ]
    config = set_all(
        tiny_config,
        data={"train": str(write_rows(tmp_path / "rows.jsonl", rows))},
        clients={"partition": "column", "column": "client"},
        train={"local_epochs": 1, "local_steps": None, "batch_size": 4, "lr": 0.02, "head_lr": 0.02},
        server={"max_norm_ratio": 5.0},
    )
    result = federate(load_config(config))
    found = json.loads((result.folder / "result.json").read_text())
    assert {client["name"]: client["counted"] for client in found["clients"]} == dict.fromkeys(sizes, 3)
    assert "never_counted" not in {warning["kind"] for warning in found["warnings"]}


def test_a_run_that_learned_nothing_says_so_everywhere(
    tiny_config: dict[str, Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    rows = labelled_rows(200, 3)
    skewed = [row for i, row in enumerate(rows) if row["label"] == "red" or i % 20 == 0]
    config = set_all(
        tiny_config,
        data={"train": str(write_rows(tmp_path / "rows.jsonl", skewed)), "test": tiny_config["data"]["test"]},
        train={"local_steps": 3, "batch_size": 4, "lr": 1e-9, "head_lr": 0.05},
    )
    said = cli("run", write_toml(tmp_path / "my.toml", config))
    assert said.code == 0 and "warning         The model predicts the class" in said.out
    folder = Path(config["out"]) / "tiny"
    kinds = {warning["kind"] for warning in json.loads((folder / "result.json").read_text())["warnings"]}
    assert {"one_class", "not_above_majority"} <= kinds
    text = "It has not learned to distinguish the classes"
    assert text in (folder / "report.html").read_text() and text in (folder / "adapter" / "README.md").read_text()
    assert "Confusion matrix" in (folder / "report.html").read_text()


def test_a_learning_rate_that_is_far_too_high_says_so(tiny_config: dict[str, Any]) -> None:
    config = set_all(tiny_config, train={"local_steps": 3, "batch_size": 4, "lr": 1e3, "head_lr": 1e3})
    result = federate(load_config(config))
    found = json.loads((result.folder / "result.json").read_text())
    assert "loss_rose" in {warning["kind"] for warning in found["warnings"]}
