"""Rounds by secure sums in one process: the plain round's result, clients that leave, noise in shares."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import set_all
from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.config.registry import method_types
from fedsb.methods.base import Method, State
from fedsb.privacy import policy as setup
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.noise import SeededNoise
from fedsb.protocol.secure_sum import SUM, noise_share
from fedsb.protocol.tensors import within
from fedsb.reporting.run_directory import read_manifest, read_rows
from fedsb.runs.estimate import estimate
from fedsb.runs.run import federate, resume
from fedsb.secagg.fixed_point import FixedPoint
from fedsb.secagg.messages import KeyPlan, SumPlan
from fedsb.server.server import RoundResult, Server
from fedsb.training.trainer import Trainer
from fedsb.utils.errors import RunError, UserError
from support.server import open_server, started

SUMMED = [name for name, cls in method_types().items() if cls.spec.secagg_compatible and cls.spec.adapter]
OTHERS = [name for name, cls in method_types().items() if not cls.spec.secagg_compatible or not cls.spec.adapter]


def secure(config: dict[str, Any], **server: Any) -> dict[str, Any]:
    return set_all(config, server={"secure_aggregation": True, **server})


def round_of(config: dict[str, Any], folder: Path | None = None) -> tuple[Server, State, RoundResult]:
    """(server, the state it started from, the round's result); a private run needs a folder for its ledgers."""
    server, state = started(config, folder)
    return server, state, server.run_round(state, cohort=list(server.rows))


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("name", SUMMED)
def test_a_secure_round_is_the_plain_round_within_the_bound(
    name: str, weighting: str, tiny_config: dict[str, Any]
) -> None:
    config = set_all(tiny_config, method={"name": name, "rank": 2}, server={"weighting": weighting})
    _, _, plain = round_of(config)
    server, _, summed = round_of(secure(config, weighting=weighting))
    clients = len(server.clients)
    bound = 3 * clients * 4.0 * clients / 2**31  # of the sum, over the smallest sum of weights here, a third
    for key, x in plain.state.tensors.items():
        assert torch.allclose(x, summed.state.tensors[key], rtol=1e-6, atol=bound + 1e-6), key
    assert summed.replies.losses == plain.replies.losses
    assert summed.state.accepted == plain.state.accepted == dict.fromkeys(server.rows, 1)


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_that_needs_more_than_a_sum_is_refused(name: str, tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"secagg_compatible is false|nothing to add up"):
        open_server(secure(set_all(tiny_config, method={"name": name, "rank": 2})))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"server": {"codec": "int8", "secure_aggregation": True}}, "its own fixed-point format"),
        ({"basis": {"kind": "core"}, "server": {"secure_aggregation": True}}, "something of its own"),
        ({"clients": {"total_ranks": [2, 4]}, "server": {"secure_aggregation": True}}, "changes of one shape"),
        ({"server": {"secure_aggregation": True, "clients_per_round": 1}}, "one client per round"),
    ],
)
def test_what_does_not_go_with_a_secure_sum_is_refused(
    change: dict[str, Any], said: str, tiny_config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=said):
        open_server(set_all(tiny_config, **change))


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled: int, by: float) -> None:
    """The first `spoiled` uploads of a round are off by `by` in one value."""
    from fedsb.methods.fed_sb import FedSB

    plain, left = FedSB.upload, [spoiled]

    def upload(self: Method, received: Any, trained: Any, round: int) -> Any:
        sent, kept = plain(self, received, trained, round)
        if received is trained or left[0] == 0:  # of a client that has not trained
            return sent, kept
        left[0] -= 1
        key = sorted(sent)[0]
        return {**sent, key: sent[key] + by}, kept

    monkeypatch.setattr(FedSB, "upload", upload)


@pytest.mark.parametrize(("by", "said"), [(np.nan, "NaN or infinite"), (5.0, r"server.secagg_clip allows 4")])
def test_a_client_with_a_bad_change_leaves_and_the_sum_is_of_the_others(
    by: float, said: str, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broadcast that it received is counted."""
    config = set_all(tiny_config, server={"weighting": "uniform"})
    spoil(monkeypatch, 1, by)
    server, _, summed = round_of(secure(config, weighting="uniform"))
    (drop,) = summed.dropped
    names = list(server.rows)
    assert drop.client == names[0] and re.search(said, drop.reason)
    assert summed.state.accepted == dict.fromkeys(names[1:], 1)
    assert [record.direction for record in summed.traffic if record.client == drop.client] == ["down"]
    monkeypatch.undo()
    other, first = started(config)
    without = other.run_round(first, cohort=names[1:])
    for key, x in without.state.tensors.items():
        assert torch.allclose(x, summed.state.tensors[key], atol=1e-6), key


def test_clients_that_received_the_state_at_once_are_in_a_sum_with_those_that_knew_it(
    tiny_config: dict[str, Any],
) -> None:
    """A client that was not in the last cohort receives both factors, the others one."""
    clients, method = {"partition": "iid", "count": 4}, {"name": "rolora", "rank": 2}
    config = set_all(tiny_config, clients=clients, method=method, rounds=4)
    done = federate(load_config(secure(config, clients_per_round=3)))
    rows = read_rows(done.folder / "rounds.jsonl")
    assert len(rows) == 4 and all(row["dropped"] == [] for row in rows)


def test_below_the_threshold_there_is_no_round(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 2, np.nan)
    with pytest.raises(RunError, match="the threshold is 2"):
        round_of(secure(set_all(tiny_config, clients={"count": 3})))


def test_min_clients_raises_the_threshold(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = secure(set_all(tiny_config, clients={"count": 3}), min_clients=3)
    round_of(config)  # all three stay
    spoil(monkeypatch, 1, np.nan)
    with pytest.raises(RunError, match="the threshold is 3"):
        round_of(config)


def test_a_run_shows_its_threshold_counts_its_traffic_and_resumes(tiny_config: dict[str, Any]) -> None:
    """The sum is exact, so a whole run and one that was interrupted and resumed end with the same bits."""
    from laws.test_codecs import StopAfterOne

    config = secure(set_all(tiny_config, rounds=3))
    whole = federate(load_config(set_all(config, name="whole")))
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(set_all(config, name="cut")), StopAfterOne())
    resumed = resume(Path(config["out"]) / "cut")
    for name in ("adapter_model.safetensors",):
        assert (whole.adapter / name).read_bytes() == (resumed.adapter / name).read_bytes()
    manifest = read_manifest(whole.folder)
    assert any(choice["key"] == "server.threshold" for choice in manifest["settings"])
    rows = [row for row in read_rows(whole.folder / "traffic.jsonl") if row["kind"] == "round"]
    assert {row["client"] for row in rows} == {client["name"] for client in manifest["clients"]}  # not "the sum"
    assert SUM not in json.dumps(read_rows(whole.folder / "rounds.jsonl"))
    n = len(manifest["clients"])
    up = [row for row in rows if row["direction"] == "up"]
    for row in up:
        assert row["bytes"] == 4 * row["values"]
        assert row["wire_bytes"] > 4 * (row["values"] + 1) + 224 + 60 * (n - 1) + 16 * n


# --- noise in shares ---


def of_clients(config: dict[str, Any], **privacy: Any) -> dict[str, Any]:
    chosen = {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-3, "clip_norm": 0.5, **privacy}
    return secure(set_all(config, privacy=chosen, server={"weighting": "uniform"}), weighting="uniform")


def sum_plan(threshold: int, size: int, clip: float) -> SumPlan:
    """Returns the plan of a sum of five clients."""
    sites = {name: bytes([i]) * 32 for i, name in enumerate("abcde")}
    keys = KeyPlan(run="r", round=0, rounds=1, sites=sites, threshold=threshold, attempt="1")
    grid = FixedPoint(clients=5, clip=clip)
    return SumPlan(run="r", round=0, sites=sites, threshold=threshold, size=size, grid=grid, keys=keys)


def test_the_noise_of_the_sum_is_as_planned_when_only_the_threshold_stays(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    server, _ = started(of_clients(tiny_config), tmp_path)
    mechanism = server.policy.mechanisms[setup.SERVER]
    mechanism.charge(1)
    plan = sum_plan(threshold=3, size=60_000, clip=0.5)
    shares = [noise_share(plan, mechanism) * plan.grid.step for _ in range(5)]
    planned = 1.5 * (0.5 + plan.grid.step * np.sqrt(60_000))
    assert np.std(sum(shares[:3])) == pytest.approx(planned, rel=0.02)  # the threshold
    assert np.std(sum(shares)) == pytest.approx(planned * np.sqrt(5 / 3), rel=0.02)
    assert np.std(shares[0]) == pytest.approx(planned / np.sqrt(3), rel=0.02)


def test_a_share_is_sized_for_the_threshold_and_for_the_rounding(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedsb.protocol import secure_sum as module

    asked: list[float] = []
    monkeypatch.setattr(module, "discrete_gaussian", lambda noise, sigma, count: asked.append(sigma))
    server, _ = started(of_clients(tiny_config), tmp_path)
    plan = sum_plan(threshold=4, size=90_000, clip=2.0)
    with pytest.raises(RunError, match="the ledger has no line for"):
        module.noise_share(plan, server.policy.mechanisms[setup.SERVER])
    server.policy.mechanisms[setup.SERVER].charge(1)
    module.noise_share(plan, server.policy.mechanisms[setup.SERVER])
    assert asked == [pytest.approx(1.5 * (0.5 / plan.grid.step + 300) / 2, rel=1e-12)]


def test_the_server_gets_a_clipped_noised_sum_and_the_ledger_has_it(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = of_clients(set_all(tiny_config, method={"name": "fed-sb", "rank": 16}))
    monkeypatch.setattr(setup, "noise_for", lambda client: SeededNoise(0, client))
    server, state, noised = round_of(config, tmp_path / "noised")
    (path,) = (tmp_path / "noised" / "privacy").glob("*.jsonl")
    (entry,) = read_ledger(path)
    assert (entry.round, entry.q, entry.sigma, entry.clip, entry.count) == (1, 1.0, 1.5, 0.5, 1)

    from fedsb.protocol import secure_sum as module

    monkeypatch.setattr(module, "noise_share", lambda plan, mechanism: np.zeros(plan.size, np.int64))
    _, _, plain = round_of(config, tmp_path / "plain")
    clients, threshold = len(server.clients), len(server.clients) // 2 + 1
    noise = torch.cat([(noised.state.tensors[k] - plain.state.tensors[k]).flatten() for k in state.tensors])
    assert float(noise.std()) == pytest.approx(1.5 * 0.5 * np.sqrt(clients / threshold) / clients, rel=0.05)
    change = torch.cat([(plain.state.tensors[k] - state.tensors[k]).flatten() for k in state.tensors])
    assert float(change.norm()) <= 0.5 * (1 + 1e-5)  # a mean of changes of at most the clip


def test_a_clients_change_is_no_longer_than_the_clip_in_the_ring(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[np.ndarray] = []
    steps: list[float] = []
    plain = FixedPoint.encode

    def encode(self: FixedPoint, values: Any, weight: float, draw: Any, noise: Any = None) -> Any:
        ring = plain(self, values, weight, draw)
        seen.append(self.decode(ring)[0])
        steps.append(self.step)
        return ring

    monkeypatch.setattr(FixedPoint, "encode", encode)
    server, _, _ = round_of(of_clients(tiny_config), tmp_path)
    assert len(seen) == len(server.clients)
    for change, step in zip(seen, steps, strict=True):
        assert step * np.sqrt(change.size) <= 0.01 * 0.5  # what rounding may add to the clip
        assert np.linalg.norm(change) == pytest.approx(0.5, rel=1e-2)
        assert np.linalg.norm(change) <= 0.5 + step * np.sqrt(change.size)


def test_a_private_run_with_noise_in_shares_stays_within_its_epsilon(tiny_config: dict[str, Any]) -> None:
    done = federate(load_config(of_clients(tiny_config, noise_multiplier=None, epsilon=20.0)))
    manifest, rows = read_manifest(done.folder), read_rows(done.folder / "rounds.jsonl")
    assert manifest["not_private"] is None
    assert rows[-1]["epsilon"] == pytest.approx(manifest["privacy"]["epsilon"], rel=1e-6)
    assert rows[-1]["epsilon"] <= 20.0


# --- fewer bytes ---


def test_all_clients_send_the_same_part_and_owe_the_rest(tiny_config: dict[str, Any]) -> None:
    """What is not sent in one round is sent in a later one: over all parts the sum of the changes is whole."""
    config = set_all(secure(tiny_config, fraction=0.25, weighting="uniform"), rounds=2)
    server, state = started(config)
    plain, _ = started(secure(tiny_config, weighting="uniform"))
    first, whole = server.run_round(state), plain.run_round(state)
    layout = Layout.of(state.tensors)
    change, all_of_it = (layout.flatten(r.state.tensors) - layout.flatten(state.tensors) for r in (first, whole))
    chosen = server.compressor.part(0)
    assert chosen is not None
    part = chosen.places(layout).copy()
    assert len(part) == -(-layout.size // 4)
    rest = np.setdiff1d(np.arange(layout.size), part)
    assert torch.allclose(change[part], all_of_it[part], atol=1e-6)
    assert not change[rest].any() and all_of_it[rest].any()
    states = [client.store.client_state(1) for client in server.channel._started.values()]  # type: ignore[attr-defined]
    owed = torch.stack([layout.flatten(within("codec", own)) for own in states]).mean(0)
    assert torch.allclose(owed[rest], all_of_it[rest], atol=1e-6) and not owed[part].any()
    assert {record.values for record in first.replies.traffic if record.direction == "up"} == {len(part)}
    second = server.run_round(first.state)
    assert {record.values for record in second.replies.traffic} == {len(part)}  # down too, in the second round
    assert {record.bytes for record in second.replies.traffic} == {4 * len(part)}


@pytest.mark.parametrize("bits", [12, 17, 32])
def test_a_narrow_ring_is_within_its_bound(bits: int, tiny_config: dict[str, Any]) -> None:
    settings = {"weighting": "uniform", "secagg_clip": 0.5}
    _, _, plain = round_of(set_all(tiny_config, server={"weighting": "uniform"}))
    server, _, summed = round_of(secure(tiny_config, **settings, secagg_bits=bits))
    clients = len(server.clients)
    bound = clients * 0.5 / ((2 ** (bits - 1) - 1) // clients) / clients
    for key, x in plain.state.tensors.items():
        assert torch.allclose(x, summed.state.tensors[key], rtol=0, atol=bound + 1e-6), key
    up = [record for record in summed.replies.traffic if record.direction == "up"]
    assert {record.bytes for record in up} == {-(-record.values * bits // 8) for record in up}


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_part_is_refused_where_a_clip_bounds_what_is_sent(unit: str, tiny_config: dict[str, Any]) -> None:
    chosen = {"unit": unit, "noise_multiplier": 1.5, "delta": 1e-3, "clip_norm": 0.5}
    config = set_all(secure(tiny_config, weighting="uniform", fraction=0.5), privacy=chosen)
    with pytest.raises(UserError, match=r"server.fraction = 0.5: what a client does not send it adds to later"):
        open_server(set_all(config, train={"local_steps": 1}))


def test_the_price_of_a_masked_update_is_what_is_sent(tiny_config: dict[str, Any]) -> None:
    for config in (
        secure(tiny_config, fraction=0.3, secagg_bits=20),
        of_clients(tiny_config),
        set_all(
            secure(tiny_config),
            train={"local_steps": 1},
            privacy={"unit": "example", "epsilon": 20.0, "delta": 1e-3, "clip_norm": 0.5},
        ),
    ):
        done = federate(load_config(set_all(config, name=f"run-{id(config)}")))
        manifest = read_manifest(done.folder)
        (mine,) = [price for price in manifest["prices"] if price["this_run"]]
        rounds = read_rows(done.folder / "rounds.jsonl")
        assert mine["up_bytes"] == sum(row["up_bytes"] for row in rounds)
        each = estimate(load_config(config))["bytes_per_client_round"]["up"]
        assert each * len(rounds[0]["cohort"]) == rounds[0]["up_bytes"]


def test_a_run_that_was_interrupted_while_it_trained_has_charged_nothing_for_the_round(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the budget would not suffice for the last round."""
    train, rounds = Trainer.train, list[int]()

    def interrupted(self: Trainer, clients: Any, method: Any, round: int, *rest: Any) -> Any:
        rounds.append(round)
        if rounds.count(1) == 1 and round == 1:
            raise KeyboardInterrupt
        return train(self, clients, method, round, *rest)

    monkeypatch.setattr(Trainer, "train", interrupted)
    config = of_clients(tiny_config)
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(config))
    folder = resume(Path(config["out"]) / config["name"]).folder
    assert [row["round"] for row in read_rows(folder / "rounds.jsonl")] == [1, 2, 3]
    (path,) = (folder / "privacy").glob("*.jsonl")
    assert [entry.round for entry in read_ledger(path)] == [1, 2, 3]
