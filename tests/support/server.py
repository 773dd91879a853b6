"""A server on a tiny model, and the dense model that it must agree with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedsb.adapters.basis import basis_hash
from fedsb.channels.in_process import open_in_process
from fedsb.config.load import load_config
from fedsb.data.tasks.base import Example
from fedsb.methods.base import State
from fedsb.protocol.messages import Train, TrainReply
from fedsb.server.server import Server
from fedsb.training.joint import ClientTraining


def open_server(config: dict[str, Any]) -> Server:
    """A server with its clients in this process, opened but not started."""
    settings = load_config(config).config
    method = settings.method
    return Server(settings, method, "test", open_in_process(settings, method, "test"))


def started(config: dict[str, Any], ledgers: Path | None = None) -> tuple[Server, State]:
    """A server whose clients have started, and the first state; a private run needs a folder for its ledgers."""
    server = open_server(config)
    if ledgers is not None:
        server.policy.open_ledgers(ledgers, "test", new=True)
    server.opened.local_clients.start(server.policy, server.secure_sums, {})
    state, _, _ = server.start()
    return server, state


def members_of(server: Server, state: State, rows: Sequence[int] | None = None) -> list[ClientTraining]:
    """Every client before its training, with its first `rows` examples."""
    return [
        ClientTraining(
            name=client.name,
            examples=client.train if rows is None else client.train[: rows[k]],
            tensors=server.method.model(state),
        )
        for k, client in enumerate(server.clients)
    ]


def train_requests(server: Server, state: State, cohort: Sequence[str], **fields: Any) -> dict[str, Train]:
    """Requests as the server sends them in a round in which nobody missed the last one."""
    view = server.compressor.client_view(server.method, state)
    payload = server.compressor.broadcast(
        server.method, state, view, basis_hash(view.shared), missed_last_round=False, total_rank=None
    )
    one = {"total_rank": None, "state_round": 0, **fields}
    return {name: Train(run=server.run, parts=(payload,), **one) for name in cohort}


def replies_of(server: Server, state: State, cohort: Sequence[str] | None = None) -> dict[str, TrainReply]:
    """The replies of a round."""
    names = list(server.rows) if cohort is None else cohort
    return dict(server.channel.exchange(train_requests(server, state, names)))


def dense_gradients(server: Server, examples: Sequence[Example]) -> dict[str, Tensor]:
    """dL/dW (m, n) of every adapted layer, by autograd on the plain model, of the loss summed over the examples."""
    plain = AutoModelForSequenceClassification.from_pretrained(server.trainer.base.name, num_labels=3).eval()
    plain.requires_grad_(False)
    plain.classifier.weight.copy_(server.trainer.head["classifier.weight"])
    plain.classifier.bias.copy_(server.trainer.head["classifier.bias"])
    for layer in server.trainer.shapes:
        plain.get_submodule(layer).weight.requires_grad_()
    for example in examples:
        batch = dict(server.trainer.task.collate([example]))
        labels = batch.pop("labels")
        nn.functional.cross_entropy(plain(**batch).logits, labels).backward()
    return {layer: plain.get_submodule(layer).weight.grad for layer in server.trainer.shapes}


def added(gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([g[key] for g in gradients]).sum(0) for key in gradients[0]}
