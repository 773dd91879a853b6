"""Laws 3, 4, 5 and 7 with a lossy codec: whole runs on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import adapter_bytes, set_all
from fedsb.channels.in_process import InProcessChannel
from fedsb.config.load import load_config
from fedsb.config.registry import method_type
from fedsb.config.schema import Config
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import State, Update
from fedsb.methods.fed_sb import FedSB
from fedsb.protocol import schedule
from fedsb.protocol.codec import CODECS, Q_MAX
from fedsb.protocol.compressor import build_compressor
from fedsb.protocol.messages import TrainReply
from fedsb.protocol.payload import unpack
from fedsb.protocol.rotated import BITS
from fedsb.reporting.run_directory import read_manifest
from fedsb.runs.estimate import estimate
from fedsb.runs.record import Record
from fedsb.runs.run import federate, resume
from support.server import replies_of, started

LOSSY = ("bfloat16", "int8", "int4", "int3", "int2")


def run(config: dict[str, Any], out: Path, **changes: Any) -> Path:
    return federate(load_config(set_all(config, out=str(out), **changes))).folder


def sent_bytes(folder: Path) -> dict[str, int]:
    rows = Record(folder, {}).rows("traffic.jsonl")
    return {way: sum(row["bytes"] for row in rows if row["direction"] == way) for way in ("up", "down")}


EVERY_CODEC = [
    pytest.param({"name": "fed-sb", "rank": 4}, {"clients_per_round": 2}, id="fed-sb"),
    pytest.param({"name": "fed-sb", "rank": 3, "blocks": 2}, {}, id="fed-sb, everyone"),
    pytest.param({"name": "ravan", "rank": 2, "blocks": 3}, {"clients_per_round": 2}, id="ravan"),
    pytest.param({"name": "fedit", "rank": 2}, {"clients_per_round": 2}, id="fedit"),
    pytest.param({"name": "fedsvd", "rank": 2}, {"clients_per_round": 2}, id="fedsvd"),
    pytest.param({"name": "rolora", "rank": 2}, {}, id="rolora"),  # who is late gets both factors
    pytest.param({"name": "local", "rank": 2}, {"clients_per_round": 2}, id="local"),
    pytest.param({"name": "central", "rank": 2}, {}, id="central"),
]
PARTS = [
    pytest.param({"name": "fed-sb", "rank": 4}, {"fraction": 0.3}, id="fed-sb, a part"),
    pytest.param({"name": "fed-sb", "rank": 4}, {"fraction": 0.3, "clients_per_round": 2}, id="both"),
    pytest.param({"name": "fedit", "rank": 2}, {"fraction": 0.25}, id="fedit, a part"),
    pytest.param({"name": "rolora", "rank": 2}, {"fraction": 0.5}, id="rolora, a part"),
]


def with_codecs(cases: Sequence[Any], codecs: Sequence[str]) -> list[Any]:
    return [pytest.param(*case.values, codec, id=f"{case.id}, {codec}") for case in cases for codec in codecs]


@pytest.mark.parametrize(
    ("method", "server", "codec"),
    [*with_codecs(EVERY_CODEC, CODECS), *with_codecs(PARTS, ("float32", "int4", "int2"))],
)
def test_law_4_bytes_of_every_codec(
    tiny_config: dict[str, Any], tmp_path: Path, method: dict[str, Any], server: dict[str, Any], codec: str
) -> None:
    """Bytes measured on all envelopes of a run equal the price in its manifest, and that of `fedsb check`."""
    server = {"codec": codec, **server}
    config = set_all(tiny_config, method=method, server=server, rounds=4, train={"local_steps": 1})
    folder = run(config, tmp_path)
    (mine, *_), (checked, *_) = read_manifest(folder)["prices"], estimate(load_config(config))["prices"]
    assert checked == mine
    assert sent_bytes(folder) == {"up": mine["up_bytes"], "down": mine["down_bytes"]}
    if codec != "float32" and mine["total_bytes"]:
        plain = run(set_all(config, server={"codec": "float32"}), tmp_path / "plain")
        share = sent_bytes(folder)["up"] / sent_bytes(plain)["up"]
        assert share < {"bfloat16": 0.51, "int8": 0.27, "int4": 0.15, "int3": 0.13, "int2": 0.09}[codec]


def test_law_4_the_ledgers_head_is_as_it_was_priced(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    from fedsb.reporting.report import summary

    folder = run(set_all(tiny_config, server={"codec": "int4"}), tmp_path)
    measured, mine = summary(folder)["bytes"]["federation"], read_manifest(folder)["prices"][0]
    assert measured["with_head"]["total"] == mine["total_bytes"]
    assert measured["without_head"]["total"] == mine["total_bytes_without_head"]


class StopAfterOne:
    """Ctrl-C behind the first round."""

    def settings(self, choices: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def round(self, row: Any, rounds: int) -> None:
        raise KeyboardInterrupt


SAMPLED = {"codec": "int4", "clients_per_round": 2}


@pytest.mark.parametrize(
    ("method", "server"),
    [
        *(
            pytest.param({"name": name, "rank": 2}, SAMPLED, id=name)
            for name in ("fed-sb", "fedit", "rolora", "fedsa-lora", "fedsvd")
        ),
        pytest.param({"name": "hetlora", "rank": 4, "gamma": 0.5, "penalty_weight": 0.1}, SAMPLED, id="hetlora"),
        *(
            pytest.param({"name": name, "rank": 2}, {"codec": codec, "fraction": fraction}, id=f"{name}, {codec}")
            for name, codec, fraction in (
                ("fed-sb", "int8", 1.0),
                ("fed-sb", "bfloat16", 0.3),
                ("fed-sb", "float32", 0.25),
                ("fed-sb", "int2", 0.5),
                ("rolora", "int4", 0.5),
                ("fedit", "int3", 0.4),
            )
        ),
        pytest.param({"name": "fed-sb", "rank": 4}, {**SAMPLED, "fraction": 0.3}, id="fed-sb, a part"),
    ],
)
def test_law_5_resume_is_bit_exact(
    tiny_config: dict[str, Any], tmp_path: Path, method: dict[str, Any], server: dict[str, Any]
) -> None:
    """With what sites hold in the checkpoint and what they are owed beside their optimisers."""
    facts = method_type(method["name"]).spec
    train = {**tiny_config["train"], "persist_optimizer_state": not (facts.rotates_basis or facts.mixed_ranks)}
    config = set_all(tiny_config, method=method, train=train, rounds=4)
    config |= {"server": server}
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(set_all(config, out=str(tmp_path / "broken"))), StopAfterOne())
    broken = tmp_path / "broken" / "tiny"
    with pytest.raises(KeyboardInterrupt):
        resume(broken, StopAfterOne())
    resume(broken)
    assert adapter_bytes(whole) == adapter_bytes(broken)
    for ledger in ("rounds.jsonl", "traffic.jsonl"):
        rows = [Record(path, {}).rows(ledger) for path in (whole, broken)]
        assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
    states = [Record(path, Record.open(path).manifest).latest() for path in (whole, broken)]
    assert states[0] is not None and states[1] is not None
    for part in ("tensors", "client_view", "shared"):
        one, other = getattr(states[0], part), getattr(states[1], part)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    resolved = load_config(config).config
    assert bool(states[0].client_view) == build_compressor(resolved, resolved.method, "run").keeps_view(resolved.method)
    record = Record.open(whole)
    kept = record.client_states(record.latest())
    owed = {key for own in kept.values() for state in own.values() for key in state if key.startswith("codec/")}
    assert bool(owed) != facts.rotates_basis


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "fedit", "rank": 2}])
def test_law_3_a_dropped_client_is_one_that_was_not_there(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], codec: str
) -> None:
    """Bit for bit: what it was owed before that round it is owed after it."""
    config = set_all(tiny_config, method=method, engine={"clients_per_forward": 1}, rounds=4, server={"codec": codec})
    bad, bad_round = "site 1", 1

    sample = schedule.sample

    def without(names: Sequence[str], round: int, settings: Config) -> list[str]:
        return [name for name in sample(names, round, settings) if (name, round) != (bad, bad_round)]

    with monkeypatch.context() as patch:
        patch.setattr(schedule, "sample", without)
        wanted = run(config, tmp_path / "without")

    exchange = InProcessChannel.exchange

    def harmed(self: InProcessChannel, requests: Any, timeout_s: float | None = None) -> Any:
        for name, reply in exchange(self, requests, timeout_s):
            torn = isinstance(reply, TrainReply) and unpack(reply.payload).round == bad_round and name == bad
            yield name, reply.model_copy(update={"parts": (b"torn",)}) if torn else reply

    monkeypatch.setattr(InProcessChannel, "exchange", harmed)
    got = run(config, tmp_path / "with")
    assert adapter_bytes(got) == adapter_bytes(wanted)


def test_a_round_is_aggregated_from_what_the_sites_held(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server optimiser measures its step from there; what is held at the end is what the last round started from."""
    aggregate, seen = FedSB.aggregate, []

    def watched(self: FedSB, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        seen.append(state.tensors)
        return aggregate(self, state, updates, server)

    monkeypatch.setattr(FedSB, "aggregate", watched)
    folder = run(tiny_config, tmp_path, server={"codec": "int4", "optimizer": "momentum"})
    last = Record(folder, Record.open(folder).manifest).latest()
    assert last is not None and len(seen) == 3
    assert all(torch.equal(last.client_view[key], x) for key, x in seen[-1].items())


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "fedit", "rank": 2}])
def test_law_7_together_equals_one_after_another(
    tiny_config: dict[str, Any], method: dict[str, Any], codec: str
) -> None:
    """The draws do not depend on the company. A change that differs in its last bits may still be rounded the other
    way, which costs one step: a few values do, none differs by more. After a rotation, a step is one of a block."""
    ends = []
    for clients_per_forward in (1, 3):
        config = set_all(
            tiny_config, method=method, engine={"clients_per_forward": clients_per_forward}, server={"codec": codec}
        )
        server, state = started(config)
        ends.append({name: unpack(reply.payload).tensors for name, reply in replies_of(server, state).items()})
    for client, tensors in ends[0].items():
        one, other = (np.concatenate([end[client][key].reshape(-1).numpy() for key in sorted(tensors)]) for end in ends)
        if codec in BITS:
            assert np.linalg.norm(one - other) < 0.1 * np.linalg.norm(one)
            continue
        step = np.abs(one).max() / Q_MAX.get(codec, 128)
        assert np.abs(one - other).max() <= 1.1 * step
        assert np.mean(np.abs(one - other) > 2e-4) < 0.01


@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "fedit", "rank": 2}, {"name": "rolora"}])
def test_a_coded_run_ends_near_the_plain_one(
    tiny_config: dict[str, Any], tmp_path: Path, method: dict[str, Any]
) -> None:
    """Distance of the final state from float32's, in units of the way it has come."""
    states = {}
    for codec in CODECS:
        folder = run(set_all(tiny_config, method=method, server={"codec": codec}, rounds=5), tmp_path / codec)
        state = Record(folder, Record.open(folder).manifest).latest()
        assert state is not None
        states[codec] = state.tensors
    _, start = started(set_all(tiny_config, method=method))
    keys = sorted(start.tensors)
    flat = {codec: torch.cat([tensors[key].flatten() for key in keys]) for codec, tensors in states.items()}
    way = (flat["float32"] - torch.cat([start.tensors[key].flatten() for key in keys])).norm()
    gaps = {codec: float((flat[codec] - flat["float32"]).norm() / way) for codec in LOSSY}
    assert gaps["bfloat16"] < 0.05 and gaps["int8"] < 0.1 and gaps["int4"] < 0.5
    assert gaps["int3"] < 0.5 and gaps["int2"] < 0.8
