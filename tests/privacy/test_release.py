"""What leaves a private run: noise drawn after its line in the ledger, and nothing that is not covered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Said, labelled_rows, set_all, write_rows
from fedsb.adapters.basis import basis_hash
from fedsb.config.load import load_config
from fedsb.data.sources import load_table
from fedsb.data.tasks.classification import Classification
from fedsb.methods.averaging import ServerOptimizer
from fedsb.privacy import policy as setup
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.mechanism import PrivacyBudgetExceededError
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.statement import privacy_statement
from fedsb.protocol.payload import unpack
from fedsb.reporting.run_directory import read_manifest, read_result, read_rows
from fedsb.runs.record import Record
from fedsb.runs.run import federate, resume
from fedsb.server.validation import update_rules, validate_updates
from fedsb.training.basis import core_sums, outer_basis
from fedsb.training.gradients import core_gradients
from fedsb.training.joint import join_tensors
from fedsb.training.scoring import forward
from fedsb.utils.errors import UserError
from fedsb.utils.formatting import delta_text, epsilon_text
from laws.test_codecs import StopAfterOne
from support.server import open_server, replies_of, started

CORE = {"kind": "core", "samples": 30, "R0": "zero", "outer_rank": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield


def private(config: dict[str, Any], **privacy: Any) -> dict[str, Any]:
    return set_all(config, privacy={"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5, **privacy})


class Quiet(SeededNoise):
    """The same draws, and no noise."""

    def normal(self, shape: Any) -> Any:
        return np.zeros(shape)


def with_noise(monkeypatch: pytest.MonkeyPatch, noise: Any) -> None:
    monkeypatch.setattr(setup, "noise_for", noise)


# --- what is drawn, and when ---


def test_rows_and_noise_are_drawn_after_their_line_is_on_disk(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The basis's line, then one for each round; a step's rows are drawn anew for every step."""
    folder = Path(tiny_config["out"]) / "tiny" / "privacy"
    seen: dict[str, list[tuple[str, int]]] = {}

    class Watching(SeededNoise):
        def __init__(self, client: str) -> None:
            super().__init__(0, client)
            self.client = client

        def note(self, what: str) -> None:
            path = folder / f"{self.client}.jsonl"
            seen.setdefault(self.client, []).append((what, len(read_ledger(path)) if path.exists() else 0))

        def poisson_sample(self, rows: int, q: float) -> list[int]:
            self.note("rows")
            return super().poisson_sample(rows, q)

        def normal(self, shape: Any) -> Any:
            self.note("noise")
            return super().normal(shape)

    with_noise(monkeypatch, Watching)
    federate(load_config(set_all(private(tiny_config), basis=CORE)))
    assert len(seen) == 3
    for drawn in seen.values():
        assert [lines for what, lines in drawn if what == "rows"] == [1, *[2] * 3, *[3] * 3, *[4] * 3]
        lines = [lines for _, lines in drawn]
        assert lines == sorted(lines)  # the noise of a step follows its rows
        assert {lines for what, lines in drawn if what == "noise"} == {1, 2, 3, 4}


def test_each_step_is_of_the_rows_drawn_for_it(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Row 3 in the first step and row 1 in the second: two steps of SGD, each along one row's gradient."""

    class InTurn(Quiet):
        order = iter((3, 1))

        def poisson_sample(self, rows: int, q: float) -> list[int]:
            return [next(self.order)]

    with_noise(monkeypatch, lambda client: InTurn(0, client))
    train = {"local_steps": 2, "batch_size": 4, "lr": 0.5, "head_lr": 0.5, "optimizer": "sgd", "max_grad_norm": 0}
    config = set_all(private(tiny_config, clip_norm=1e6, epsilon=None, noise_multiplier=1.0), train=train)
    server, state = started(set_all(config, privacy={}))
    tensors = server.method.model(state)
    trainable = server.method.trainable(tensors, 0)
    site = server.clients[0]
    for row in (3, 1):
        server.trainer.adapted.load(join_tensors(server.trainer.adapted, [tensors]), trainable=trainable)
        logits, batch = forward(server.trainer.adapted.model, server.trainer.task, [site.train[row]])
        server.trainer.task.losses(logits, batch)[0].sum().backward()
        steps = {key: 0.5 * p.grad[0] / 4 for key, p in server.trainer.adapted.parameters().items()}
        tensors = {key: x - steps[key] if key in steps else x for key, x in tensors.items()}
    guarded, _ = started(config, tmp_path)
    for key, x in unpack(replies_of(guarded, state, [site.name])[site.name].payload).tensors.items():
        assert torch.allclose(x, tensors[key], atol=1e-5), key


@pytest.mark.parametrize("long", [0, 2, 3])
def test_a_basis_is_made_of_the_rows_drawn_for_it(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, long: int
) -> None:
    """Each is clipped over all layers together; `long` of the three are longer than the clip."""

    class Some(Quiet):
        def poisson_sample(self, rows: int, q: float) -> list[int]:
            return [5, rows - 2, rows - 1]

    with_noise(monkeypatch, lambda client: Some(0, client))
    config = set_all(private(tiny_config), basis=CORE)
    server = open_server(set_all(config, privacy={}))
    site, basis = server.clients[0], server.config.basis
    outer = outer_basis(basis, server.trainer.adapted, server.method.total_rank, 0, 0)
    common = (server.trainer.adapted, server.trainer.task)
    drawn = [site.train[i] for i in (5, site.rows - 2, site.rows - 1)]
    each = [core_gradients(*common, server.trainer.head, outer, [row], 4) for row in drawn]
    lengths = [
        server.trainer.adapted.scale * float(torch.cat([S.flatten() for S in S_of.values()]).norm()) for S_of in each
    ]
    clip = [2 * max(lengths), *sorted(lengths, reverse=True)][long] * 0.99
    expected = {
        key: sum(S[key] * min(1.0, clip / length) for S, length in zip(each, lengths, strict=True)) for key in each[0]
    }

    server = open_server(set_all(config, privacy={**config["privacy"], "clip_norm": clip}))
    server.policy.open_ledgers(tmp_path, "test", new=True)
    found, rows = core_sums(
        server.config, *common, site, server.trainer.head, outer, draw=server.policy.mechanisms[site.name], round=0
    )
    for key, S in expected.items():
        assert torch.allclose(found[key], S, atol=1e-5 * float(S.abs().max())), key
    assert rows == pytest.approx(30 / sum(client.rows for client in server.clients) * site.rows)  # those expected


# --- the noise ---


def test_every_tensor_and_every_step_has_noise_of_its_own(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With noise shared by tensors of one shape their difference would be without."""
    train = {"local_steps": 1, "batch_size": 4, "lr": 1.0, "head_lr": 1.0, "optimizer": "sgd"}
    config = set_all(private(tiny_config, clip_norm=0.05), train=train, method={"name": "fed-sb", "rank": 16})
    ends: list[dict[str, torch.Tensor]] = []
    for noise in (Quiet, SeededNoise):
        with_noise(monkeypatch, lambda client, noise=noise: noise(0, client))
        server, state = started(config, tmp_path / noise.__name__)
        name = server.clients[0].name
        for round in (0, 1):
            reply = replies_of(server, replace(state, round=round), [name])[name]
            ends.append({f"{round} {key}": x for key, x in unpack(reply.payload).tensors.items()})
    quiet, noisy = ends[0] | ends[1], ends[2] | ends[3]
    parts = [(noisy[key] - quiet[key]).flatten().double() for key in sorted(noisy) if key.endswith(".R")]
    assert len(parts) > 20 and len({len(part) for part in parts}) == 1
    correlations = torch.corrcoef(torch.stack(parts)) - torch.eye(len(parts))
    assert float(correlations.abs().max()) < 5 / len(parts[0]) ** 0.5  # 256 values each


def test_the_steps_do_not_depend_on_how_large_a_loss_is(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only gradients are clipped and noised: losses that rise and fall, with the same gradients, change nothing."""
    with_noise(monkeypatch, lambda client: SeededNoise(0, client))
    losses, calls = Classification.losses, iter(range(10**6))

    def shifted(task: Any, logits: Any, batch: Any) -> Any:
        loss_b, weight_b = losses(task, logits, batch)
        return loss_b + 100.0 * (next(calls) % 3), weight_b

    plain = federate(load_config(private(tiny_config)))
    monkeypatch.setattr(Classification, "losses", shifted)
    other = federate(load_config(private(set_all(tiny_config, name="other"))))
    files = [(run.folder / "adapter" / "adapter_model.safetensors").read_bytes() for run in (plain, other)]
    assert files[0] == files[1]


# --- the ledgers ---


@pytest.mark.parametrize("small", ["a", "c"], ids=["the first is worst", "the last is worst"])
def test_epsilon_is_that_of_the_worst_client(tiny_config: dict[str, Any], tmp_path: Path, small: str) -> None:
    """All have one noise multiplier, so the client with the fewest rows has the largest epsilon."""
    counts = {"a": 30, "b": 30, "c": 30, small: 12}
    names = [name for name, count in counts.items() for _ in range(count)]
    rows = [{**row, "client": name} for row, name in zip(labelled_rows(len(names), 0), names, strict=True)]
    config = set_all(
        private(tiny_config, epsilon=None, noise_multiplier=1.0),
        data={**tiny_config["data"], "train": str(write_rows(tmp_path / "uneven.jsonl", rows))},
        clients={"partition": "column", "column": "client", "holdout_fraction": 0.0},
    )
    done = federate(load_config(config))
    plans, result = read_manifest(done.folder)["privacy"]["plans"], read_result(done.folder)
    assert result is not None
    each = {name: plan["epsilon"] for name, plan in plans.items()}
    assert each[small] > 1.5 * each["b"]
    assert result["epsilon"] == pytest.approx(each[small], rel=1e-6)
    assert read_rows(done.folder / "rounds.jsonl")[-1]["epsilon"] == pytest.approx(each[small], rel=1e-6)
    assert read_manifest(done.folder)["privacy"]["epsilon"] == pytest.approx(each[small], rel=1e-6)


@pytest.mark.parametrize("share", [0.9, "auto"])
def test_a_kill_before_the_first_checkpoint_leaves_the_ledgers(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, share: Any
) -> None:
    """The basis is charged by then. If it cannot be made again within epsilon, the error says how to go on; else the
    run ends a round early."""

    def killed(self: Record, *_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record, "start", killed)
        with pytest.raises(KeyboardInterrupt):
            federate(load_config(set_all(private(tiny_config, basis_share=share), basis=CORE)))
    folder = Path(tiny_config["out"]) / "tiny"
    before = {path: path.read_bytes() for path in (folder / "privacy").glob("*.jsonl")}
    assert len(before) == 3 and all(len(read_ledger(path)) == 1 for path in before)
    if share == "auto":
        result = read_result(resume(folder).folder)
        assert result is not None and result["epsilon"] <= 8.0
        rows = read_rows(folder / "rounds.jsonl")
        assert 0 < len(rows) < 3
        assert rows[-1]["epsilon"] == result["epsilon"] < read_manifest(folder)["privacy"]["epsilon"] * 0.999
    else:
        with pytest.raises(
            PrivacyBudgetExceededError, match=r"before its first round was finished.*--set name=other.*add up"
        ):
            resume(folder)
    for path, content in before.items():
        assert path.read_bytes().startswith(content)


def test_a_kill_in_the_only_round_is_explained(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise is spent, and there is no finished round whose adapter could be exported."""

    def killed(self: Record, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            federate(load_config(private(set_all(tiny_config, rounds=1))))
    for _ in range(2):
        with pytest.raises(PrivacyBudgetExceededError, match=r"before its first round was finished.*--set name=other"):
            resume(Path(tiny_config["out"]) / "tiny")


# --- what is not told ---


def test_scores_on_held_out_private_rows_are_not_told(tiny_config: dict[str, Any]) -> None:
    """Without a test file the held-out rows of the clients would be scored, round by round and at the end."""
    config = set_all(private(tiny_config), data={"train": tiny_config["data"]["train"]})
    done = federate(load_config(config))
    manifest, result = read_manifest(done.folder), read_result(done.folder)
    rows = read_rows(done.folder / "rounds.jsonl")
    assert result is not None and sum(client["held_out_rows"] for client in manifest["clients"]) > 3
    assert [row["score"] for row in rows] == [None] * 3
    assert manifest["before"] == {"score": None, "majority": None, "majority_of_test": None}
    assert result["score"] is None and all(client["score"] is None for client in result["clients"])
    told = json.dumps([manifest, result, rows])
    assert "global_score" not in told
    released = federate(load_config(set_all(config, name="told", privacy={**config["privacy"], "release": ["scores"]})))
    rows, result = read_rows(released.folder / "rounds.jsonl"), read_result(released.folder)
    assert all(row["score"] is not None for row in rows)
    assert result is not None and result["confusion"] is None  # its sums are how many rows each class has
    assert all("confusion" not in row for row in rows)


def test_a_long_row_behind_short_ones_is_refused(tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    """Every row is looked at: each window of a long one would be protected for itself."""
    rows = [{"text": "red1 red2", "client": "a"}] * 5 + [{"text": " ".join(["red1"] * 40), "client": "a"}]
    rows += [{"text": "red1 red2", "client": "b"}] * 6
    config = set_all(
        private(tiny_config, epsilon=None, noise_multiplier=1.0),
        model={"name": str(tiny_llama), "max_seq_length": 16},
        task={"kind": "text"},
        data={"train": str(write_rows(tmp_path / "long.jsonl", rows))},
        clients={"partition": "column", "column": "client", "holdout_fraction": 0.0},
        train={"local_steps": 1, "batch_size": 2},
    )
    with pytest.raises(UserError, match=r"1 of the 6 rows of client 'a' .* would be cut into several examples"):
        federate(load_config(config))


# --- the data's fingerprints ---


def test_no_fingerprint_of_private_rows_can_be_compared_with_a_guess(tiny_config: dict[str, Any]) -> None:
    """Who knows all rows but one could try candidates for it against a plain hash."""
    plain = {name: load_table(tiny_config["data"][name]).fingerprint for name in ("train", "test")}
    found = []
    for name in ("one", "two"):
        done = federate(load_config(private(set_all(tiny_config, name=name))))
        found += [table["fingerprint"] for table in read_manifest(done.folder)["data"].values()]
        for path in done.folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not any(hash.encode() in content for hash in plain.values()), path
        assert not any(hash in (done.folder / "report.html").read_text() for hash in found)
        assert (done.folder / "privacy" / "tables.key").stat().st_mode & 0o077 == 0
    assert len(set(found)) == 4
    public = federate(load_config(set_all(tiny_config, name="public")))
    assert read_manifest(public.folder)["data"]["train"]["fingerprint"] == plain["train"]
    assert plain["train"] in (public.folder / "report.html").read_text()


def test_a_private_run_is_not_resumed_with_other_rows(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(90, 0)
    train = write_rows(tmp_path / "own.jsonl", rows)
    config = private(set_all(tiny_config, data={**tiny_config["data"], "train": str(train)}))
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(config), StopAfterOne())
    folder = Path(tiny_config["out"]) / "tiny"
    write_rows(train, [{**rows[0], "text": "green1 green2"}, *rows[1:]])
    with pytest.raises(UserError, match=r"the train data of .* have changed since the run was started"):
        resume(folder)
    write_rows(train, rows)
    key = folder / "privacy" / "tables.key"
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(UserError, match=r"tables.key does not exist.* Restore the file"):
        resume(folder)
    key.write_bytes(kept)
    assert len(read_rows(resume(folder).folder / "rounds.jsonl")) == 3


# --- what is said ---


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.999, "3"), (3.0, "3"), (3.0001, "3.01"), (1.2341, "1.24"), (0.12345, "0.124"), (123.4, "124")],
)
def test_an_epsilon_is_rounded_up(value: float, text: str) -> None:
    assert epsilon_text(value) == text and float(text) >= value * (1 - 1e-6)
    assert (epsilon_text(0.0), epsilon_text(math.inf), epsilon_text(None)) == ("0", "inf", "–")
    assert (delta_text(1e-5), delta_text(1 / 30001)) == ("1e-05", "3.4e-05")


def test_what_a_private_run_says_of_its_epsilon(tiny_config: dict[str, Any], cli: Callable[..., Said]) -> None:
    """The relation it holds for, that runs add up, that what is printed is no less, and no memory in use."""
    config = set_all(private(tiny_config, epsilon=None, noise_multiplier=1.0), basis=CORE | {"kind": "random"})
    config["clients"] = {"partition": "dirichlet", "count": 3, "holdout_fraction": 0.0}
    done = federate(load_config(config))
    manifest, result = read_manifest(done.folder), read_result(done.folder)
    assert result is not None
    says = manifest["privacy"]
    assert says["relation"] == "zero out one: its place is left empty, and how many there are is public"
    assert says["relation"] in says["says"] and says["relation"] in (done.adapter / "README.md").read_text()
    uncovered = "; ".join(says["not_covered"])
    assert "other runs on the same rows: their epsilons add up" in uncovered
    assert "the number of rows of each class" in uncovered and "which clients' updates arrive" not in uncovered
    told = json.dumps([manifest, result, read_rows(done.folder / "rounds.jsonl")])
    assert set(re.findall(r'"peak_memory_bytes": ([^,}]+)', told)) == {"null"}
    printed = cli("report", done.folder).out
    (stated,) = re.findall(r"epsilon ([0-9.]+) at delta", printed)
    assert float(stated) >= result["epsilon"] * (1 - 1e-6)
    plain = federate(load_config(set_all(tiny_config, name="plain", rounds=1)))
    assert read_result(plain.folder)["peak_memory_bytes"] > 0  # type: ignore[index]


def test_an_unfinished_run_states_an_upper_bound(tiny_config: dict[str, Any], cli: Callable[..., Said]) -> None:
    """After round 3 it is that of round 5: the rounds between those of the statement are not composed."""

    class StopAfterThree(StopAfterOne):
        def round(self, row: Any, rounds: int) -> None:
            if row["round"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(load_config(private(set_all(tiny_config, rounds=7))), StopAfterThree())
    folder = Path(tiny_config["out"]) / "tiny"
    after = read_manifest(folder)["privacy"]["epsilon_after"]
    assert f"epsilon at most {epsilon_text(after['5'])} at delta" in cli("report", folder).out
    result = read_result(resume(folder).folder)
    assert result is not None and f"epsilon {epsilon_text(result['epsilon'])} at delta" in cli("report", folder).out


# --- clients as the unit ---


def test_the_mean_is_over_the_updates_that_arrived(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The noise is on their sum, whoever is missing: on a mean of two of three it is 3 / 2 times as large."""
    with_noise(monkeypatch, lambda client: SeededNoise(0, client))
    privacy = {"unit": "client", "epsilon": 20.0, "delta": 1e-3, "clip_norm": 0.5}
    config = set_all(
        tiny_config, privacy=privacy, server={"weighting": "uniform"}, method={"name": "fed-sb", "rank": 16}
    )
    server, state = started(config, tmp_path)
    payloads = [(name, reply.payload) for name, reply in replies_of(server, state).items()]
    updates, _ = validate_updates(
        payloads, update_rules(server.method, state, server.config.server, "test", basis_hash(state.shared))
    )
    plan = server.policy.plans[setup.SERVER]
    assert (plan.batch, len(updates)) == (3, 3)
    for count in (3, 2):
        arrived = updates[:count]
        mean = server.method.aggregate(state, arrived, ServerOptimizer())
        noised = server.method.aggregate(state, server.policy.add_noise(arrived, 3 - count), ServerOptimizer())
        noise = torch.cat([(noised.tensors[key] - mean.tensors[key]).flatten() for key in mean.tensors])
        assert float(noise.std()) == pytest.approx(plan.sigma * plan.clip / count, rel=0.05)
        assert torch.allclose(
            mean.tensors["classifier.bias"], sum(u.tensors["classifier.bias"] for u in arrived) / count
        )
    said = privacy_statement(server.policy, server.config, 3)
    assert said is not None and "which clients' updates arrive in a round" in "; ".join(said["not_covered"])
