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
from fedsb.adapters.basis import basis_hash
from fedsb.adapters.core import tied_name
from fedsb.config.load import load_config
from fedsb.config.registry import method_type
from fedsb.methods.averaging import ServerOptimizer
from fedsb.protocol.payload import unpack
from fedsb.runs.evaluate import evaluate_tables
from fedsb.runs.record import Record
from fedsb.runs.run import federate, resume
from fedsb.server.server import Server
from fedsb.server.validation import update_rules, validate_updates
from fedsb.training.joint import ClientTraining, JointTrainer, RoundTraining
from laws import CONTROLS
from support.server import open_server, replies_of, started

METHODS = [
    pytest.param({"name": "fed-sb", "rank": 4}, id="fed-sb"),
    pytest.param({"name": "fed-sb", "rank": 3, "blocks": 2, "tied": True}, id="fed-sb, two blocks, tied"),
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


def names(server: Server) -> list[str]:
    return [site.name for site in server.clients]


@pytest.mark.parametrize("method", METHODS)
def test_law_4_bytes(tiny_config: dict[str, Any], method: dict[str, Any]) -> None:
    """Values measured on the serialised payloads equal traffic(), round by round; the message adds under 3 kB."""
    server, state = started(set_all(tiny_config, method=method))
    head = sum(t.numel() for t in server.trainer.head.values())
    for round in range(3):
        result = server.run_round(state)
        state = result.state
        priced = server.method.traffic(server.trainer.shapes, head=head, clients=len(server.clients), round=round)
        if server.method.spec.pools_data:
            assert not result.traffic  # the rows are already where the training is
            continue
        assert len(result.traffic) == 2 * len(server.clients)
        for sent in result.traffic:
            most = (priced.up if sent.direction == "up" else priced.down) + priced.head
            assert sent.values == most or (server.method.spec.id == "hetlora" and sent.values < most)  # pruned
            assert sent.head_values == priced.head
            assert sent.bytes == 4 * sent.values
            assert sent.bytes < sent.wire_bytes < sent.bytes + 3000


def test_law_4_bytes_of_a_client_that_missed_a_round(tiny_config: dict[str, Any]) -> None:
    """It gets the whole residual adapter, never more than the layers' own size."""
    server, state = started(set_all(tiny_config, method={"name": "fedex-lora", "rank": 2}))
    for _ in range(3):
        state = server.run_round(state).state
    payloads = {
        missed: server.compressor.broadcast(
            server.method, state, state, basis_hash(state.shared), missed_last_round=missed, total_rank=None
        )
        for missed in (True, False)
    }
    late, up_to_date = (unpack(payloads[missed]).values for missed in (True, False))
    assert up_to_date < late
    dense = sum(m * n for m, n in server.trainer.shapes.values())
    factors = server.method.traffic(server.trainer.shapes, head=0, clients=1).up
    assert late <= dense + factors + sum(t.numel() for t in server.trainer.head.values())


@pytest.mark.parametrize("basis", ["random", "weights", "core", "update-pooled"])
def test_law_4_bytes_of_a_basis(tiny_config: dict[str, Any], basis: str) -> None:
    server = open_server(set_all(tiny_config, basis={"kind": basis, "share_samples": 0}))
    server.opened.local_clients.start(server.policy, None, {})
    _, made, sent = server.start()
    assert made is not None
    for direction, values in (("up", made.up), ("down", made.down)):
        measured = [each.values for each in sent if each.direction == direction]
        assert measured == ([values] * len(server.clients) if values else [])


@pytest.mark.parametrize("method", METHODS)
def test_law_5_resume_is_bit_exact(tiny_config: dict[str, Any], tmp_path: Path, method: dict[str, Any]) -> None:
    """Three rounds equal one round, a stop in the middle of the second, a resume and the rest: bit for bit."""
    facts = method_type(method["name"]).spec
    train = {
        **tiny_config["train"],
        "persist_optimizer_state": not facts.rotates_basis,
        "dropout": 0.1,
        "schedule": "cosine",
    }
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
        pytest.param("tiny_bert", CLASSES, "AutoModelForSequenceClassification", marks=pytest.mark.long),
        ("tiny_bert", {**CLASSES, "pooling": "mean"}, "AutoModelForTokenClassification"),
        ("tiny_llama", {"kind": "text"}, "AutoModelForCausalLM"),
        pytest.param("tiny_gpt2", {"kind": "text"}, "AutoModelForCausalLM", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fed-sb", "rank": 3, "blocks": 2, "tied": True},
        pytest.param({"name": "ravan", "rank": 3, "blocks": 2}, marks=pytest.mark.long),
        pytest.param({"name": "fedit", "rank": 2, "alpha": 6}, marks=pytest.mark.long),
        {"name": "fedex-lora", "rank": 2, "alpha": 6},
        pytest.param({"name": "flora", "rank": 1, "alpha": 3}, marks=pytest.mark.long),
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
    server = open_server(config)
    record = Record(finished.folder, Record.open(finished.folder).manifest)
    state = record.latest()
    assert state is not None
    inputs, logits = server.trainer.logits(server.method.model(state), server.probes)
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


@pytest.mark.parametrize("length", [{"local_steps": 3}, {"local_epochs": 1}])
@pytest.mark.parametrize("method", [p for p in METHODS if "central" not in str(p.id)])
def test_law_7_together_equals_one_after_another(
    tiny_config: dict[str, Any], method: dict[str, Any], length: dict[str, int]
) -> None:
    """Clients of unequal sizes, with dropout, accumulation, clipping and a schedule."""
    train = {
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "lr": 0.02,
        "dropout": 0.2,
        "schedule": "linear",
        "warmup": 0.2,
        **length,
    }
    ends = []
    for clients_per_forward in (1, 2, 3):
        server, state = started(
            set_all(tiny_config, method=method, train=train, engine={"clients_per_forward": clients_per_forward})
        )
        replies = replies_of(server, state)
        payloads = {name: unpack(reply.payload) for name, reply in replies.items()}
        assert all(payload.client == name for name, payload in payloads.items())
        kept = {name: {} for name in payloads} | server.opened.local_clients.client_states(1)
        losses = {name: reply.loss for name, reply in replies.items()}
        ends.append(({name: payload.tensors for name, payload in payloads.items()}, kept, losses))
    for tensors, kept, losses in ends[1:]:
        for client in ends[0][0]:
            assert losses[client] == pytest.approx(ends[0][2][client], rel=1e-4)
            for key, value in ends[0][0][client].items():
                assert torch.allclose(tensors[client][key], value, atol=2e-4), (client, key)
            for key, value in ends[0][1][client].items():
                assert torch.allclose(kept[client][key], value, atol=2e-4), (client, key)


@pytest.mark.parametrize("method", [p for p in METHODS if "central" not in str(p.id)])
def test_law_3_dropping_a_client_equals_running_without_it(tiny_config: dict[str, Any], method: dict[str, Any]) -> None:
    """One of three sends garbage: the others' average is that of a round in which it never was."""
    server, state = started(set_all(tiny_config, method=method))
    rules = update_rules(server.method, state, server.config.server, "test", basis_hash(state.shared))
    first, second, third = names(server)
    payloads = {name: reply.payload for name, reply in replies_of(server, state).items()}
    updates, dropped = validate_updates((payloads | {second: b"garbage"}).items(), rules)
    assert [drop.client for drop in dropped] == [second]
    server, state = started(set_all(tiny_config, method=method))
    without = {name: reply.payload for name, reply in replies_of(server, state, [first, third]).items()}
    others, _ = validate_updates(without.items(), rules)
    ends = [server.method.aggregate(state, good, ServerOptimizer()).tensors for good in (updates, others)]
    for key, value in ends[0].items():
        assert torch.allclose(value, ends[1][key], atol=1e-5), key  # trained in other company: to float tolerance


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_law_11_what_should_move_moves_and_nothing_else(
    tiny_config: dict[str, Any], method: dict[str, Any], round: int
) -> None:
    """One local step from a state with every tensor that trains non-zero, in the adapter as it stands in the model."""
    train = {**tiny_config["train"], "local_steps": 1}
    server, state = started(set_all(tiny_config, method=method, train=train))
    base = {key: p.detach().clone() for key, p in server.trainer.base.model.named_parameters() if ".base." in key}
    draw = torch.Generator().manual_seed(0)
    site, own = server.clients[0], server.method
    before = own.init_client(state.shared, own.broadcast(state), {}, round)
    moving = own.trainable(before, round)
    before = {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in sorted(before.items())}
    member = ClientTraining(name=site.name, examples=site.train, tensors=before)
    joint = JointTrainer(server.trainer.adapted, server.trainer.task, server.local, seed=0)
    (trained,) = joint.train([member], RoundTraining(round=round, trainable=moving))
    for key in before:
        assert (not torch.equal(before[key], trained.tensors[key])) == (key in moving), key
    for key, value in base.items():
        assert torch.equal(dict(server.trainer.base.model.named_parameters())[key], value), key
    for layer in server.trainer.shapes:
        assert any(key.startswith((layer, tied_name(layer))) for key in moving)
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
