"""Laws 3 to 7 and 11: whole runs of every method on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import adapter_bytes, set_all
from fedsb.channels.in_process import EmbeddedEngine
from fedsb.config.load import load_config
from fedsb.config.schema import method_of
from fedsb.methods import method_type
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import State
from fedsb.protocol.payload import unpack
from fedsb.runs.evaluate import evaluate_tables
from fedsb.runs.record import Record
from fedsb.runs.run import federate, resume
from fedsb.server.types import Replies
from fedsb.server.validation import rules, validate_updates
from fedsb.training.joint import Member, train_together
from laws import CONTROLS

METHODS = [
    pytest.param({"name": "fed-sb", "rank": 4}, id="fed-sb"),
    pytest.param({"name": "fed-sb", "rank": 3, "blocks": 2}, id="fed-sb, two blocks"),
    pytest.param({"name": "ravan", "rank": 2, "blocks": 3}, id="ravan"),
    pytest.param({"name": "fedit", "rank": 2, "alpha": 6}, id="fedit"),
    *(
        pytest.param({"name": name, "rank": 2, "alpha": 6}, id=name)
        for name in ("ffa-lora", "rolora", "fedsa-lora", "fedex-lora", "flora", "flexlora", "flora-na", "fedsvd")
    ),
    pytest.param({"name": "fedrot-lora", "rank": 2, "alpha": 6}, id="fedrot-lora"),
    pytest.param({"name": "hetlora", "rank": 4, "alpha": 6, "gamma": 0.5, "penalty_weight": 0.1}, id="hetlora"),
    *CONTROLS,
]


def open_engine(config: dict[str, Any]) -> tuple[EmbeddedEngine, State]:
    settings = load_config(config).config
    engine = EmbeddedEngine(settings, method_of(settings), "test")
    basis, _ = engine.build_basis(engine.method)
    return engine, engine.method.start(engine.shapes, basis, engine.head, settings.seed)


def names(engine: EmbeddedEngine) -> list[str]:
    return [site.name for site in engine.sites]


@pytest.mark.parametrize("method", METHODS)
def test_law_4_bytes(tiny_config: dict[str, Any], method: dict[str, Any]) -> None:
    """Values measured on the serialized envelopes equal traffic(), round by round; the envelope adds under 2 kB."""
    engine, state = open_engine(set_all(tiny_config, method=method))
    kept: dict[str, Any] = {}
    head = sum(t.numel() for t in engine.head.values())
    for round in range(3):
        replies, state, kept = one_round(engine, state, kept)
        priced = engine.method.traffic(engine.shapes, head=head, clients=len(engine.sites), round=round)
        if engine.method.spec.pools_data:
            assert not replies.sent  # the rows are already where the training is
            continue
        assert len(replies.sent) == 2 * len(engine.sites)
        for sent in replies.sent:
            most = (priced.up if sent.direction == "up" else priced.down) + priced.head
            assert sent.values == most or (engine.method.spec.id == "hetlora" and sent.values < most)  # pruned
            assert sent.head_values == priced.head
            assert sent.bytes == 4 * sent.values
            assert sent.bytes < sent.wire_bytes < sent.bytes + 3000


def test_law_4_bytes_of_a_late_site(tiny_config: dict[str, Any]) -> None:
    """A site that missed a round gets the whole carried adapter, never more than the layers' own size."""
    engine, state = open_engine(set_all(tiny_config, method={"name": "fedex-lora", "rank": 2}))
    kept: dict[str, Any] = {}
    for _ in range(3):
        _, state, kept = one_round(engine, state, kept)
    everyone = names(engine)
    sent = {
        each.client: each.values
        for reply in engine.train(engine.method, state, everyone, kept, {everyone[0]}).each
        for each in reply.sent
        if each.direction == "down"
    }
    assert sent[everyone[1]] == sent[everyone[2]] < sent[everyone[0]]
    dense = sum(m * n for m, n in engine.shapes.values())
    factors = engine.method.traffic(engine.shapes, head=0, clients=1).up
    assert sent[everyone[0]] <= dense + factors + sum(t.numel() for t in engine.head.values())


@pytest.mark.parametrize("basis", ["random", "weights", "core", "update-pooled"])
def test_law_4_bytes_of_a_basis(tiny_config: dict[str, Any], basis: str) -> None:
    engine, _ = open_engine(set_all(tiny_config, basis={"kind": basis, "share_samples": 0}))
    made, sent = engine.build_basis(engine.method)
    assert made is not None
    for direction, values in (("up", made.up), ("down", made.down)):
        measured = [each.values for each in sent if each.direction == direction]
        assert measured == ([values] * len(engine.sites) if values else [])


@pytest.mark.parametrize("method", METHODS)
def test_law_5_resume_is_bit_exact(tiny_config: dict[str, Any], tmp_path: Path, method: dict[str, Any]) -> None:
    """Three rounds equal one round, a stop in the middle of the second, a resume and the rest: bit for bit."""
    facts = method_type(method["name"]).spec
    train = {**tiny_config["train"], "keep_optimizer": not facts.rotates_basis, "dropout": 0.1, "schedule": "cosine"}
    server = {"clients_per_round": 2, "optimizer": "momentum" if facts.supports_server_optimizer else "none"}
    config = set_all(tiny_config, method=method, train=train, server=server)
    whole = federate(load_config(set_all(config, out=str(tmp_path / "whole"))))

    class StopAfter:
        def settings(self, choices: Any) -> None: ...
        def note(self, text: str) -> None: ...
        def round(self, row: Any, rounds: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(load_config(set_all(config, out=str(tmp_path / "broken"))), StopAfter())
    folder = tmp_path / "broken" / "tiny"
    # What a run leaves behind that is killed while it writes its second round:
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "loss": 99}\n{"round": 3, "lo')
    (folder / "checkpoints" / ".round-0002.1").mkdir()
    broken = resume(folder)
    assert adapter_bytes(whole.folder) == adapter_bytes(broken.folder)
    assert broken.score == whole.score
    rows = [Record(path, {}).rows("rounds.jsonl") for path in (whole.folder, broken.folder)]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]


RELOAD = """
import sys, json, torch
sys.modules["fedsb"] = None  # any import of fedsb fails
from transformers import {auto}
from peft import PeftModel
base = {auto}.from_pretrained({base!r}{labels})
model = PeftModel.from_pretrained(base, {adapter!r}).eval()
saved = torch.load({inputs!r}, weights_only=True)
print(float((model(**saved["inputs"]).logits - saved["logits"]).abs().max()))
"""


CLASSES = {"kind": "classification"}


@pytest.mark.parametrize(
    ("model", "task", "auto"),
    [
        ("tiny_bert", CLASSES, "AutoModelForSequenceClassification"),
        ("tiny_bert", {**CLASSES, "pooling": "mean"}, "AutoModelForTokenClassification"),
        ("tiny_llama", {"kind": "text"}, "AutoModelForCausalLM"),
        ("tiny_gpt2", {"kind": "text"}, "AutoModelForCausalLM"),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fed-sb", "rank": 3, "blocks": 2},
        {"name": "ravan", "rank": 3, "blocks": 2},
        {"name": "fedit", "rank": 2, "alpha": 6},
        {"name": "fedex-lora", "rank": 2, "alpha": 6},
        {"name": "flora", "rank": 1, "alpha": 3},
    ],
    ids=lambda method: method["name"],
)
def test_law_6_export_reloads_without_fedsb(
    tiny_config: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    model: str,
    task: dict[str, str],
    auto: str,
    method: dict[str, Any],
) -> None:
    folder = request.getfixturevalue(model)
    config = set_all(tiny_config, method=method, task=task, rounds=2, model={"name": str(folder), "max_seq_length": 16})
    if model != "tiny_bert":
        config = set_all(config, clients={"partition": "iid", "count": 3})
    finished = federate(load_config(config))
    engine, _ = open_engine(config)
    record = Record(finished.folder, Record.open(finished.folder).manifest)
    state = record.latest()
    assert state is not None
    inputs, logits = engine.logits(engine.method.model(state), engine.probes)
    torch.save({"inputs": inputs, "logits": logits}, tmp_path / "probe.pt")
    script = RELOAD.format(
        auto=auto,
        base=str(folder),
        labels=", num_labels=3" if model == "tiny_bert" else "",
        adapter=str(finished.adapter),
        inputs=str(tmp_path / "probe.pt"),
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1e-5
    if model == "tiny_bert":  # scored through PEFT, as it was in the run
        assert evaluate_tables(finished.folder)["mean"] == pytest.approx(finished.score)


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 1}])
@pytest.mark.parametrize("method", [p for p in METHODS if "central" not in str(p.id)])
def test_law_7_together_equals_one_after_another(
    tiny_config: dict[str, Any], method: dict[str, Any], length: dict[str, int]
) -> None:
    """Clients of unequal sizes, with dropout, accumulation, clipping and a schedule."""
    train = {
        "batch_size": 3,
        "accumulate": 2,
        "lr": 0.02,
        "dropout": 0.2,
        "schedule": "linear",
        "warmup": 0.2,
        **length,
    }
    ends = []
    for clients_per_forward in (1, 2, 3):
        engine, state = open_engine(
            set_all(tiny_config, method=method, train=train, engine={"clients_per_forward": clients_per_forward})
        )
        replies = engine.train(engine.method, state, names(engine), {})
        envelopes = {name: unpack(envelope) for name, envelope in replies.envelopes}
        assert all(payload.client == name for name, payload in envelopes.items())
        ends.append(({n: p.tensors for n, p in envelopes.items()}, replies.kept, replies.losses))
    for tensors, kept, losses in ends[1:]:
        for client in ends[0][0]:
            assert losses[client] == pytest.approx(ends[0][2][client], rel=1e-4)
            for key, value in ends[0][0][client].items():
                assert torch.allclose(torch.tensor(tensors[client][key]), torch.tensor(value), atol=2e-4), (client, key)
            for key, value in ends[0][1][client].items():
                assert torch.allclose(kept[client][key], value, atol=2e-4), (client, key)


def one_round(engine: EmbeddedEngine, state: State, kept: dict[str, Any]) -> tuple[Replies, State, dict[str, Any]]:
    replies = engine.train(engine.method, state, names(engine), kept)
    updates, dropped = validate_updates(
        replies.envelopes, rules(engine.method, state, engine.config.server, "test", {})
    )
    assert not dropped
    return replies, engine.method.aggregate(state, updates, ServerOptimizer()), {**kept, **replies.kept}


@pytest.mark.parametrize("method", [p for p in METHODS if "central" not in str(p.id)])
def test_law_3_dropping_a_client_equals_running_without_it(tiny_config: dict[str, Any], method: dict[str, Any]) -> None:
    """One of three sends garbage: the others' average is that of a round in which it never was."""
    engine, state = open_engine(set_all(tiny_config, method=method))
    server = rules(engine.method, state, engine.config.server, "test", {})
    everyone = names(engine)
    replies = engine.train(engine.method, state, everyone, {})
    spoilt = [(name, b"garbage" if name == everyone[1] else envelope) for name, envelope in replies.envelopes]
    updates, dropped = validate_updates(spoilt, server)
    assert [drop.client for drop in dropped] == [everyone[1]]
    without = engine.train(engine.method, state, [everyone[0], everyone[2]], {})
    others, _ = validate_updates(without.envelopes, server)
    ends = [engine.method.aggregate(state, good, ServerOptimizer()).tensors for good in (updates, others)]
    for key, value in ends[0].items():
        assert torch.allclose(value, ends[1][key], atol=1e-5), key  # trained in other company: to float tolerance


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_law_11_what_should_move_moves_and_nothing_else(
    tiny_config: dict[str, Any], method: dict[str, Any], round: int
) -> None:
    """One local step from a state with every tensor that trains non-zero, in the adapter as it stands in the model."""
    train = {**tiny_config["train"], "steps": 1}
    engine, state = open_engine(set_all(tiny_config, method=method, train=train))
    base = {key: p.detach().clone() for key, p in engine.base.model.named_parameters() if ".base." in key}
    draw = torch.Generator().manual_seed(0)
    site, own = engine.sites[0], engine.method
    before = own.init_client(state.shared, own.broadcast(state), {}, round)
    moving = own.trainable(before, round)
    before = {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in sorted(before.items())}
    member = Member(name=site.name, examples=site.train, tensors=before)
    (trained,) = train_together(engine.adapted, engine.task, [member], moving, engine.local, seed=0, round=round)
    for key in before:
        assert (not torch.equal(before[key], trained.tensors[key])) == (key in moving), key
    for key, value in base.items():
        assert torch.equal(dict(engine.base.model.named_parameters())[key], value), key
    for layer in engine.shapes:
        assert any(key.startswith(layer) for key in moving)
    sent, kept = own.upload(before, trained.tensors, round)
    told = {key for key in (*sent, *kept) if key in before}
    assert told == {key for key in moving if not key.endswith(".s")}  # all that moved is sent or kept; s is in s R


def test_the_adapter_of_a_run_holds_the_product_of_its_state(tiny_config: dict[str, Any]) -> None:
    """lora_B = B R, lora_A = A, alpha = h r: checked on the files, not through PEFT."""
    import json

    finished = federate(load_config(set_all(tiny_config, rounds=1)))
    state = Record(finished.folder, Record.open(finished.folder).manifest).latest()
    assert state is not None
    files = load_file(finished.adapter / "adapter_model.safetensors")
    settings = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 4, "LORA")
    layer = "bert.encoder.layer.0.attention.self.query"
    R = state.tensors[f"{layer}.R"][0]
    assert R.abs().max() > 0
    assert torch.equal(files[f"base_model.model.{layer}.lora_B.weight"], state.shared[f"{layer}.B"] @ R)
    assert torch.equal(files[f"base_model.model.{layer}.lora_A.weight"], state.shared[f"{layer}.A"])
