"""Private rounds with shared noise: the model of a private run in one place, and settings that forbid it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import set_all
from fedsb.adapters.layout import Layout
from fedsb.client.round import ClientRound, ClientView
from fedsb.config.load import load_config
from fedsb.config.registry import method_types
from fedsb.privacy import policy as setup
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.scaling import gradient_scales, unpack_moments
from fedsb.reporting.report import byte_totals
from fedsb.reporting.run_directory import read_manifest, read_rows
from fedsb.runs.estimate import estimate
from fedsb.runs.run import federate
from fedsb.server.server import Server
from fedsb.server.step import FederatedStep
from fedsb.training import joint
from fedsb.utils.errors import UserError
from support.server import open_server, started

SHARED = [
    name
    for name, cls in method_types().items()
    if (spec := cls.spec).secagg_compatible and spec.adapter and spec.global_model and spec.client_state == "nothing"
]
ROUNDS = 4


def private(
    config: dict[str, Any], *, train: Mapping[str, Any] = {}, privacy: Mapping[str, Any] = {}, **server: Any
) -> dict[str, Any]:
    return set_all(
        config,
        rounds=ROUNDS,
        train={"local_steps": 1, "batch_size": 4, "lr": 0.05, "head_lr": 0.02, **train},
        server={"secure_aggregation": True, **server},
        privacy={"unit": "example", "epsilon": 20.0, "delta": 1e-3, "clip_norm": 0.5, **privacy},
        eval={"every": ROUNDS},
    )


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "noise_for", lambda client: SeededNoise(0, client))


def same_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draws rows by their content and the step, whichever client has them. Returns the number of rows of each step."""
    steps: list[int] = []

    def draw(clients: Sequence[joint.ClientTraining], mechanisms: Sequence[DPMechanism]) -> list[list[Any]]:
        def chosen(example: Any) -> bool:
            key = f"{len(steps)} {example['input_ids']}".encode()
            return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < 2**64 * mechanisms[0].plan.q

        for own in mechanisms:
            own.require_charged("training")
        rows = [[example for example in client.examples if chosen(example)] for client in clients]
        steps.append(sum(map(len, rows)))
        return rows

    monkeypatch.setattr(joint, "_draw", draw)
    return steps


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the arithmetic: no noise, and a grid as fine as float64 allows."""
    of = NoiseGrid.of
    fine = lambda plan, size: replace(of(plan, size), gamma=plan.clip * 1e-8, sigma=0.0, bits=32)  # noqa: E731
    monkeypatch.setattr(NoiseGrid, "of", fine)
    monkeypatch.setattr(DPMechanism, "add_noise", lambda self, total, std: total.float())


def final(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """The model after all rounds: the dense update of each layer, and the head."""
    server, state = started(config, folder)
    for _ in range(ROUNDS):
        state = server.run_round(state).state
    dense = {layer: f.scale * f.B @ f.A for layer, f in server.method.export(server.method.model(state)).items()}
    return {**dense, **{key: state.tensors[key] for key in server.trainer.head}}


SCALED = "a core with scaled gradients"


@pytest.mark.parametrize("name", [*SHARED, "a causal model", SCALED])
def test_the_model_is_that_of_private_training_in_one_place(
    name: str, tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws and no noise, K clients that share it make the steps of one client with all rows."""
    train = {"optimizer": "sgd", "momentum": 0.5, "schedule": "linear", "weight_decay": 0.1, "lr": 1.0}
    privacy = {}
    if name == SCALED:
        name, privacy = "fed-sb", {"scale_then_privatize": True, "clip_norm": 0.05}
        train = {"schedule": "linear", "weight_decay": 0.1, "lr": 0.05}
    if name not in SHARED:
        model = {"name": str(tiny_llama), "max_seq_length": 64}
        task = {"kind": "instruction", "prompt": "text", "answer": "label"}
        name, tiny_config = "fed-sb", set_all(tiny_config, model=model, task=task)
    method = {"name": name, "rank": 2}
    clients = {"partition": "iid", "count": 3, "holdout_fraction": 0.0}
    config = set_all(private(tiny_config, train=train, privacy=privacy), method=method, clients=clients)
    keeps = not method_types()[name].spec.rotates_basis
    together = {**train, "batch_size": 12, "persist_optimizer_state": keeps}
    central = private(tiny_config, train=together, privacy=privacy)
    central = set_all(central, method=method, server={}, clients={**clients, "count": 1})
    steps = same_draws(monkeypatch)
    without_noise(monkeypatch)
    alone = final(central, tmp_path / "central")
    drawn = list(steps)
    steps.clear()
    shared = final(config, tmp_path / "shared")
    assert steps == drawn and sum(drawn) > 12  # both have drawn the same rows
    if privacy:  # Adam magnifies differences; if one of the two did not scale, they would be 0.1
        one, other = (torch.cat([model[key].flatten() for key in alone]) for model in (alone, shared))
        assert float((one - other).norm()) < 0.03 * float(one.norm())
        return
    for key, x in alone.items():
        assert torch.allclose(x, shared[key], atol=1e-4 * float(x.abs().max()) + 1e-7), key


def test_the_servers_adamw_is_that_of_torch(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """The moments live as long as the run, each tensor has its own rate, and the schedule spans the rounds."""
    train = {"lr": 0.05, "head_lr": 0.02, "weight_decay": 0.1, "schedule": "linear"}
    server, state = started(set_all(private(tiny_config, train=train), method={"name": "fed-sb", "rank": 2}), tmp_path)
    heads, moments = server.trainer.adapted.head_keys, dict[str, torch.Tensor]()
    leaves = {key: x.clone().requires_grad_() for key, x in state.tensors.items()}
    rates = [{"params": [x], "lr": 0.02 if key in heads else 0.05} for key, x in leaves.items()]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda round: 1 - round / ROUNDS)
    step, draw, layout = FederatedStep(server.local, heads), torch.Generator().manual_seed(0), Layout.of(state.tensors)
    tensors = dict(state.tensors)
    for round in range(ROUNDS):
        gradient = torch.randn(layout.size, generator=draw)
        shared = ClientRound(server.method, ClientView(state.shared), tensors, round, "")
        sent, moments = step.take(shared, gradient, moments)
        tensors = {**tensors, **sent}
        for key, view in layout.views(gradient).items():
            leaves[key].grad = view
        optimizer.step()
        schedule.step()
    for key, leaf in leaves.items():
        assert torch.allclose(tensors[key], leaf, rtol=1e-5, atol=1e-6), key


def test_the_sum_has_the_noise_of_all_shares(tiny_config: dict[str, Any], tmp_path: Path, seeded: None) -> None:
    """In one round of SGD with rate 1 the change of a value is the noised mean itself."""
    train = {"optimizer": "sgd", "lr": 1.0, "head_lr": 1.0}
    config = set_all(private(tiny_config, train=train), method={"name": "fed-sb", "rank": 32})
    server, state = started(config, tmp_path)
    after = server.run_round(state).state.tensors
    (plan, *_) = server.policy.plans.values()
    change = torch.cat([(after[key] - x).flatten() for key, x in state.tensors.items()])
    assert plan.shared is not None and plan.shared.honest == len(server.clients)
    noise = plan.sigma * 1.01 * plan.clip / plan.batch
    assert float(change.std()) == pytest.approx(noise, rel=5 / np.sqrt(2 * len(change)) + 0.02)


def test_the_divisor_is_what_the_clients_in_the_sum_are_expected_to_draw(tiny_config: dict[str, Any]) -> None:
    server = open_server(private(tiny_config))
    first, second, _ = server.rows
    found = server.mean_gradient(0.1, np.array([2.0, -1.0]), [first, second])
    wanted = np.array([2.0, -1.0]) / (0.1 * (server.rows[first] + server.rows[second]))
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)


def test_clients_that_are_drawn_share_the_noise_of_the_one_with_the_most_rounds(tiny_config: dict[str, Any]) -> None:
    config = {**private(tiny_config, clients_per_round=2), "rounds": 7}
    plans = open_server(config).policy.plans.values()
    assert len({plan.rounds for plan in plans}) > 1
    assert len({plan.sigma for plan in plans}) == 1
    assert max(plan.epsilon() for plan in plans) == pytest.approx(20.0, rel=1e-3)


def test_ledgers_have_both_multipliers_and_one_line_a_step(tiny_config: dict[str, Any]) -> None:
    done = federate(load_config(private(tiny_config)))
    ledgers = {path.stem: read_ledger(path) for path in (done.folder / "privacy").glob("*.jsonl")}
    assert len(ledgers) == 3
    for entries in ledgers.values():
        assert [entry.round for entry in entries] == [1, 2, 3, 4]
        assert {entry.count for entry in entries} == {1}
        assert {entry.own_sigma for entry in entries} == {entries[0].sigma / np.sqrt(3)}
    manifest, rows = read_manifest(done.folder), read_rows(done.folder / "rounds.jsonl")
    assert rows[-1]["epsilon"] == pytest.approx(manifest["privacy"]["epsilon"], rel=1e-6)
    assert manifest["privacy"]["epsilon"] <= 20.0 < manifest["privacy"]["own_epsilon"]
    assert rows[-1]["own_epsilon"] == pytest.approx(manifest["privacy"]["own_epsilon"], rel=1e-6)


def test_a_client_is_asked_for_the_entries_that_the_server_may_lack(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    server, state = started(private(tiny_config), tmp_path)
    name = server.clients[0].name
    assert server.entries_since(name, 1) == 1
    after = server.run_round(state).state
    assert server.entries_since(name, after.round + 1) == 2
    assert server.entries_since(name, after.round) == 1  # a repeated round may have been charged again
    assert server.entries_since(name, after.round + 3) == 2  # it may have trained in a round that its reply missed


def test_masked_values_travel_in_as_many_bits_as_they_need(tiny_config: dict[str, Any]) -> None:
    done = federate(load_config(private(tiny_config)))
    traffic = [json.loads(line) for line in (done.folder / "traffic.jsonl").read_text().splitlines()]
    up = [row for row in traffic if row["direction"] == "up"]
    assert len(up) == 3 * ROUNDS
    for row in up:
        assert 1.5 * row["values"] <= row["bytes"] <= 2.5 * row["values"]
        assert row["wire_bytes"] > row["bytes"]
    first, later = up[0]["wire_bytes"], up[-1]["wire_bytes"]
    assert later < first  # keys are agreed on once


def test_second_moments_are_counted_with_the_broadcast(tiny_config: dict[str, Any]) -> None:
    """One byte per trained value, which `check` states beforehand."""
    folders = [
        federate(load_config({**private(tiny_config, privacy={"scale_then_privatize": scaled}), "name": name})).folder
        for name, scaled in (("plain", False), ("scaled", True))
    ]
    plain, scaled = (byte_totals(read_rows(folder / "traffic.jsonl"))["federation"] for folder in folders)
    values = sum(row["values"] for row in read_rows(folders[0] / "traffic.jsonl") if row["direction"] == "down")
    assert scaled["with_head"]["down"] - plain["with_head"]["down"] == values
    assert 0 <= scaled["wire"]["down"] - plain["wire"]["down"] - values < 50 * 3 * ROUNDS
    assert {part: scaled[part]["up"] for part in scaled} == {part: plain[part]["up"] for part in plain}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", ["fed-sb", "ravan", "rolora", "ffa-lora"])
def test_bytes_are_as_priced(method: str, scaled: bool, tiny_config: dict[str, Any]) -> None:
    """Also where a client trains other values than it would send, and other ones in each round."""
    config = private(tiny_config, privacy={"scale_then_privatize": scaled})
    config = set_all(config, method={"name": method, "rank": 3})
    found = byte_totals(read_rows(federate(load_config(config)).folder / "traffic.jsonl"))["federation"]
    priced = estimate(load_config(config))["prices"][0]
    assert {part: priced[f"{part}_bytes"] for part in ("up", "down")} == {
        part: found["with_head"][part] for part in ("up", "down")
    }
    assert priced["total_bytes_without_head"] == pytest.approx(found["without_head"]["total"], abs=24 * ROUNDS)


def test_scaled_gradients_get_as_much_noise(tiny_config: dict[str, Any], tmp_path: Path, seeded: None) -> None:
    """A mean is divided by s, and with it its noise; sigma, and so epsilon, is the same."""
    servers = [
        started(private(tiny_config, privacy={"scale_then_privatize": scaled}), tmp_path / str(scaled))
        for scaled in (False, True)
    ]
    (plain, _), (server, state) = servers
    for name, plan in plain.policy.plans.items():
        assert server.policy.plans[name].releases() == plan.releases()
    for _ in range(2):
        state = server.run_round(state).state
    plain_round = ClientRound(server.method, ClientView(state.shared), state.tensors, 2, "")
    sent = server.optimizer_step.second_moments(plain_round, state.server)
    trained = replace(plain_round, second_moments=sent)
    assert len(set(sent)) > 10
    scales = gradient_scales(unpack_moments(sent))
    assert float(scales.max()) > 1.5 * float(scales.min())
    gradient = torch.ones_like(scales)
    _, moments = server.optimizer_step.take(trained, gradient, {})
    flat = Layout.of(trained.trained).flatten({key: moments[f"m.{key}"] for key in trained.trained})
    assert torch.allclose(flat, 0.1 / scales)


def test_a_run_is_repeated_with_the_same_draws(tiny_config: dict[str, Any], tmp_path: Path, seeded: None) -> None:
    config = private(tiny_config)
    first, second = (final(config, tmp_path / name) for name in "ab")
    assert all(torch.equal(x, second[key]) for key, x in first.items())


# --- settings ---


def noise_setting(server: Server) -> tuple[Any, str]:
    (found,) = [choice for choice in server.policy.choices if choice.key == "privacy.noise"]
    return found.value, found.reason


def test_auto_shares_the_noise_where_it_can_and_says_why(tiny_config: dict[str, Any]) -> None:
    value, reason = noise_setting(open_server(private(tiny_config)))
    assert value == "shared" and "3 shares make up the noise" in reason
    value, reason = noise_setting(open_server(private(tiny_config, train={"local_steps": 2})))
    assert value == "local" and "train.local_steps = 2: a round must be one step" in reason
    value, reason = noise_setting(open_server(private(tiny_config, secure_aggregation=False)))
    assert value == "local" and "without server.secure_aggregation" in reason


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"server": {"secure_aggregation": False}}, "Set server.secure_aggregation = true"),
        ({"train": {"local_steps": 3}}, "a round must be one step. The influence of a row is bounded in one"),
        ({"train": {"local_epochs": 1}}, "train.local_epochs = 1: a round must be one step"),
        ({"method": {"name": "fedsa-lora"}}, "does not train one set of tensors for all clients"),
        ({"server": {"secure_aggregation": True, "optimizer": "adam"}}, "Set server.optimizer = 'none'"),
        ({"server": {"secure_aggregation": True, "clients_per_round": 1}}, "impossible with 1 clients per round"),
        ({"colluding_clients": 3}, "Shared noise is impossible with 3 clients per round, of which 3 must stay and 3"),
    ],
)
def test_settings_that_forbid_shared_noise_are_refused(
    changes: dict[str, Any], match: str, tiny_config: dict[str, Any]
) -> None:
    privacy = {"noise": "shared", "colluding_clients": changes.pop("colluding_clients", 0)}
    config = set_all(private(tiny_config), **changes)
    config = set_all(config, privacy={**config["privacy"], **privacy})
    with pytest.raises(UserError, match=match):
        open_server(config)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train": {"optimizer": "sgd"}}, "Set it to 'adamw'"),
        ({"server": {}}, "a client has none in its only step. Raise train.local_steps or rounds"),
        (
            {"train": {"local_steps": None, "local_epochs": 1, "batch_size": 64}, "server": {}},
            "a client has none in its only step",
        ),
        ({"method": {"name": "fedsvd"}}, "the coordinates of fedsvd are others in each round"),
    ],
)
def test_gradients_that_nothing_could_scale_are_refused(
    changes: dict[str, Any], match: str, tiny_config: dict[str, Any]
) -> None:
    config = private(tiny_config)
    merged = {key: {**config.get(key, {}), **value} if value else {} for key, value in changes.items()}
    config = set_all(config, **{"privacy": config["privacy"], **merged})
    config["privacy"]["scale_then_privatize"] = True
    with pytest.raises(UserError, match=match):
        open_server(config)


@pytest.mark.parametrize("unit", ["client", "none"])
def test_what_has_no_effect_changes_nothing(
    unit: str, tiny_config: dict[str, Any], tmp_path: Path, seeded: None
) -> None:
    privacy = {"none": {"unit": "none"}, "client": {"unit": "client", "noise_multiplier": 0.1, "clip_norm": 5.0}}[unit]
    ends = []
    for more in ({}, {"noise": "shared", "scale_then_privatize": True}):
        config = private(tiny_config, weighting="uniform")
        server, state = started(set_all(config, privacy={**privacy, **more}), tmp_path / str(len(ends)))
        result = server.run_round(state)
        ends.append((sum(row.bytes for row in result.traffic), result.state.tensors["classifier.bias"]))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_larger_threshold_wastes_less_noise(tiny_config: dict[str, Any]) -> None:
    two = open_server(private(tiny_config, min_clients=2))
    assert "2 shares make up the noise" in noise_setting(two)[1]
    assert "1.22 times as large" in noise_setting(two)[1]
