"""One matrix for all clients: parameters are its views, and made once. Law 13 counts what a step waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import set_all
from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.layout import Layout
from fedsb.methods.base import State
from fedsb.server.server import Server
from fedsb.training.buffers import ClientBuffers
from fedsb.training.joint import join_tensors
from fedsb.training.optimizer import StepSizes, step_rows
from fedsb.training.scoring import forward
from fedsb.utils.tensors import Tensors
from support.server import members_of, started

METHODS = [
    pytest.param({"name": "fed-sb", "rank": 4}, id="fed-sb"),
    pytest.param({"name": "ravan", "rank": 2, "blocks": 2, "tied": True}, id="ravan, tied"),
    pytest.param({"name": "fedit", "rank": 2}, id="fedit"),
    pytest.param({"name": "hetlora", "rank": 4, "gamma": 0.5, "penalty_weight": 0.1}, id="hetlora"),
]


def bound(server: Server, state: State, clients: int) -> tuple[ClientBuffers, dict[str, nn.Parameter]]:
    """Buffers of three clients, of which the first are in the model, and the model's parameters."""
    tensors = server.method.model(state)
    trainable = server.method.trainable(tensors, 0)
    buffers = ClientBuffers(Layout.of({key: tensors[key] for key in trainable}), 3, torch.device("cpu"))
    buffers.read([tensors] * 3, [{}] * 3)
    frozen = {key: x for key, x in tensors.items() if key not in trainable}
    buffers.bind(server.trainer.adapted, clients, join_tensors(server.trainer.adapted, [frozen] * clients))
    return buffers, server.trainer.adapted.parameters()


# --- views ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clients", [1, 2, 3])
def test_parameters_and_their_gradients_are_views_of_the_buffers(
    tiny_config: dict[str, Any], method: dict[str, Any], clients: int
) -> None:
    server, state = started(set_all(tiny_config, method=method))
    buffers, parameters = bound(server, state, clients)
    assert set(parameters) == {key for key, _ in buffers.layout.shapes}
    for key, where in buffers.layout.slices.items():
        for tensor, matrix in ((parameters[key], buffers.values), (parameters[key].grad, buffers.gradients)):
            assert tensor is not None and tensor.shape[0] == clients
            assert tensor.data_ptr() == matrix[0, where].data_ptr()
            assert tensor.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
            matrix[:clients, where] = 7.0
            assert (tensor == 7).all()


@pytest.mark.parametrize("method", METHODS)
def test_backward_and_a_step_write_into_the_buffers(tiny_config: dict[str, Any], method: dict[str, Any]) -> None:
    """Two forwards add up in the gradients; the step is in the model without loading it again."""
    server, state = started(set_all(tiny_config, method=method))
    adapted, rows = server.trainer.adapted, server.clients[0].train[:4]
    buffers, parameters = bound(server, state, 1)
    addresses = {key: (p.data_ptr(), p.grad.data_ptr()) for key, p in parameters.items() if p.grad is not None}
    norms = []
    for _ in range(2):
        logits, batch = forward(adapted.model, server.trainer.task, rows)
        server.trainer.task.losses(logits, batch)[0].sum().backward()
        norms.append(float(buffers.gradients[0].norm()))
    assert norms[0] > 0 and norms[1] == pytest.approx(2 * norms[0], rel=1e-5)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    sizes = StepSizes.of(server.local, buffers, adapted.head_keys, [[1.0]], [0])
    step_rows(server.local, buffers, 1, sizes, 0)
    assert addresses == {key: (p.data_ptr(), p.grad.data_ptr()) for key, p in parameters.items() if p.grad is not None}
    ((tensors, _),) = buffers.write(1)
    for key, p in parameters.items():
        assert torch.equal(p[0], tensors[key])
        assert p.grad is None or not p.grad.any() or not torch.equal(p, before[key])


def test_what_is_written_is_a_copy(tiny_config: dict[str, Any]) -> None:
    """The next round overwrites the buffers, not what a client has sent or keeps."""
    server, state = started(tiny_config)
    buffers, _ = bound(server, state, 1)
    ((tensors, moments),) = buffers.write(1)
    before = {key: x.clone() for key, x in {**tensors, **moments}.items()}
    for matrix in (buffers.values, buffers.m, buffers.v):
        matrix.fill_(9.0)
    assert all(torch.equal(x, before[key]) for key, x in {**tensors, **moments}.items())


def test_moments_are_those_of_the_client_or_zero() -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(1, 3)}
    buffers = ClientBuffers(Layout.of(tensors), 2, torch.device("cpu"))
    buffers.m.fill_(9.0), buffers.v.fill_(9.0)
    buffers.read([tensors, tensors], [{"m.b": torch.full((1, 3), 2.0), "steps": torch.tensor(4.0)}, {}])
    assert buffers.m[0].tolist() == [0.0, 0.0, 2.0, 2.0, 2.0]
    assert not buffers.m[1].any() and not buffers.v.any()
    (_, first), _ = buffers.write(2)
    assert set(first) == {"m.a", "m.b", "v.a", "v.b"} and first["m.b"].tolist() == [[2.0, 2.0, 2.0]]


# --- identity ---


def identities(adapted: AdaptedModel) -> dict[str, int]:
    return {name: id(p) for name, p in adapted.model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_parameters_keep_their_identity(tiny_config: dict[str, Any], method: dict[str, Any]) -> None:
    """Over rounds, over rounds of one, three and two clients, and between training and evaluation."""
    server, state = started(set_all(tiny_config, method=method, rounds=4))
    names, adapted = list(server.rows), server.trainer.adapted
    state = server.run_round(state).state
    first = identities(adapted)
    for cohort in (names[:1], names, names[1:]):
        state = server.run_round(state, cohort=cohort).state
        assert identities(adapted) == first
        if not state.total_ranks:  # else clients of different ranks are trained one after another
            assert {p.shape[0] for p in adapted.parameters().values()} == {len(cohort)}
        server.trainer.evaluate(server.method.model(state), server.data.test)
        assert identities(adapted) == first


@pytest.mark.parametrize("private", [False, True])
def test_parameters_keep_their_identity_within_a_round(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    """Clients that finish their steps leave the forward: three, then two, then one. Or rows are in their place."""
    train = {"local_epochs": 1, "batch_size": 4, "lr": 0.02}
    privacy = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5} if private else {}
    server, state = started(set_all(tiny_config, train=train, privacy=privacy), tmp_path)
    members = members_of(server, state, None if private else [5, 9, 3])
    load, seen = AdaptedModel.load, []

    def spy(self: AdaptedModel, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        seen.append((identities(self), {p.shape[0] for p in self.parameters().values()}))

    monkeypatch.setattr(AdaptedModel, "load", spy)
    server.trainer.train(members, server.method, 0, server.policy)
    assert all(found == seen[0][0] for found, _ in seen)
    if not private:
        assert [clients for _, clients in seen] == [{3}, {2}, {1}]


# --- shared tensors ---


def moved(monkeypatch: pytest.MonkeyPatch) -> Tensors:
    """The shared tensors as they are on the device, one entry for each move, once the returned dict is filled."""
    found: Tensors = {}
    real = AdaptedModel._on_device

    def spy(self: AdaptedModel, key: str, value: torch.Tensor) -> torch.Tensor:
        placed = real(self, key, value)
        if self.is_shared(key):
            found[f"{key} {id(placed)}"] = placed  # kept, so that no other tensor gets its id
        return placed

    monkeypatch.setattr(AdaptedModel, "_on_device", spy)
    return found


@pytest.mark.parametrize("basis", ["random", "weights", "core"])
def test_shared_tensors_are_moved_once(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, basis: str
) -> None:
    """A and B of a bfloat16 model, which are converted on the way, over rounds of training and evaluation."""
    model = {**tiny_config["model"], "dtype": "bfloat16"}
    server, state = started(set_all(tiny_config, model=model, basis={"kind": basis, "share_samples": 0}))
    placed = moved(monkeypatch)
    for _ in range(3):
        state = server.run_round(state).state
        server.trainer.evaluate(server.method.model(state), server.data.test)
    assert len(placed) == 2 * len(server.trainer.shapes)
    assert {x.dtype for x in placed.values()} == {torch.bfloat16}


def test_a_shared_tensor_is_moved_again_when_it_changes(tiny_config: dict[str, Any]) -> None:
    server, state = started(tiny_config)
    key = next(key for key in state.shared if key.endswith(".A"))
    A, adapted = state.shared[key], server.trainer.adapted
    adapted.model.to("meta")
    first = adapted._on_device(key, A)
    assert first.device.type == "meta"
    assert adapted._on_device(key, A) is first and adapted._on_device(key, A.clone()) is first
    assert adapted._on_device(key, A + 1) is not first
