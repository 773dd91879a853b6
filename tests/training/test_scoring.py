"""The forward of a batch, and the batches in which rows are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import set_all
from fedsb.training import scoring
from fedsb.training.scoring import batches_by_length, forward, measured
from fedsb.training.trainer import Trainer
from support.server import open_server


@pytest.fixture
def trainer(tiny_config: dict[str, Any], tiny_llama: Path) -> Trainer:
    return open_server(causal(tiny_config, tiny_llama)).trainer


def causal(config: dict[str, Any], model: Path, **more: Any) -> dict[str, Any]:
    return set_all(config, model={"name": str(model), "max_seq_length": 16, **more}, task={"kind": "text"})


def loaded(trainer: Trainer) -> tuple[nn.Module, list[Any]]:
    trainer._load_one(trainer.method.model(trainer.start_state(trainer.data_free_basis(0))))
    return trainer.adapted.model, [trainer.task.made_up(tokens, torch_free(tokens)) for tokens in (3, 9, 16, 5, 9)]


def torch_free(seed: int) -> Any:
    from fedsb.utils.rng import keyed_generator

    return keyed_generator(seed, "rows")


@torch.no_grad()
def test_only_logits_of_targets_are_computed(trainer: Trainer) -> None:
    model, rows = loaded(trainer)
    rows[1]["labels"][:7] = [-100] * 7  # only read
    seen: list[int] = []
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tap = head.register_forward_hook(lambda _, args, y: seen.append(y.numel() // y.shape[-1]))
    logits, batch = forward(model, trainer.task, rows)
    whole, same = forward(model, trainer.task, rows, whole=True)
    tap.remove()
    targets = sum(map(trainer.task.weight, rows))
    assert seen == [targets, 5 * 16]
    assert logits.shape == (targets, whole.shape[-1])
    assert torch.allclose(logits, whole.flatten(0, 1)[batch["targets"] - 1], atol=1e-6)
    assert torch.allclose(trainer.task.losses(logits, batch)[0], trainer.task.losses(whole, same)[0], atol=1e-5)


def test_a_forward_that_scores_has_a_bound_on_its_logits(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = loaded(trainer)
    expected = measured(model, trainer.task, rows, 64).figures
    sizes: list[int] = []
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tap = head.register_forward_hook(lambda _, args, y: sizes.append(y.numel()))
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    monkeypatch.setattr(scoring, "LOGIT_VALUES", 12 * vocabulary)
    found = measured(model, trainer.task, rows, 64).figures
    tap.remove()
    assert found == pytest.approx(expected)
    assert sizes == [tokens * vocabulary for tokens in (2 + 4, 8, 8, 15)]  # a longer row has a batch of its own


def test_batches_are_bounded_by_rows_and_by_weight() -> None:
    rows: Any = [{"input_ids": [0] * tokens} for tokens in (5, 1, 4, 2, 3)]
    assert [*batches_by_length(rows, 2)] == [[1, 3], [4, 2], [0]]
    assert [*batches_by_length(rows, 9, (lambda row: len(row["input_ids"]), 6))] == [[1, 3, 4], [2], [0]]
    assert [*batches_by_length([], 2)] == []
