"""Clients in one forward: nothing of one may reach another, and memory tricks may not change a number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.bert.modeling_bert import BertIntermediate

from conftest import WORDS, save_model, set_all
from fedsb.config.load import load_config
from fedsb.server.server import Server
from fedsb.training import joint
from fedsb.training.dropout import Dropout
from fedsb.training.joint import ClientTraining, JointTrainer, RoundTraining
from fedsb.training.resolved import local_training
from fedsb.utils.errors import DivergedError, UserError
from support.server import members_of, open_server, replies_of, started


def train_all(server: Server, members: list[ClientTraining], round: int = 0) -> list[ClientTraining]:
    trainer = JointTrainer(server.trainer.adapted, server.trainer.task, server.local, seed=0)
    trainable = server.method.trainable(members[0].tensors, 0)
    return trainer.train(members, RoundTraining(round=round, trainable=trainable))


def run(config: dict[str, Any], rows: list[int] | None = None, **train: Any) -> list[ClientTraining]:
    server, state = started(set_all(config, train={**config["train"], **train}))
    return train_all(server, members_of(server, state, rows))


def assert_same(one: list[ClientTraining], other: list[ClientTraining], atol: float = 2e-4) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-4)
        moved = 0.0
        for key, value in a.tensors.items():
            torch.testing.assert_close(b.tensors[key], value, rtol=0, atol=atol)
            moved = max(moved, float(value.abs().max()) if key.endswith(".R") else 0.0)
        assert moved > 10 * atol  # there was something to compare


# --- losses ---


def test_a_nan_loss_names_client_and_round(tiny_config: dict[str, Any]) -> None:
    server, state = started(tiny_config)
    members = members_of(server, state)
    sick = members[1]
    broken = {key: value * math.nan if key.endswith(".R") else value for key, value in sick.tensors.items()}
    members[1] = ClientTraining(name=sick.name, examples=sick.examples, tensors=broken)
    with pytest.raises(DivergedError, match=rf"'{sick.name}' became nan in round 3, local step 1.*checkpoint"):
        train_all(server, members, round=2)


def test_the_loss_is_the_mean_over_the_steps_rows(tiny_config: dict[str, Any]) -> None:
    """At R = 0 the first loss is the plain model's cross entropy over the batch: about ln 3 with a small head."""
    for member in run(tiny_config, local_steps=1, batch_size=8):
        assert member.losses == pytest.approx([math.log(3)], abs=0.05)
        assert member.loss == member.losses[0]


def test_on_a_bfloat16_base_small_steps_still_count(tiny_config: dict[str, Any]) -> None:
    """Three steps of about 1e-5 from R = 1: lost in bfloat16, whose next number below 1 is 0.996."""
    base = {**tiny_config["model"], "dtype": "bfloat16"}
    server, state = started(set_all(tiny_config, model=base, train={**tiny_config["train"], "lr": 1e-5}))
    (member, *_) = members_of(server, state)
    ones = {key: torch.ones_like(t) if key.endswith(".R") else t for key, t in member.tensors.items()}
    (after,) = train_all(server, [ClientTraining(name=member.name, examples=member.examples, tensors=ones)])
    for key, value in after.tensors.items():
        assert value.dtype == torch.float32
        if key.endswith(".R"):
            assert 0 < float((value - 1).abs().max()) < 5e-5


# --- accumulation ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulation_equals_a_large_batch(tiny_config: dict[str, Any], dropout: float) -> None:
    """12 rows at once, 4 x 3 and 3 x 4: one loss, one step, one set of dropout masks."""
    whole = run(tiny_config, local_steps=2, batch_size=12, dropout=dropout)
    for batch_size, accumulate in ((3, 4), (4, 3)):
        train = {"batch_size": batch_size, "gradient_accumulation_steps": accumulate, "dropout": dropout}
        assert_same(whole, run(tiny_config, local_steps=2, **train))


def test_a_short_last_batch_is_a_mean_over_its_own_rows(tiny_config: dict[str, Any]) -> None:
    """5, 7 and 3 rows in batches of 4, together and alone: 4 + 1, 4 + 3, and 3."""
    train = {"local_steps": None, "local_epochs": 1, "batch_size": 4}
    joint = run(set_all(tiny_config, engine={"clients_per_forward": 3}), [5, 7, 3], **train)
    server, state = started(set_all(tiny_config, train={"local_epochs": 1, "batch_size": 4, "lr": 0.02}))
    alone = [train_all(server, [member])[0] for member in members_of(server, state, [5, 7, 3])]
    assert [len(member.losses) for member in joint] == [2, 2, 1]
    assert_same(alone, joint)


# --- dropout ---

CPU = torch.device("cpu")
KEYS = [(0, "dropout", name, 0, 0) for name in ("a", "b")]


def mask(keys: list[Any], rows: int, tokens: int, first: int = 0, layer: str = "x", p: float = 0.5) -> torch.Tensor:
    return Dropout(p, keys, first, rows * len(keys), CPU)(layer, torch.ones(rows * len(keys), tokens, 6))


def test_masks_depend_neither_on_padding_nor_on_company_nor_on_micro_batches() -> None:
    both = mask(KEYS, 4, 5)
    a, b = both[:4], both[4:]
    assert torch.equal(mask(KEYS[:1], 4, 5), a)  # alone
    assert torch.equal(mask(KEYS[1:], 4, 5), b)
    assert torch.equal(mask(KEYS[::-1], 4, 5), torch.cat([b, a]))  # in another order
    assert torch.equal(mask(KEYS, 4, 9)[:, :5], both)  # padded further
    assert torch.equal(mask(KEYS[:1], 2, 5), a[:2])  # in a narrower batch
    assert torch.equal(mask(KEYS[:1], 2, 5, first=2), a[2:])  # in the second micro-batch
    assert torch.equal(
        Dropout(0.5, KEYS[:1], 0, 4, CPU)("x", torch.ones(4, 6)), mask(KEYS[:1], 4, 1)[:, 0]
    )  # no token axis


def test_masks_differ_by_client_row_layer_and_step() -> None:
    a = mask(KEYS[:1], 2, 50)
    assert not torch.equal(a[0], a[1])
    for other in (
        mask(KEYS[1:], 2, 50),
        mask(KEYS[:1], 2, 50, layer="y"),
        mask([(0, "dropout", "a", 0, 1)], 2, 50),
        mask([(0, "dropout", "a", 1, 0)], 2, 50),
        mask([(1, "dropout", "a", 0, 0)], 2, 50),
    ):
        assert 0.3 < float((other == a).float().mean()) < 0.7


def test_a_layer_that_sees_tokens_gets_a_mask_for_each() -> None:
    """One client, 4 rows of 25 tokens, flattened: no token's mask comes twice, here or in another micro-batch."""
    x = torch.ones(100, 16)
    flat = Dropout(0.5, KEYS[:1], 0, 4, CPU)("x", x)
    assert len(flat.unique(dim=0)) == 100
    assert torch.equal(Dropout(0.5, KEYS[:1], 0, 4, CPU)("x", x), flat)
    assert 0.4 < float((Dropout(0.5, KEYS[:1], 4, 4, CPU)("x", x) == flat).float().mean()) < 0.6


def test_dropout_keeps_the_mean() -> None:
    """p = 0.2: a fifth is 0, the rest 1.25."""
    got = mask(KEYS, 20, 100, p=0.2)
    assert set(got.unique().tolist()) == {0.0, 1.25}
    assert float(got.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "fedit", "rank": 2}])
def test_a_client_with_short_batches_keeps_its_masks_in_company(
    tiny_config: dict[str, Any], method: dict[str, Any]
) -> None:
    config = set_all(tiny_config, method=method, train={"local_epochs": 2, "batch_size": 4, "lr": 0.02, "dropout": 0.4})
    server, state = started(config)
    members = members_of(server, state, [3, 4, 2])  # all of one step an epoch, of three widths
    alone = [train_all(server, [member])[0] for member in members]
    for a, b in zip(alone, train_all(server, members), strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-5)


# --- the base's own dropout, and activation checkpointing ---


@pytest.fixture(scope="module")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose blocks have dropout of their own, beside that of their parts, and flatten rows into tokens."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=48,
        max_position_embeddings=64,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
        init_std=0.5,
    )
    return save_model(tmp_path_factory.mktemp("tiny-opt"), OPTForCausalLM(config))


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama", "tiny_opt"])
def test_activation_checkpointing_changes_nothing(
    tiny_config: dict[str, Any], request: pytest.FixtureRequest, model: str
) -> None:
    """With adapter dropout, whose masks are drawn again; and the base's own dropout (BERT's 0.1, OPT's 0.5) is off."""
    folder = request.getfixturevalue(model)
    ends = []
    for checkpointing in (False, True):
        base = {"name": str(folder), "max_seq_length": 16, "activation_checkpointing": checkpointing}
        config = set_all(tiny_config, model=base)
        if model != "tiny_bert":
            config = set_all(config, task={"kind": "text"}, clients={"partition": "iid", "count": 3})
        server, state = started(set_all(config, train={**tiny_config["train"], "dropout": 0.2}))
        blocks = [
            m for m in server.trainer.base.model.modules() if getattr(m, "gradient_checkpointing", False) and m.training
        ]
        assert bool(blocks) == checkpointing
        ends.append([train_all(server, [member])[0] for member in members_of(server, state)])
        score = server.trainer.evaluate(server.method.model(state), server.clients[0].train)
        assert score == server.trainer.evaluate(server.method.model(state), server.clients[0].train)
    assert_same(*ends, atol=1e-6)


def test_checkpointing_runs_the_blocks_twice(tiny_config: dict[str, Any]) -> None:
    """The second time in the backward: it is on, not merely harmless."""
    calls = []
    for checkpointing in (False, True):
        base = {**tiny_config["model"], "activation_checkpointing": checkpointing}
        server, state = started(set_all(tiny_config, model=base, train={**tiny_config["train"], "local_steps": 1}))
        count: list[int] = []
        layer = server.trainer.adapted.layers["bert.encoder.layer.0.intermediate.dense"]
        layer.register_forward_hook(lambda *_: count.append(1))  # noqa: B023
        train_all(server, members_of(server, state))
        calls.append(len(count))
    assert calls == [1, 2]


# --- routing ---


@pytest.fixture
def flattening(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT whose feed-forward layers see tokens, not rows, as those of a mixture of experts do."""
    real = BertIntermediate.forward

    def flat(self: Any, x: torch.Tensor) -> torch.Tensor:
        return real(self, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    monkeypatch.setattr(BertIntermediate, "forward", flat)


def choice(server: Server) -> tuple[Any, str]:
    (found,) = (c for c in server.settings if c.key == "engine.clients_per_forward")
    return found.value, found.reason


def test_a_model_whose_rows_cannot_be_routed_trains_one_client_at_a_time(
    tiny_config: dict[str, Any], flattening: None
) -> None:
    server, state = started(tiny_config)
    value, reason = choice(server)
    assert value == server.channel.clients_per_forward == 1
    assert reason.startswith("auto: Layer 'bert.encoder.layer.0.intermediate.dense' receives")
    (reply,) = replies_of(server, state, [server.clients[0].name]).values()
    assert reply.loss is not None and not server.opened.local_clients.client_states(1)
    with pytest.raises(UserError, match=r"engine.clients_per_forward = 2: Layer 'bert.*engine.clients_per_forward = 1"):
        open_server(set_all(tiny_config, engine={"clients_per_forward": 2}))
    assert choice(open_server(set_all(tiny_config, engine={"clients_per_forward": 1}))) == (1, "as asked")


def test_opt_flattens_its_rows(tiny_config: dict[str, Any], tiny_opt: Path) -> None:
    config = set_all(tiny_config, model={"name": str(tiny_opt), "max_seq_length": 16}, task={"kind": "text"})
    value, reason = choice(open_server(config))
    assert value == 1 and "'model.decoder.layers.0.fc1' receives 32 rows, and the batch has 2" in reason
    attention = {"name": str(tiny_opt), "max_seq_length": 16, "target_modules": ["q_proj", "v_proj"]}
    assert choice(open_server(set_all(config, model=attention)))[0] == 64  # its attention does not


def test_the_cohort_size_and_its_reason(tiny_config: dict[str, Any]) -> None:
    assert choice(open_server(tiny_config)) == (64, "auto: up to 4,096 tokens in one forward on cpu")  # 4096 / (4 x 16)
    assert choice(open_server(set_all(tiny_config, engine={"clients_per_forward": 2}))) == (2, "as asked")
    alone = set_all(tiny_config, clients={"partition": "iid", "count": 1})
    assert choice(open_server(alone)) == (1, "there is one client")


def test_the_cohort_size_fits_the_memory(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate for the clients of one forward stays below the device's memory, and the reason says so."""
    from fedsb.channels import in_process

    server = open_server(tiny_config)
    sizes = {}
    for mib in (64, 2, 1):
        monkeypatch.setattr(in_process, "memory_of_all", lambda *_, mib=mib: mib << 20)
        sizes[mib], reason = choice(open_server(tiny_config))
        assert ("as many as fit the memory" in reason) == (mib < 64)
    assert server.channel.clients_per_forward == sizes[64] > sizes[2] > sizes[1] >= 1


def test_a_pooled_client_takes_the_steps_of_a_rounds_clients(tiny_config: dict[str, Any]) -> None:
    """10 clients of which 4 take part in a round, 3 steps each: 12."""
    config = load_config(set_all(tiny_config, server={"clients_per_round": 4})).config
    assert local_training(config, clients=10).steps == 12
    assert local_training(config, clients=3).steps == 9
    assert local_training(config).steps == 3


def test_moments_are_kept_only_where_asked(tiny_config: dict[str, Any]) -> None:
    """The second round continues from the moments of the first, and counts the steps that they have seen."""
    for persist in (True, False):
        train = {**tiny_config["train"], "persist_optimizer_state": persist}
        server, state = started(set_all(tiny_config, train=train))
        for round in (1, 2):
            state = server.run_round(state).state
            states = server.opened.local_clients.client_states(round)
            assert set(states) == ({client.name for client in server.clients} if persist else set())
            assert all(float(own["optimizer/steps"]) == 3 * round for own in states.values())


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("kind", ["classification", "text"])
def test_a_compiled_step_is_one_graph_that_is_compiled_once(
    kind: str, together: int, tiny_config: dict[str, Any], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is loaded into the adapter, and however long the rows are below the window."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(joint, "COMPILER", counter)
    more = {"model": {"name": str(tiny_llama), "max_seq_length": 16}, "task": {"kind": "text"}}
    config = set_all(tiny_config, rounds=3, **(more if kind == "text" else {}))
    config = set_all(config, engine={"clients_per_forward": together}, clients={"partition": "iid", "count": 3})
    plain, state = started(config)
    server, own = started(set_all(config, model={**config["model"], "compile": True}))
    torch._dynamo.reset()
    for round in range(3):
        if round == 1:
            counter.clear()
        state, own = plain.run_round(state).state, server.run_round(own).state
        if round == 0:
            assert counter.frame_count == 1
    assert counter.frame_count == 0
    for key, value in state.tensors.items():
        torch.testing.assert_close(own.tensors[key], value, atol=1e-5, rtol=1e-4)
