"""Golden traces: what every method says and learns in three rounds, as JSON. A change of arithmetic shows in review.

Rewrite them with `pytest tests/laws/test_golden.py --rewrite-golden`. Numbers are stored with five digits, since the
last bits differ between processors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import set_all
from fedsb.channels.in_process import InProcessChannel
from fedsb.methods.base import State
from fedsb.protocol.payload import measure
from support.server import started

GOLDEN = Path(__file__).with_name("golden")
ROUNDS = 3
METHODS: dict[str, dict[str, Any]] = {
    "fed-sb": {"method": {"name": "fed-sb", "rank": 4}},
    "fed-sb-core-basis": {"method": {"name": "fed-sb", "rank": 4}, "basis": {"kind": "core", "samples": 20}},
    "fed-sb-refreshed": {"method": {"name": "fed-sb", "rank": 4}, "basis": {"kind": "random", "refresh": 2}},
    "fed-sb-int4": {"method": {"name": "fed-sb", "rank": 4}, "server": {"codec": "int4"}},
    "fed-sb-int2-part": {"method": {"name": "fed-sb", "rank": 4}, "server": {"codec": "int2", "fraction": 0.5}},
    "fed-sb-personal": {"method": {"name": "fed-sb-personal", "rank": 4}},
    "ravan": {"method": {"name": "ravan", "rank": 2, "blocks": 3}},
    "hetlora": {"method": {"name": "hetlora", "rank": 4, "gamma": 0.5}, "clients": {"total_ranks": {"site 1": 2}}},
    "local": {"method": {"name": "local", "rank": 3}},
    "central": {"method": {"name": "central", "rank": 3}},
    **{
        name: {"method": {"name": name, "rank": 2}}
        for name in (
            *("fedit", "ffa-lora", "rolora", "fedsa-lora", "fedex-lora", "flora", "flexlora", "flora-na", "fedsvd"),
            "fedrot-lora",
        )
    },
}


def trace_of(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the rounds. Returns the messages, in order, and the figures of each round."""
    messages: list[str] = []
    exchange = InProcessChannel.exchange

    def heard(self: InProcessChannel, requests: Any, timeout_s: float | None = None) -> Iterator[Any]:
        for name, reply in exchange(self, requests, timeout_s):
            sizes = [sum(measure(part)[2] for part in message.parts) for message in (requests[name], reply)]
            messages.append(f"{name}: {requests[name].verb} {sizes[0]} -> {reply.verb} {sizes[1]}")
            yield name, reply

    monkeypatch.setattr(InProcessChannel, "exchange", heard)
    server, state = started(config)
    rounds = []
    for _ in range(ROUNDS):
        result = server.run_round(state)
        state = result.state
        rounds.append(
            {
                "loss": {client: digits(loss) for client, loss in sorted(result.replies.losses.items())},
                "bytes": sum(record.bytes for record in result.traffic),
                "norms": norms(state),
            }
        )
    return {"messages": messages, "rounds": rounds}


def norms(state: State) -> dict[str, float]:
    """The norm of each part of the state: of all tensors with the same last name."""
    found: dict[str, float] = {}
    for part in ("tensors", "shared"):
        for key, x in getattr(state, part).items():
            name = f"{part}.{key.rpartition('.')[2]}"
            found[name] = found.get(name, 0.0) + float(x.double().square().sum())
    return {name: digits(square**0.5) for name, square in sorted(found.items())}


def digits(x: float) -> float:
    return float(f"{x:.5g}")


@pytest.mark.parametrize("name", METHODS)
def test_golden_trace(
    name: str, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    sections = {key: {**tiny_config.get(key, {}), **value} for key, value in METHODS[name].items() if key != "method"}
    config = set_all(tiny_config, method=METHODS[name]["method"], **sections)
    found = trace_of(set_all(config, engine={"clients_per_forward": 1}), monkeypatch)
    path = GOLDEN / f"{name}.json"
    if request.config.getoption("--rewrite-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert found["messages"] == expected["messages"]
    for round, golden in zip(found["rounds"], expected["rounds"], strict=True):
        assert round["bytes"] == golden["bytes"]
        for part in ("loss", "norms"):
            assert round[part] == pytest.approx(golden[part], rel=1e-3, abs=1e-4)
