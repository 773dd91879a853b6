"""Scoring a model on tokenised rows: batched, sorted by length, summed in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedsb.data.tasks.base import Batch, Example, Task, ids


def forward(model: nn.Module, task: Task, examples: Sequence[Example]) -> tuple[torch.Tensor, Batch]:
    """(logits, the batch with its labels), on the model's device."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in task.collate(list(examples)).items()}
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits, batch


@torch.no_grad()
def mean_score(model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int) -> float:
    """The task's metric over the examples: total sum over total count."""
    by_length = sorted(range(len(examples)), key=lambda i: len(ids(examples[i], "input_ids")))
    total = count = 0.0
    for start in range(0, len(examples), batch_size):
        chosen = [examples[i] for i in by_length[start : start + batch_size]]
        sums, counts = task.scores(*forward(model, task, chosen))
        total, count = total + float(sums.cpu().double().sum()), count + float(counts.cpu().double().sum())
    return total / count
