"""An engine on a tiny model, and the dense model that it must agree with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedsb.channels.in_process import EmbeddedEngine
from fedsb.config.load import load_config
from fedsb.config.schema import method_of
from fedsb.data.tasks.base import Example
from fedsb.methods.base import State
from fedsb.training.joint import Member


def open_engine(config: dict[str, Any]) -> EmbeddedEngine:
    settings = load_config(config).config
    return EmbeddedEngine(settings, method_of(settings), "test")


def started(config: dict[str, Any]) -> tuple[EmbeddedEngine, State]:
    engine = open_engine(config)
    basis, _ = engine.build_basis(engine.method)
    return engine, engine.method.start(engine.shapes, basis, engine.head, engine.config.seed)


def members_of(engine: EmbeddedEngine, state: State, rows: Sequence[int] | None = None) -> list[Member]:
    """Every site as a member, with its first `rows` examples."""
    return [
        Member(
            name=site.name,
            examples=site.train if rows is None else site.train[: rows[k]],
            tensors=engine.method.model(state),
        )
        for k, site in enumerate(engine.sites)
    ]


def dense_gradients(engine: EmbeddedEngine, examples: Sequence[Example]) -> dict[str, Tensor]:
    """dL/dW (m, n) of every adapted layer, by autograd on the plain model, of the loss summed over the examples."""
    plain = AutoModelForSequenceClassification.from_pretrained(engine.base.name, num_labels=3).eval()
    plain.requires_grad_(False)
    plain.classifier.weight.copy_(engine.head["classifier.weight"])
    plain.classifier.bias.copy_(engine.head["classifier.bias"])
    for layer in engine.shapes:
        plain.get_submodule(layer).weight.requires_grad_()
    for example in examples:
        batch = dict(engine.task.collate([example]))
        labels = batch.pop("labels")
        nn.functional.cross_entropy(plain(**batch).logits, labels).backward()
    return {layer: plain.get_submodule(layer).weight.grad for layer in engine.shapes}


def added(gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([g[key] for g in gradients]).sum(0) for key in gradients[0]}
