"""The mean of the last rounds' models: what is scored and exported, while training goes on from the last model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import adapter_bytes, set_all
from fedsb.config.load import load_config
from fedsb.methods.base import State
from fedsb.protocol.payload import unpack
from fedsb.runs.run import federate, resume
from fedsb.server.server import Server
from fedsb.utils.errors import UserError
from laws.test_codecs import StopAfterOne
from support.server import started

LAST = {"server": {"average_last": 0.5}}


def states(config: dict[str, Any], rounds: int) -> tuple[Server, list[State]]:
    server, state = started(config)
    found = []
    for _ in range(rounds):
        state = server.run_round(state).state
        found.append(state)
    return server, found


@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "rolora", "rank": 2}])
def test_the_average_is_that_of_the_last_rounds(method: dict[str, Any], tiny_config: dict[str, Any]) -> None:
    server, found = states(set_all(tiny_config, rounds=5, method=method, **LAST), 5)
    plain, alone = states(set_all(tiny_config, rounds=5, method=method), 5)
    assert [bool(state.average) for state in found] == [False, False, False, True, True]
    for key, x in found[-1].tensors.items():
        assert torch.equal(x, alone[-1].tensors[key])  # training does not see the average
        mean = (alone[3].tensors[key] + alone[4].tensors[key]) / 2
        assert torch.allclose(found[-1].average[key], mean, atol=1e-7)
    model = server.method.model(server.result(found[-1]))
    assert all(torch.equal(model[key], found[-1].average[key]) for key in found[-1].average)
    assert server.result(found[0]) is found[0] and plain.result(alone[-1]) is alone[-1]


def test_it_is_scored_exported_and_resumed(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = set_all(tiny_config, rounds=4, **LAST)
    whole = federate(load_config(config))
    cut = load_config(set_all(config, name="cut"))
    with pytest.raises(KeyboardInterrupt):
        federate(cut, StopAfterOne())
    again = resume(whole.folder.parent / "cut")
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder) and again.score == whole.score
    last = federate(load_config(set_all(tiny_config, rounds=4, name="last")))
    assert adapter_bytes(last.folder) != adapter_bytes(whole.folder)


def test_clients_end_with_it(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server, found = states(set_all(tiny_config, rounds=2, server={"average_last": 0.9}), 2)
    sent = []
    monkeypatch.setattr(server.exchange, "each", lambda requests, **_: sent.extend(requests.values()) or [])
    server.finish(server.result(found[-1]), {})
    tensors = unpack(sent[0].payload).tensors
    assert all(torch.equal(torch.as_tensor(tensors[key]), x) for key, x in found[-1].average.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "fedsvd", "rank": 2}},
        {"method": {"name": "flora", "rank": 2}},
        {"method": {"name": "fedsa-lora", "rank": 2}},
        {"basis": {"kind": "random", "refresh": 2}},
    ],
)
def test_tensors_that_have_no_mean_are_refused(changes: dict[str, Any], tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="so their mean is not a model"):
        federate(load_config(set_all(tiny_config, **LAST, **changes)))
