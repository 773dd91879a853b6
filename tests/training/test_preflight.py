"""Probes of a model before anything is charged or trained, through whole runs on tiny models of real architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import set_all
from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.data.tasks.base import Task
from fedsb.models.layers import find_targets, left_out
from fedsb.privacy.ledger import read_ledger
from fedsb.runs.run import federate
from fedsb.server.server import Server
from fedsb.training.joint import join_tensors
from fedsb.training.per_example import RowGradients
from fedsb.training.preflight import Preflight, preflight
from fedsb.utils.errors import UserError
from support.architectures import POSITIONS, build
from support.server import open_server, started

CLASSIFIER, LM = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
PRIVATE = {"unit": "example", "epsilon": 8.0}

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made("opt", LM)`: a model folder, built once."""
    folders: dict[str, Path] = {}

    def of(model_type: str, auto_class: str = CLASSIFIER, **changes: Any) -> Path:
        key = json.dumps([model_type, auto_class, changes])
        if key not in folders:
            folders[key] = build(tmp_path_factory.mktemp(model_type), model_type, auto_class, **changes)
        return folders[key]

    return of


def on(config: dict[str, Any], model: Path, kind: str = "classification", **changes: Any) -> dict[str, Any]:
    return set_all(config, model={"name": str(model), "max_seq_length": 16}, task={"kind": kind}, **changes)


def found(config: dict[str, Any]) -> Preflight:
    return open_server(config).trainer.preflight


# --- private runs on models whose rows cannot share a forward ---


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("deberta", "classification"),
        ("xlnet", "classification"),
        ("longformer", "classification"),
        ("opt", "text"),
        ("qwen2_moe", "text"),
    ],
)
def test_rows_that_cannot_be_routed_are_protected_one_by_one(
    tiny_config: dict[str, Any], made: Make, model_type: str, kind: str
) -> None:
    """Their layers flatten rows into tokens: each row gets a forward of its own, and what is charged is trained."""
    model = made(model_type, LM if kind == "text" else CLASSIFIER)
    config = on(tiny_config, model, kind, privacy=PRIVATE)
    assert "receives" in str(found(config).unroutable)
    result = federate(load_config(config))
    rows = [json.loads(line) for line in (result.folder / "rounds.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[-1]["epsilon"] > 0
    assert all(row["up_bytes"] > 0 for row in rows)


def test_one_by_one_clips_each_row_as_a_loop_does(tiny_config: dict[str, Any], made: Make) -> None:
    server, state = started(on(tiny_config, made("opt", LM), "text"))
    adapted, task, rows = server.trainer.adapted, server.trainer.task, server.clients[0].train[:5]
    tensors = server.method.model(state)
    trained = server.method.trainable(tensors, 0)
    layout = Layout.of({key: tensors[key] for key in trained})
    values = layout.flatten(tensors).unsqueeze(0)
    frozen = join_tensors(adapted, [{key: x for key, x in tensors.items() if key not in trained}])
    gradients = RowGradients.allocate(adapted, task, layout, 8)
    assert len(gradients.gradients) == 1  # its rows cannot share a forward
    together, _ = gradients.clipped_sums(values, frozen, [rows], 0.01)
    one = [gradients.clipped_sums(values, frozen, [[row]], 0.01)[0] for row in rows]
    torch.testing.assert_close(together, torch.stack(one).sum(0))
    assert float(one[0].norm()) == pytest.approx(0.01, rel=1e-3)  # clipped, not zero


# --- rows that depend on each other ---


def test_a_model_that_reads_padding_is_refused_in_a_private_run_before_anything_is_charged(
    tiny_config: dict[str, Any], made: Make, tmp_path: Path
) -> None:
    config = on(tiny_config, made("fnet"), privacy=PRIVATE)
    with pytest.raises(UserError, match=r"cannot be kept with this model: a row's gradient changes by .*% in a batch"):
        federate(load_config(config))
    assert not list(Path(config["out"]).rglob("*.jsonl"))  # no ledger
    assert "with a longer row" in str(found(on(tiny_config, made("fnet"))).mixing)  # trained, one client at a time
    assert open_server(on(tiny_config, made("fnet"))).channel.clients_per_forward == 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 8,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_a_rotary_embedding_that_depends_on_the_batch(
    tiny_config: dict[str, Any], made: Make, rope: dict[str, Any]
) -> None:
    """Only where rows may be longer than the original window."""
    positions = 8 if rope["rope_type"] == "dynamic" else 64
    config = on(tiny_config, made("llama", LM, rope_parameters=rope, max_position_embeddings=positions), "text")
    with pytest.raises(UserError, match=rf"its rotary embedding \({rope['rope_type']}\) changes for all rows"):
        open_server(set_all(config, privacy=PRIVATE))
    assert open_server(config).channel.clients_per_forward == 1
    assert found(set_all(config, model={**config["model"], "max_seq_length": 8})).mixing is None


@pytest.mark.parametrize("window", [2, 3, 16])
def test_a_layer_whose_first_axis_is_that_of_tokens_cannot_be_routed(
    tiny_config: dict[str, Any], made: Make, window: int
) -> None:
    """Whatever the width: with as many tokens as rows, tokens would be taken for rows."""
    model = {"name": str(made("xlnet")), "max_seq_length": window}
    assert "receives" in str(found(set_all(tiny_config, model=model)).unroutable)


class Embeddings(nn.Module):
    """A model's embeddings, which depend on other rows in one way. `seen` are the widths of all forwards so far."""

    def __init__(self, embeddings: nn.Module, fault: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> None:
        super().__init__()
        self.embeddings, self.fault, self.seen = embeddings, fault, [0]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        x: torch.Tensor = self.embeddings(*args, **kwargs)
        found = self.fault(x, self.seen)
        self.seen.append(x.shape[1])
        return found


def minus_mean(x: torch.Tensor) -> torch.Tensor:
    return x - 0.5 * x.mean(dim=(0, 1), keepdim=True)


@pytest.mark.parametrize(
    ("model_type", "fault", "words"),
    [
        ("bert", lambda x, seen: minus_mean(x), "in a batch with a longer row"),
        ("bert", lambda x, seen: minus_mean(x) if x.shape[1] == 32 else x, "in a batch with a longer row"),
        ("deberta", lambda x, seen: x.flip(-1) if max(seen) > 8 else x, "after a longer row was read"),
        ("deberta", lambda x, seen: x.flip(-1) if seen[-1] > 8 else x, "after a longer row was read"),
        ("deberta", lambda x, seen: x.flip(-1) if seen[-1] == 32 else x, "after a longer row was read"),
    ],
    ids=[
        "the batch",
        "a batch with a row that fills the window",
        "the longest row so far",
        "the row before",
        "a row before that fills the window",
    ],
)
def test_a_layer_that_depends_on_other_rows_is_found(
    tiny_config: dict[str, Any], made: Make, model_type: str, fault: Any, words: str
) -> None:
    """In one forward, or between forwards in a model that reads rows one by one."""
    server = open_server(set_all(tiny_config, model={"name": str(made(model_type)), "max_seq_length": 32}))
    trainer = server.trainer
    assert trainer.preflight.mixing is None
    trainer.adapted.unwrap()
    model: Any = trainer.base.model
    model.base_model.embeddings = Embeddings(model.base_model.embeddings, fault)
    targets = find_targets(model, "blocks", trainer.base.head)
    adapted = AdaptedModel(model, kind="core", targets=targets, head=trainer.base.head)
    assert words in str(preflight(adapted, trainer.task, trainer.head, private_rows=False, batch=4).mixing)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "modernbert", "t5", "bart", "gpt2", "llama"])
def test_ordinary_models_pass(tiny_config: dict[str, Any], made: Make, model_type: str) -> None:
    report = found(on(tiny_config, made(model_type), privacy=PRIVATE))
    assert report.unroutable is None and report.mixing is None and report.seconds < 60
    assert report.untouched == ()


# --- causality ---


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_an_encoder_as_language_model_is_refused(tiny_config: dict[str, Any], made: Make, model_type: str) -> None:
    with pytest.raises(UserError, match=r"not causal.* decoder-only model"):
        open_server(on(tiny_config, made(model_type, LM), "text"))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba", "bloom"])
def test_a_decoder_is_causal(tiny_config: dict[str, Any], made: Make, model_type: str) -> None:
    assert found(on(tiny_config, made(model_type, LM), "text")).mixing is None


# --- targets ---


def test_layers_whose_weight_a_model_reads_itself(tiny_config: dict[str, Any], made: Make) -> None:
    """Mamba multiplies with dt_proj.weight: an adapter there would do nothing, and change the merged model."""
    model = {"name": str(made("mamba", LM)), "max_seq_length": 16, "target_modules": ["in_proj", "dt_proj"]}
    with pytest.raises(UserError, match=r"model.target_modules: the model reads the weights of mixer.dt_proj"):
        open_server(set_all(tiny_config, model=model, task={"kind": "text"}))


@pytest.mark.parametrize(
    ("model_type", "without"),
    [
        ("mamba", {"mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"}),
        ("mamba2", {"mixer.out_proj"}),
        ("qwen2_moe", {"mlp.shared_expert_gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("phimoe", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("llama", set()),
        ("falcon", set()),
    ],
)
def test_blocks_leaves_out_what_cannot_be_adapted_and_says_so(
    tiny_config: dict[str, Any], made: Make, model_type: str, without: set[str]
) -> None:
    server = open_server(on(tiny_config, made(model_type, LM), "text"))
    model = server.trainer.adapted.unwrap()
    found = {name.split(".", 3)[-1] for name in left_out(model)}
    assert found == without
    reason = next(choice.reason for choice in server.settings if choice.key == "model.target_modules")
    assert all(name in reason for name in without) and ("not adapted" in reason) == bool(without)


def test_a_router_that_returns_a_tuple_is_no_target(made: Make) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(made("phimoe", LM))
    routers = [name for name, module in model.named_modules() if type(module).__name__.endswith("Router")]
    assert routers and not set(routers) & set(find_targets(model, r".*"))


@pytest.mark.parametrize("model_type", ["t5", "canine", "mra"])
def test_models_that_read_their_layers_or_leave_some_unused(
    tiny_config: dict[str, Any], made: Make, model_type: str
) -> None:
    """T5 asks for the dtype of `wo.weight`; CANINE's last layers reach the loss by one token only."""
    assert federate(load_config(on(tiny_config, made(model_type), rounds=1))).score is not None


# --- what a model can read ---


@pytest.mark.parametrize(
    ("model_type", "auto_class", "usable"),
    [
        ("bert", CLASSIFIER, POSITIONS),
        ("gpt2", LM, POSITIONS),
        ("roberta", CLASSIFIER, POSITIONS - 1),  # its padding token is 0, and it starts behind it
        ("opt", LM, POSITIONS),
        ("gptj", LM, POSITIONS),
        ("mpt", LM, POSITIONS),
    ],
)
def test_a_window_beyond_the_positions_is_an_error_in_check_and_run(
    tiny_config: dict[str, Any], made: Make, cli: Callable[..., Any], tmp_path: Path,
    model_type: str, auto_class: str, usable: int,
) -> None:  # fmt: skip
    from conftest import write_toml

    kind = "text" if auto_class == LM else "classification"
    path = write_toml(tmp_path / "my.toml", on(tiny_config, made(model_type, auto_class), kind))
    for verb in ("check", "run"):
        said = cli(verb, path, "--set", f"model.max_seq_length={usable + 1}")
        assert said.code == 1 and f"has {usable} positions" in said.err and f"max_seq_length={usable}" in said.err
    model = {"name": str(made(model_type, auto_class)), "max_seq_length": usable}
    open_server(set_all(tiny_config, model=model, task={"kind": kind}))  # a row of that length is read


def test_a_rotary_model_beyond_its_positions_is_a_warning(tiny_config: dict[str, Any], made: Make) -> None:
    model = {"name": str(made("llama", LM)), "max_seq_length": 2 * POSITIONS}
    server = open_server(set_all(tiny_config, model=model, task={"kind": "text"}))
    reason = next(choice.reason for choice in server.settings if choice.key == "model.max_seq_length")
    assert reason == f"warning: the model was trained for {POSITIONS} positions; it may read longer rows badly"


def test_a_padding_token_that_only_the_tokenizer_has_is_replaced(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    folder = with_new_token(tmp_path / "model", {"pad_token": "<pad>"})
    server = open_server(on(tiny_config, folder, "text"))
    assert server.trainer.tokenizer.pad_token == "[EOS]"
    assert (
        server.trainer.task.collate([{"input_ids": [9], "labels": [9]}, {"input_ids": [9] * 9, "labels": [9] * 9}])[
            "input_ids"
        ].max()
        < server.trainer.base.model.get_input_embeddings().num_embeddings
    )


def test_a_token_without_an_embedding_is_an_error(
    tiny_config: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    from conftest import write_rows, write_toml

    folder = with_new_token(tmp_path / "model", {}, ["neu"])
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"red{i} neu blue{i}", "label": str(i % 2)} for i in range(9)])
    config = on(tiny_config, folder, data={"train": str(data)}, clients={"count": 2})
    path = write_toml(tmp_path / "my.toml", config)
    for verb in ("check", "run"):
        said = cli(verb, path)
        assert said.code == 1 and "'neu'), but the model has embeddings for 54 tokens only" in said.err


def with_new_token(folder: Path, special: dict[str, Any], words: list[str] | None = None) -> Path:
    """A Llama whose tokenizer was given a token that the model has no embedding for."""
    from transformers import AutoTokenizer

    build(folder, "llama", LM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(words or [])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_fails_on_any_batch_is_refused_in_words(tiny_config: dict[str, Any], made: Make) -> None:
    with pytest.raises(UserError, match=r"fails on a made-up batch of rows of up to 16 tokens: RuntimeError"):
        open_server(on(tiny_config, made("nystromformer")))


# --- the probes read no row ---


def test_the_probes_read_no_row(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The forwards of the preflight hold the same tokens whatever the data."""
    from fedsb.data.tasks import classification

    seen: list[Any] = []
    real = classification.Classification.made_up

    def spy(self: Task, tokens: int, draw: np.random.Generator) -> Any:
        seen.append(real(self, tokens, draw))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(classification.Classification, "made_up", spy)
    open_server(tiny_config)
    first, seen[:] = list(seen), []
    open_server(set_all(tiny_config, data={"train": tiny_config["data"]["test"]}))
    assert first and first == seen


def test_the_private_ledger_is_empty_where_the_preflight_refuses(
    tiny_config: dict[str, Any], made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on(tiny_config, made("yoso"), privacy=PRIVATE)
    with pytest.raises(UserError):
        federate(load_config(config))
    assert [read_ledger(path) for path in Path(config["out"]).rglob("privacy/*.jsonl")] == []


# --- `fedsb check` ---


def test_check_tries_the_model_where_its_weights_are(
    tiny_config: dict[str, Any], made: Make, cli: Callable[..., Any], tmp_path: Path
) -> None:
    from conftest import write_toml

    said = cli("check", write_toml(tmp_path / "fnet.toml", on(tiny_config, made("fnet"), privacy=PRIVATE)))
    assert said.code == 1 and "privacy.unit = 'example' cannot be kept with this model" in said.err
    found = cli("check", write_toml(tmp_path / "bert.toml", on(tiny_config, made("bert"))), "--json")
    settings = {choice["key"]: choice["reason"] for choice in json.loads(found.out)["settings"]}
    assert settings["preflight"].startswith("the adapter trains")


def test_check_without_weights_says_what_it_could_not_try(
    tiny_config: dict[str, Any], made: Make, cli: Callable[..., Any], tmp_path: Path
) -> None:
    import shutil

    from conftest import write_toml

    shutil.copytree(made("bert"), folder := tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    said = cli("check", write_toml(tmp_path / "my.toml", on(tiny_config, folder)), "--json")
    assert said.code == 0
    assert (
        f"whether the model passes the preflight of a run: the weights of {folder} are not on this machine"
        in (json.loads(said.out)["unknown"])
    )


# --- checkpoints that are quantised themselves ---


def quantised(made: Make, tmp_path: Path, **how: Any) -> Path:
    """A Llama's folder whose weights are stored in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    import shutil

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = made("llama", LM, hidden_size=64, intermediate_size=64, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**how))
    shutil.copytree(source, folder := tmp_path / "quantised")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def test_a_checkpoint_in_8_bits_mixes_rows_too(tiny_config: dict[str, Any], made: Make, tmp_path: Path) -> None:
    config = on(tiny_config, quantised(made, tmp_path, load_in_8bit=True), "text")
    with pytest.raises(UserError, match=r"cannot be kept with this model: its 8-bit layers"):
        open_server(set_all(config, privacy=PRIVATE))
    assert open_server(config).channel.clients_per_forward == 1


def test_a_checkpoint_in_4_bits_trains_and_merges_or_says_why_not(
    tiny_config: dict[str, Any], made: Make, tmp_path: Path
) -> None:
    from fedsb.runs.evaluate import export_to

    config = on(tiny_config, quantised(made, tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4"), "text", rounds=1)
    folder = federate(load_config(config)).folder
    with pytest.raises(UserError, match=r"are quantised, and an adapter can be merged into unquantised weights only"):
        export_to(folder, str(tmp_path / "merged"), merged=True)


# --- what PEFT makes of the adapter ---


def test_a_layer_that_peft_refuses_is_named_before_training(tiny_config: dict[str, Any], made: Make) -> None:
    model = {"name": str(made("mamba2", LM)), "max_seq_length": 16, "target_modules": ["in_proj", "out_proj"]}
    config = set_all(tiny_config, model=model, task={"kind": "text"})
    with pytest.raises(UserError, match=r"could not be used. Nothing was trained. PEFT .*out_proj"):
        federate(load_config(config))
    assert not (Path(config["out"]) / "tiny" / "checkpoints").exists()


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "mamba2"])
def test_models_whose_layers_peft_takes_for_others(tiny_config: dict[str, Any], made: Make, model_type: str) -> None:
    """A run ends with an adapter that PEFT loads as it was trained: that is compared, before and after."""
    config = on(tiny_config, made(model_type, LM), "text", rounds=1)
    assert federate(load_config(config)).score is not None


def test_what_a_merge_would_write_is_known_at_the_start(tiny_config: dict[str, Any], made: Make) -> None:
    """A table of cases: task.pooling, the model, and what `fedsb export --merged` can do."""
    for pooling, model_type, value, reason in (
        ("model", "bert", "available", "an ordinary model folder"),
        ("mean", "bert", "available", "a folder of sentence-transformers"),
        ("mean", "modernbert", "not available", "its classifier has more than one layer"),
    ):
        config = on(tiny_config, made(model_type))
        server = open_server(set_all(config, task={"kind": "classification", "pooling": pooling}))
        (choice,) = (choice for choice in server.settings if choice.key == "export --merged")
        assert choice.value == value and reason in choice.reason


def test_the_trial_with_peft_leaves_the_model_as_it_was(tiny_config: dict[str, Any]) -> None:
    """Same logits of the base, same modes of its modules, no trace of PEFT."""
    from fedsb.models.load import load_base

    server = open_server(tiny_config)
    fresh = load_base(server.config.model, auto_class=server.trainer.task.auto_class, num_labels=3, pad_token=0)
    names = {name for name, _ in server.trainer.adapted.unwrap().named_modules()}
    assert names == {name for name, _ in fresh.model.named_modules()}
    assert not any("peft" in type(module).__module__ for module in server.trainer.base.model.modules())
    torch.testing.assert_close(
        features(server.trainer.base.model, server), features(fresh.model, server), rtol=0, atol=0
    )


def features(model: Any, server: Server) -> torch.Tensor:
    batch = server.trainer.task.collate(server.data.test[:4])
    with torch.no_grad():
        found: torch.Tensor = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    return found


def test_a_batch_of_one_row_is_tried_with_one_row(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that just fits the memory must not fail in its probes: no forward has more long rows than the run's."""
    from fedsb.training import preflight as probes

    seen: list[int] = []
    real = probes.forward

    def spy(model: Any, task: Task, rows: Any, **how: Any) -> Any:
        seen.append(sum(len(row["input_ids"]) == task.max_tokens for row in rows))
        return real(model, task, rows, **how)

    monkeypatch.setattr(probes, "forward", spy)
    open_server(set_all(tiny_config, train={**tiny_config["train"], "batch_size": 1}))
    assert max(seen) == 1 and sum(seen) == 1


def test_a_model_that_does_not_fit_the_memory_is_refused_in_words(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsb.training import preflight as probes

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(probes, "forward", full)
    with pytest.raises(UserError, match=r"does not fit into the device's memory .* Lower train.batch_size"):
        open_server(tiny_config)
