"""DP-SGD in whole rounds: per-example gradients, the noised mean, the sampling, and whole private runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import set_all
from fedsb.adapters.basis import basis_hash
from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.data.tasks.classification import Classification
from fedsb.methods.base import State
from fedsb.privacy import policy as setup
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.ledger import Ledger, merged, read_ledger
from fedsb.privacy.mechanism import Cap, DPMechanism, PrivacyBudgetExceededError, clip_change
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.plan import PrivacyPlan
from fedsb.protocol.payload import unpack
from fedsb.protocol.traffic import TrafficCounter
from fedsb.reporting.run_directory import read_manifest, read_result, read_rows
from fedsb.runs.run import Silent, federate, resume
from fedsb.server.server import Server
from fedsb.server.validation import update_rules, validate_updates
from fedsb.training.joint import join_tensors
from fedsb.training.per_example import RowGradients, add_clipped
from fedsb.training.scoring import forward
from fedsb.utils.errors import ConfigError, DivergedError, UserError
from fedsb.utils.tensors import Tensors
from laws.test_codecs import StopAfterOne
from support.server import open_server, replies_of, started

METHODS = [
    pytest.param({"name": "fed-sb", "rank": 4}, id="fed-sb"),
    pytest.param({"name": "fed-sb", "rank": 4, "tied": True}, id="fed-sb, tied"),
    pytest.param({"name": "ravan", "rank": 2, "blocks": 2}, id="ravan"),
    pytest.param({"name": "fedit", "rank": 2}, id="fedit"),
    pytest.param({"name": "ffa-lora", "rank": 2}, id="ffa-lora"),
    pytest.param({"name": "fedsvd", "rank": 2}, id="fedsvd"),
]
MODELS = ["tiny_bert", "tiny_llama", "tiny_gpt2"]


class NoNoise:
    """Noise that is none, and draws that take all rows: what is left is the arithmetic."""

    secret = False

    def normal(self, shape: Any) -> Any:
        return np.zeros(shape)

    def poisson_sample(self, rows: int, q: float) -> list[int]:
        return list(range(rows))


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "noise_for", lambda client: SeededNoise(0, client))


def private(config: dict[str, Any], **privacy: Any) -> dict[str, Any]:
    return set_all(config, privacy={"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5, **privacy})


def moved(server: Server, state: State) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """A client's tensors with nothing at zero, so that every gradient is there."""
    tensors = server.method.model(state)
    draw = torch.Generator().manual_seed(0)
    trainable = server.method.trainable(tensors, 0)
    return {
        key: x + 0.1 * torch.randn(x.shape, generator=draw) if key in trainable else x for key, x in tensors.items()
    }, trainable


def one_by_one(server: Server, tensors: Any, trainable: Any, rows: Any) -> tuple[list[torch.Tensor], list[float]]:
    """Every row's gradient (P,) by a backward of its own, and its mean loss."""
    each, losses = [], []
    layout = layout_of(tensors, trainable)
    for row in rows:
        server.trainer.adapted.load(join_tensors(server.trainer.adapted, [tensors]), trainable=trainable)
        logits, batch = forward(server.trainer.adapted.model, server.trainer.task, [row])
        loss, weight = server.trainer.task.losses(logits, batch)
        loss = (loss / weight.clamp(min=1)).sum()
        loss.backward()
        each.append(layout.flatten({key: p.grad[0] for key, p in server.trainer.adapted.parameters().items()}))
        losses.append(float(loss.detach()))
    return each, losses


def layout_of(tensors: Tensors, trainable: frozenset[str]) -> Layout:
    return Layout.of({key: tensors[key] for key in trainable})


def sums_of(
    server: Server,
    tensors: Tensors,
    trainable: frozenset[str],
    rows: list[Any],
    clip: float,
    micro: int,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """((K, P) the clipped sums, (K,) the mean losses) of clients with these tensors, in forwards of `micro` rows."""
    adapted, layout = server.trainer.adapted, layout_of(tensors, trainable)
    frozen = join_tensors(adapted, [{key: x for key, x in tensors.items() if key not in trainable}] * len(rows))
    values = layout.flatten(tensors).repeat(len(rows), 1)
    gradients = RowGradients.allocate(adapted, server.trainer.task, layout, micro)
    return gradients.clipped_sums(values, frozen, rows, clip, scales=scales)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_clipped_sums_are_those_of_single_backwards(
    request: pytest.FixtureRequest, tiny_config: dict[str, Any], model: str, method: dict[str, Any]
) -> None:
    """Several clients, unequal batches, one empty, however the rows are cut; half the rows are clipped."""
    task = {"kind": "classification"} if model == "tiny_bert" else {"kind": "text"}
    folder = str(request.getfixturevalue(model))
    checkpointed = model == "tiny_llama"
    server, state = started(
        set_all(
            tiny_config,
            model={"name": folder, "max_seq_length": 16, "activation_checkpointing": checkpointed},
            task=task,
            method=method,
        )
    )
    tensors, trainable = moved(server, state)
    rows = [server.clients[0].train[:5], [], server.clients[1].train[:3]]
    each = [one_by_one(server, tensors, trainable, own) for own in rows]
    lengths = [float(one.norm()) for own, _ in each for one in own]
    clip = sorted(lengths)[len(lengths) // 2] * 0.999
    assert min(lengths) < clip < max(lengths)
    for micro in (1, 3, 64):
        sums, losses = sums_of(server, tensors, trainable, rows, clip, micro)
        for k, (own, own_losses) in enumerate(each):
            expected = torch.zeros_like(sums[k])
            for one in own:
                expected += one * min(1.0, clip / float(one.norm()))
            assert torch.allclose(sums[k], expected, atol=1e-5 * max(1.0, clip)), (k, micro)
            assert float(losses[k]) == pytest.approx(sum(own_losses) / max(len(own), 1), rel=1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_rows_are_clipped_in_scaled_coordinates(own: bool, tiny_config: dict[str, Any]) -> None:
    """With each client's own factors, or with the same ones for all; factors over ten powers of ten."""
    server, state = started(tiny_config)
    tensors, trainable = moved(server, state)
    rows = [server.clients[0].train[:4], server.clients[1].train[:3]]
    each = [one_by_one(server, tensors, trainable, of_client)[0] for of_client in rows]
    draw = torch.Generator().manual_seed(0)
    scales = 10 ** (10 * torch.rand((2 if own else 1, each[0][0].numel()), generator=draw) - 5)
    used = scales.expand(2, -1)
    lengths = sorted(float((one * used[k]).norm()) for k, ones in enumerate(each) for one in ones)
    clip = lengths[3] * 0.999
    for micro in (1, 64):
        sums, _ = sums_of(server, tensors, trainable, rows, clip, micro, scales)
        for k, ones in enumerate(each):
            clipped = [x * min(1.0, clip / float(x.norm())) for x in (one * used[k] for one in ones)]
            assert torch.allclose(sums[k], torch.stack(clipped).sum(0), rtol=1e-4, atol=1e-4 * clip)
        alone, _ = sums_of(server, tensors, trainable, [rows[0][:1], []], clip / 1e3, micro, scales)
        assert float(alone[0].norm()) == pytest.approx(clip / 1e3, rel=1e-5)  # the longest that a row can make it


def test_one_row_moves_the_sum_by_at_most_the_clip(tiny_config: dict[str, Any]) -> None:
    server, state = started(tiny_config)
    tensors, trainable = moved(server, state)
    rows, clip = server.clients[0].train[:6], 0.01
    whole, _ = sums_of(server, tensors, trainable, [rows], clip, 64)
    for left_out in range(len(rows)):
        others = [row for i, row in enumerate(rows) if i != left_out]
        without, _ = sums_of(server, tensors, trainable, [others], clip, 64)
        distance = float((whole - without).norm())
        assert 0.99 * clip < distance <= clip * (1 + 1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_row_without_a_finite_gradient_counts_as_none(bad: float) -> None:
    """1e30 is finite, and its square is not. All rows of the second client are such."""
    g, sums = torch.ones(4, 7), torch.zeros(2, 7)
    g[1, 0] = g[3, 6] = bad
    add_clipped(sums, g, torch.tensor([0, 0, 0, 1]), 1.0)
    assert torch.allclose(sums[0], torch.full((7,), 2 / 7**0.5)) and not sums[1].any()


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_row_whose_loss_is_none_ends_no_private_run(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """That it ended, or that a client was dropped, would tell of the row. Who releases the loss is told."""
    losses = Classification.losses

    def broken(task: Any, logits: Any, batch: Any) -> Any:
        loss_b, weight_b = losses(task, logits, batch)
        return loss_b * torch.where(batch["labels"] == 1, math.nan, 1.0), weight_b

    monkeypatch.setattr(Classification, "losses", broken)
    config = private(tiny_config, unit=unit) if unit == "example" else of_clients(tiny_config)
    done = federate(load_config(config))
    assert not any(row["dropped"] for row in read_rows(done.folder / "rounds.jsonl"))
    assert all(x.isfinite().all() for x in load_file(done.folder / "adapter" / "adapter_model.safetensors").values())
    with pytest.raises(DivergedError, match="the loss of client"):
        federate(load_config(set_all(config, name="released", privacy={"release": ["loss"]})))


@pytest.mark.parametrize("unit", ["example", "client"])
def test_nothing_is_measured_on_private_rows_without_noise(tiny_config: dict[str, Any], unit: str) -> None:
    """Neither what a basis captures of them nor which class most of them have."""
    config = set_all(tiny_config, basis={"share_samples": 4})
    done = federate(load_config(private(config) if unit == "example" else of_clients(config)))
    assert read_manifest(done.folder)["basis"]["captured_share"] is None
    assert read_manifest(done.folder)["before"]["majority"] is None
    plain = federate(load_config(set_all(config, name="plain")))
    assert read_manifest(plain.folder)["basis"]["captured_share"] is not None
    assert read_manifest(plain.folder)["before"]["majority"] is not None


def test_a_row_that_becomes_several_examples_is_refused(tiny_config: dict[str, Any], tiny_llama: Path) -> None:
    """Each window would be drawn and clipped for itself, and a row of ten cost ten times its epsilon."""
    text = set_all(tiny_config, model={"name": str(tiny_llama), "max_seq_length": 4}, task={"kind": "text"})
    with pytest.raises(UserError, match=r"rows of client 'site 0' .* would be cut into several examples"):
        federate(load_config(private(text)))
    federate(load_config(private(set_all(text, model={"name": str(tiny_llama), "max_seq_length": 64}))))


def test_clients_that_are_drawn_take_part_in_all_rounds_of_the_plan(tiny_config: dict[str, Any]) -> None:
    """The sum's one ledger is charged in each, whoever is in it."""
    config = of_clients(tiny_config, epsilon=40.0)
    drawn = set_all(config, rounds=6, train={"local_steps": 1}, server={**config["server"], "clients_per_round": 2})
    done = federate(load_config(drawn))
    assert len(read_rows(done.folder / "rounds.jsonl")) == 6


def test_without_noise_and_clip_it_is_training_on_all_rows(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The noised mean is the sum over the drawn rows by the expected batch; SGD then takes that step."""
    monkeypatch.setattr(setup, "noise_for", lambda client: NoNoise())
    train = {"local_steps": 1, "batch_size": 4, "lr": 0.5, "head_lr": 0.5, "optimizer": "sgd", "max_grad_norm": 0}
    config = set_all(private(tiny_config, clip_norm=1e6, epsilon=None, noise_multiplier=1.0), train=train)
    server, state = started(set_all(config, privacy={}))
    tensors, trainable = server.method.model(state), server.method.trainable(server.method.model(state), 0)
    guarded, _ = started(config, tmp_path)
    sent = update_of(guarded, state)
    each, _ = one_by_one(server, tensors, trainable, server.clients[0].train)
    step = torch.stack(each).sum(0) / 4  # the expected batch, not the rows drawn
    layout = layout_of(tensors, trainable)
    assert torch.allclose(layout.flatten(sent), layout.flatten(tensors) - 0.5 * step, atol=1e-4)


def update_of(server: Server, state: State) -> Tensors:
    """What the first client sends."""
    name = server.clients[0].name
    return unpack(replies_of(server, state, [name])[name].payload).tensors


class Quiet(SeededNoise):
    """The same draws, and no noise."""

    def normal(self, shape: Any) -> Any:
        return np.zeros(shape)


def test_the_noise_on_a_step_is_as_planned(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a step of SGD does with noise, less what it does without, is sigma clip / batch wide."""
    train = {"local_steps": 1, "batch_size": 4, "lr": 1.0, "head_lr": 1.0, "optimizer": "sgd"}
    config = set_all(private(tiny_config, clip_norm=0.05), train=train, method={"name": "fed-sb", "rank": 16})
    ends = []
    for noise in (Quiet, SeededNoise):
        monkeypatch.setattr(setup, "noise_for", lambda client, noise=noise: noise(0, client))
        server, state = started(config, tmp_path / noise.__name__)
        sent = update_of(server, state)
        ends.append(Layout.of(sent).flatten(sent))
    plan = server.policy.plans[server.clients[0].name]
    assert float((ends[1] - ends[0]).std()) == pytest.approx(plan.sigma * 0.05 / 4, rel=0.05)


def test_an_empty_draw_still_steps_and_is_charged(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Nobody(SeededNoise):
        def poisson_sample(self, rows: int, q: float) -> list[int]:
            return []

    monkeypatch.setattr(setup, "noise_for", lambda client: Nobody(0, client))
    server, state = started(private(tiny_config), tmp_path)
    before, after = server.method.model(state), update_of(server, state)
    assert all((x != before[key]).any() for key, x in after.items())  # noise alone has moved it
    (release,) = server.policy.mechanisms[server.clients[0].name].ledger.releases()
    assert release.count == 3


def test_a_private_run(tiny_config: dict[str, Any]) -> None:
    """Its policy, its ledgers, and what it keeps to itself."""
    config = private(set_all(tiny_config, server={"clients_per_round": 2}))
    done = federate(load_config(config))
    manifest, result = read_manifest(done.folder), read_result(done.folder)
    assert result is not None and manifest["not_private"] is None
    says = manifest["privacy"]
    assert says["epsilon"] <= 8.0 < says["epsilon"] * 1.02
    assert result["epsilon"] == pytest.approx(says["epsilon"], rel=1e-6)
    rows = read_rows(done.folder / "rounds.jsonl")
    assert all(row["loss"] is None for row in rows)
    assert [row["epsilon"] for row in rows] == sorted(row["epsilon"] for row in rows)
    assert all(client["labels"] is None for client in manifest["clients"])
    assert all(client["score"] is None for client in result["clients"])
    for client in manifest["clients"]:
        entries = read_ledger(done.folder / "privacy" / f"{client['name']}.jsonl")
        took_part = [row["round"] for row in rows if client["name"] in row["cohort"]]
        assert [entry.round for entry in entries] == took_part
        assert [release.count for release in merged(entries)] == [3 * len(took_part)]
    card = (done.folder / "adapter" / "README.md").read_text()
    assert "differentially private for one row of one client" in card
    assert "Privacy: not" not in (done.folder / "report.html").read_text()


def test_the_noise_is_not_the_runs_seed(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    ends = [federate(load_config(set_all(private(tiny_config), out=str(tmp_path / str(k))))) for k in range(2)]
    files = [(end.folder / "adapter" / "adapter_model.safetensors").read_bytes() for end in ends]
    assert files[0] != files[1]


def test_seeded_noise_is_called_not_private(tiny_config: dict[str, Any], seeded: None) -> None:
    done = federate(load_config(private(tiny_config)))
    assert read_manifest(done.folder)["not_private"] == "its noise came from a seed, for a test"
    assert "not private" in (done.folder / "adapter" / "README.md").read_text()


def test_a_round_done_again_is_charged_again_and_the_epsilon_is_kept(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash behind the charge and before the checkpoint: the run goes on until its budget is spent."""
    from fedsb.runs.record import Record

    commit = Record.commit

    def dies(self: Record, result: Any, *args: Any, **kwargs: Any) -> None:
        if result.state.round == 2:
            raise KeyboardInterrupt
        commit(self, result, *args, **kwargs)

    monkeypatch.setattr(Record, "commit", dies)
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(private(tiny_config)))
    monkeypatch.setattr(Record, "commit", commit)
    folder = Path(tiny_config["out"]) / "tiny"
    said: list[str] = []
    display = Silent()
    display.note = said.append  # type: ignore[method-assign]
    for _ in range(2):  # and again: it is finished
        done = resume(folder, display)
        assert (done.adapter / "adapter_config.json").exists()
        assert "2 of 3 planned" in (done.adapter / "README.md").read_text()
        assert sum("ends after round 2" in line for line in said) == 1 and read_result(folder) is not None
        said.clear()
    rows = read_rows(folder / "rounds.jsonl")
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[-1]["epsilon"] <= 8.0
    for ledger in (folder / "privacy").glob("*.jsonl"):
        assert [entry.round for entry in read_ledger(ledger)] == [1, 2, 2]


def test_a_step_ahead_is_along_the_mean_of_the_rows_expected(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not of those drawn: here all are, whatever is expected, so half the expectation is twice the step."""
    monkeypatch.setattr(setup, "noise_for", lambda client: NoNoise())
    starts = []
    for samples in (10, 20):
        basis = {"kind": "core", "samples": samples, "R0": "step", "outer_rank": 16}
        server = open_server(private(set_all(tiny_config, basis=basis), clip_norm=1e6))
        server.policy.open_ledgers(tmp_path / str(samples), "test", new=True)
        server.opened.local_clients.start(server.policy, None, {})
        _, made, _ = server.start()
        assert made is not None
        starts.append(made.R0)
    for layer, R in starts[1].items():
        assert torch.allclose(starts[0][layer], 2 * R, rtol=1e-4, atol=1e-8) and (R != 0).any()


def test_a_script_without_fedsb_finds_the_same_epsilon(tiny_config: dict[str, Any]) -> None:
    """Of three clients, two in each round, a noised basis, cut off after a round and resumed."""
    config = private(tiny_config, basis_share=0.2)
    config = set_all(config, server={"clients_per_round": 2}, basis={"kind": "core", "samples": 30, "R0": "zero"})
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(config), StopAfterOne())
    folder = resume(Path(tiny_config["out"]) / "tiny").folder
    script = Path(__file__).parents[2] / "docs" / "recompute_epsilon.py"
    assert "fedsb" not in script.read_text().split('"""', 2)[2]
    said = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=True)
    found, result = json.loads(said.stdout), read_result(folder)
    assert result is not None and len(found["clients"]) == 3
    assert found["epsilon"] == pytest.approx(result["epsilon"], abs=5e-3)
    assert found["epsilon"] <= 8.0 < 1.02 * found["epsilon"]
    assert len(set(found["clients"].values())) > 1  # they have not all taken part alike


def test_a_ledger_that_is_gone_stops_the_run(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(private(tiny_config)), StopAfterOne())
    folder = Path(tiny_config["out"]) / "tiny"
    next((folder / "privacy").glob("*.jsonl")).unlink()
    with pytest.raises(UserError, match="is missing, and with it the record of what"):
        resume(folder)


@pytest.mark.parametrize("method", [{"name": "central", "rank": 3}, {"name": "local", "rank": 3}], ids=str)
def test_the_controls_are_private_too(tiny_config: dict[str, Any], method: dict[str, Any]) -> None:
    done = federate(load_config(set_all(private(tiny_config), method=method)))
    assert read_manifest(done.folder)["not_private"] is None
    assert len(list((done.folder / "privacy").glob("*.jsonl"))) == (1 if method["name"] == "central" else 3)


# --- the private basis ---


def test_a_core_basis_is_noised_and_charged(tiny_config: dict[str, Any]) -> None:
    config = set_all(private(tiny_config), basis={"kind": "core", "samples": 30, "refresh": 2})
    done = federate(load_config(config))
    manifest, result = read_manifest(done.folder), read_result(done.folder)
    assert result is not None
    assert result["epsilon"] == pytest.approx(manifest["privacy"]["epsilon"], rel=1e-6)
    assert manifest["privacy"]["epsilon"] <= 8.0
    assert manifest["basis"]["captured_share"] is None
    for ledger in (done.folder / "privacy").glob("*.jsonl"):
        basis, training = merged(read_ledger(ledger))
        assert (basis.what, basis.count) == ("basis", 2)  # at the start, and before the third round
        assert (training.what, training.count) == ("training", 9)


def test_the_noise_on_a_core_basis_is_as_planned(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a client sends, less what it sends without noise, has the planned standard deviation."""
    sent: list[torch.Tensor] = []
    record = TrafficCounter.record

    def watched(self: TrafficCounter, data: bytes, *args: Any, **kwargs: Any) -> Any:
        payload = unpack(data)
        if payload.kind == "basis-up":
            sent.append(torch.from_numpy(payload.vector))
        return record(self, data, *args, **kwargs)

    monkeypatch.setattr(TrafficCounter, "record", watched)
    config = set_all(private(tiny_config), basis={"kind": "core", "samples": 30})
    for number, noise in enumerate((Quiet, SeededNoise)):
        monkeypatch.setattr(setup, "noise_for", lambda client, noise=noise: noise(0, client))
        server, _ = started(config, tmp_path / str(number))
    half = len(sent) // 2
    for plan, quiet, noisy in zip(server.policy.plans.values(), sent[:half], sent[half:], strict=True):
        assert plan.basis is not None
        std = float((noisy - quiet).std())
        assert std == pytest.approx(plan.basis.sigma * plan.basis.clip, rel=0.05)


# --- clients as the unit ---


def of_clients(config: dict[str, Any], **privacy: Any) -> dict[str, Any]:
    settings = {"unit": "client", "epsilon": 20.0, "delta": 1e-3, "clip_norm": 0.5, **privacy}
    server = {**config.get("server", {}), "weighting": "uniform"}
    return set_all(config, privacy=settings, server=server)


@pytest.mark.parametrize("name", ["fed-sb", "ffa-lora", "fedit", "rolora"])
def test_a_run_that_protects_clients(tiny_config: dict[str, Any], name: str) -> None:
    done = federate(load_config(of_clients(set_all(tiny_config, method={"name": name, "rank": 2}))))
    manifest, result = read_manifest(done.folder), read_result(done.folder)
    assert result is not None and manifest["not_private"] is None
    assert result["epsilon"] == pytest.approx(manifest["privacy"]["epsilon"], rel=1e-6)
    assert "all rows of one client" in manifest["privacy"]["says"]
    (ledger,) = (done.folder / "privacy").glob("*.jsonl")
    assert [(r.q, r.count) for r in merged(read_ledger(ledger))] == [(1.0, 3)]


def test_the_servers_noise_and_the_clients_clip(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A client's change is at most the clip long; the mean's noise is sigma clip / n."""
    monkeypatch.setattr(setup, "noise_for", lambda client: SeededNoise(0, client))
    server, state = started(of_clients(set_all(tiny_config, method={"name": "fed-sb", "rank": 16})), tmp_path)
    payloads = [(name, reply.payload) for name, reply in replies_of(server, state).items()]
    updates, _ = validate_updates(
        payloads, update_rules(server.method, state, server.config.server, "test", basis_hash(state.shared))
    )
    for update in updates:
        change = torch.cat([(x - state.tensors[key]).flatten() for key, x in update.tensors.items()])
        assert float(change.norm()) == pytest.approx(0.5, rel=1e-4)  # it was longer
    noised = server.policy.add_noise(updates, 0)
    plan = server.policy.mechanisms[setup.SERVER].plan
    total = [
        torch.cat([sum(u.tensors[k] for u in each).flatten() for k in updates[0].tensors]) for each in (updates, noised)
    ]
    assert float((total[1] - total[0]).std()) == pytest.approx(plan.sigma * 0.5, rel=0.05)


def test_no_client_is_left_out_for_its_norm(tiny_config: dict[str, Any]) -> None:
    """Whether one is would depend on the others' rows, which the noise on the sum does not cover."""
    strict = set_all(tiny_config, server={"max_norm_ratio": 1.0001, "weighting": "uniform"}, rounds=1)
    plain = federate(load_config(set_all(strict, name="plain")))
    assert read_rows(plain.folder / "rounds.jsonl")[0]["dropped"]
    done = federate(load_config(of_clients(strict, clip_norm=100.0)))
    assert not read_rows(done.folder / "rounds.jsonl")[0]["dropped"]


def test_a_short_change_is_left_as_it_is() -> None:
    baseline, sent = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([3.0, 0.0, 5.0])
    assert clip_change(sent, baseline, 5.0).tolist() == [3.0, 0.0, 5.0]
    assert clip_change(sent, baseline, 2.5).tolist() == [1.5, 0.0, 3.0]
    assert clip_change(sent, baseline, 50.0).tolist() == [3.0, 0.0, 5.0]
    assert clip_change(baseline, baseline, 1.0).tolist() == [0.0, 0.0, 1.0]
    for clip in (1e-7, 5e-5):  # float32 rounds values of 1 by up to 6e-8, which is more than a thousandth of these
        with pytest.raises(UserError, match=r"privacy.clip_norm = .* is too small.* Set it to at least 6e-05"):
            clip_change(sent, baseline, clip)
    for bad in (math.nan, math.inf):
        assert clip_change(torch.tensor([3.0, 0.0, bad]), baseline, 5.0).tolist() == [0.0, 0.0, 1.0]


def test_a_clients_own_cap_is_for_its_own_delta_and_all_runs(tmp_path: Path) -> None:
    """The plan's limit is at the plan's delta, by which much more is let through."""
    plan = PrivacyPlan(unit="example", clip=1.0, delta=0.01, batch=4, rows=30, steps=5, rounds=20, sigma=0.8)
    other = Release(q=plan.q, sigma=plan.sigma, count=plan.steps)
    most = epsilon([other, *plan.releases(2)], 1e-5)
    cap = Cap(epsilon=most, delta=1e-5, before=(other,))
    ledger = Ledger.create(tmp_path / "a.jsonl", run="x", client="a", unit="example")
    mechanism = DPMechanism(plan=plan, ledger=ledger, noise=SeededNoise(0, "a"), caps=(cap,))
    mechanism.charge(1)
    mechanism.charge(2)
    with pytest.raises(PrivacyBudgetExceededError, match=r"at a delta of 1e-05. This site allows"):
        mechanism.charge(3)
    assert epsilon(ledger.releases(), plan.delta) < plan.epsilon()
    assert len(read_ledger(ledger.path)) == 2


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"basis": {"kind": "update-pooled"}}, "reads private rows without noise"),
        ({"train": {"local_steps": 1, "batch_size": 4, "dropout": 0.1}}, "train.dropout"),
        ({"eval": {"gap": True}}, "eval.gap scores private rows"),
        ({"method": {"name": "hetlora", "rank": 2}}, "hetlora adds a local regulariser"),
        ({"train": {"local_steps": 1, "batch_size": 64}}, "an expected batch of 64 from"),
        ({"data_tune": 0.2}, "data.validation_fraction scores private rows"),
        (
            {"basis": {"kind": "core", "samples": 30, "refresh": 2}, "server": {"clients_per_round": 2}},
            "needs every client in every round",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_make_epsilon_untrue_is_refused(tiny_config: dict[str, Any], changes: Any, said: str) -> None:
    config = private(tiny_config)
    if share := changes.pop("data_tune", None):
        changes = {"data": {**tiny_config["data"], "validation_fraction": share}}
    with pytest.raises(UserError, match=said):
        open_server(set_all(config, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "flora", "rank": 2}}, "flora does not compute one"),
        ({"server": {"weighting": "samples"}}, "needs server.weighting = 'uniform'"),
        ({"server": {"weighting": "uniform", "codec": "int8"}}, "server.codec = 'float32'"),
        ({"basis": {"kind": "core"}}, "Its noise is planned only for privacy.unit = 'example'"),
        ({"train": {"persist_optimizer_state": True}}, "carries private state between rounds"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_clients_as_the_unit_rule_out(tiny_config: dict[str, Any], changes: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_server({**of_clients(tiny_config), **changes})


def test_settings_that_do_not_go_together() -> None:
    for privacy, said in (
        ({"unit": "example"}, "needs epsilon or noise_multiplier"),
        ({"unit": "example", "epsilon": 1, "noise_multiplier": 1}, "and not both"),
        ({"epsilon": 1}, "unit = 'none' means no privacy"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config({"privacy": privacy})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield


def test_the_manifest_is_json_of_finite_numbers(tiny_config: dict[str, Any]) -> None:
    done = federate(load_config(private(tiny_config)))
    text = (done.folder / "manifest.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    course = json.loads(text)["privacy"]["epsilon_after"]
    assert list(course) == ["1", "2", "3"] and list(course.values()) == sorted(course.values())
