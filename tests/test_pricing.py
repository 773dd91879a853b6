"""`fedsb check` without weights and without rows: published figures, known sizes, and what it cannot know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, labelled_rows, set_all, write_rows, write_toml
from fedsb.comparison.contenders import methods_to_price
from fedsb.config.inputs import ModelConfig
from fedsb.config.load import load_config
from fedsb.config.registry import build_method
from fedsb.data.clients import build_task
from fedsb.data.tables import load_rows
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT
from fedsb.methods.flora import FLoRA
from fedsb.models.hub import SHIPPED, shipped_shapes
from fedsb.models.layers import find_targets
from fedsb.models.load import load_base
from fedsb.models.tokenizer import load_tokenizer
from fedsb.runs.estimate import estimate
from fedsb.training.memory import ModelSizes, trained_values, training_memory
from fedsb.utils.environment import memory_of
from fedsb.utils.errors import UserError

MISTRAL, GEMMA, LLAMA = "mistralai/Mistral-7B-v0.1", "google/gemma-2-9b", "meta-llama/Llama-3.2-3B"
BERT = "google-bert/bert-base-cased"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Parameters as the models' own pages print them; encoders without a head.
PARAMETERS = {
    MISTRAL: 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    GEMMA: 9_241_705_984,
    LLAMA: 3_212_749_824,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    BERT: 108_310_272,
    "FacebookAI/roberta-base": 124_645_632,
    "FacebookAI/roberta-large": 355_359_744,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 4_300_079_472,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
}


def priced(name: str, method: str, rank: int, clients: int, **more: Any) -> dict[str, Any]:
    config = {
        "rounds": 1,
        "model": {"name": name, "dtype": "bfloat16", **more.get("model", {})},
        "task": more.get("task", {"kind": "instruction"}),
        "data": {"train": "hub:nobody/nothing", **more.get("data", {})},
        "clients": {"count": clients},
        "method": {"name": method, "rank": rank},
        "train": {"batch_size": 1},
        "engine": more.get("engine", {}),
    }
    return estimate(load_config(config))


# --- shapes ---


def test_every_shipped_shape_has_its_known_size() -> None:
    assert shipped_shapes().keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_shapes_have_the_published_numbers_of_parameters(name: str) -> None:
    encoder = shipped_shapes()[name]["config"]["model_type"] in ("bert", "roberta")
    auto_class = "AutoModel" if encoder else "AutoModelForCausalLM"
    base = load_base(ModelConfig(name=name), auto_class=auto_class, num_labels=0, pad_token=0, shapes_only=True)
    assert base.parameters == PARAMETERS[name]
    assert all(p.is_meta for p in base.model.parameters())
    assert [choice.reason for choice in base.choices if choice.key == "model.shapes"] == [SHIPPED]


def test_other_names_of_the_same_shapes() -> None:
    names = [name for first, entry in shipped_shapes().items() for name in (first, *entry["also"])]
    assert len(names) == len(set(names))
    assert "bert-base-cased" in names and "google/gemma-3-1b-it" in names


# --- the published figures: values a client sends ("up") or receives ("down") in a round ---


@pytest.mark.parametrize(
    ("model", "method", "rank", "clients", "direction", "millions"),
    [
        (MISTRAL, "fedit", 32, 25, "up", 83.89),
        (MISTRAL, "fed-sb", 120, 25, "up", 3.23),
        (MISTRAL, "fed-sb", 160, 25, "up", 5.73),
        (MISTRAL, "fed-sb", 200, 25, "up", 8.96),
        (MISTRAL, "flora", 32, 25, "down", 2097),  # all 25 clients' factors
        (MISTRAL, "fedex-lora", 32, 25, "down", 2097),
        (MISTRAL, "ffa-lora", 32, 25, "up", 44.04),  # r m; printed as half of FedIT's, 41.9
        (GEMMA, "fedit", 32, 25, "up", 108.0),
        (GEMMA, "fed-sb", 120, 25, "up", 4.23),
        (GEMMA, "fed-sb", 160, 25, "up", 7.53),
        (GEMMA, "fed-sb", 200, 25, "up", 11.76),
        (GEMMA, "flora", 32, 25, "down", 2701),
        (GEMMA, "ffa-lora", 32, 25, "up", 59.18),  # r m; printed 54.0
        (LLAMA, "fedit", 32, 5, "up", 48.63),
        (LLAMA, "fed-sb", 120, 5, "up", 2.82),
        (LLAMA, "fed-sb", 160, 5, "up", 5.02),
        (LLAMA, "fed-sb", 200, 5, "up", 7.84),
        (LLAMA, "flora", 32, 5, "down", 243.1),
    ],
)
def test_published_values_of_language_models(
    model: str, method: str, rank: int, clients: int, direction: str, millions: float
) -> None:
    found = priced(model, method, rank, clients)
    digits = max(len(str(millions).partition(".")[2]), 0)
    assert round(found["values_per_client_round"][direction] / 1e6, digits) == millions
    assert found["prices"][0][f"{direction}_values"] == found["values_per_client_round"][direction]


def test_blocks_are_the_papers_seven_modules() -> None:
    for model in (MISTRAL, GEMMA, LLAMA):
        named = priced(model, "fed-sb", 32, 2, model={"target_modules": SEVEN})["values_per_client_round"]
        assert named == priced(model, "fed-sb", 32, 2)["values_per_client_round"]


@pytest.mark.parametrize(
    ("method", "rank", "direction", "thousands"),
    [
        ("fed-sb", 32, "up", 26.9),
        ("fed-sb", 48, "up", 57.6),
        ("fed-sb", 64, "up", 100.6),
        ("ffa-lora", 32, "up", 592.1),
        ("flora", 32, "down", 3541.3),
        ("fedex-lora", 32, "down", 3541.3),
    ],
)
def test_published_values_of_bert_with_its_head(method: str, rank: int, direction: str, thousands: float) -> None:
    found = priced(
        BERT,
        method,
        rank,
        3,
        task={"kind": "classification"},
        data={"classes": 3},
        model={"target_modules": ["query", "value"]},
    )
    values = found["values_per_client_round"]
    assert values["head"] == 768 * 3 + 3
    assert round((values[direction] + values["head"]) / 1e3, 1) == thousands


def test_the_one_off_basis_of_mistral() -> None:
    """524M values at r = 200, which the published figures leave out."""
    config = {
        "rounds": 1,
        "model": {"name": MISTRAL},
        "task": {"kind": "instruction"},
        "data": {"train": "hub:nobody/nothing"},
        "method": {"name": "fed-sb", "rank": 200},
        "basis": {"kind": "update-pooled"},
    }
    assert round(estimate(load_config(config))["values_per_client_round"]["one_off"] / 1e6) == 524


# --- memory ---


def test_memory_of_mistral_part_by_part() -> None:
    """By hand: 7.24G weights of 2 bytes; r (m + n) = 2.62M x 200 of 4 and 8.96M of 16; 512 tokens of 2.62M of 2."""
    clients = 8
    model, engine = {"max_seq_length": 512, "device": "cpu"}, {"clients_per_forward": clients}
    parts = priced(MISTRAL, "fed-sb", 200, 25, model=model, engine=engine)["memory_parts"]
    assert parts["base"] == 2 * PARAMETERS[MISTRAL]
    assert parts["adapter"] == 4 * 200 * 2_621_440 + clients * 16 * 8_960_000
    assert parts["activations"] == clients * 512 * 2_621_440 * 2
    assert parts["logits"] == clients * 512 * 32_000 * 12
    assert parts.keys() == {"base", "adapter", "activations", "logits"}


@pytest.mark.parametrize(("quantize", "bytes_a_value"), [("4bit", 0.515869140625), ("8bit", 1.0)])
def test_memory_of_a_quantised_base(quantize: str, bytes_a_value: float) -> None:
    """32 layers of 218.1M values are quantised; embeddings, output and norms stay in bfloat16."""
    inside = 32 * (4096 * 4096 * 2 + 1024 * 4096 * 2 + 14336 * 4096 * 3)
    scales = 4 * 32 * (4096 * 3 + 1024 * 2 + 14336 * 2) if quantize == "8bit" else 0
    parts = priced(MISTRAL, "fed-sb", 200, 25, model={"quantize": quantize})["memory_parts"]
    assert parts["base"] == pytest.approx(inside * bytes_a_value + scales + 2 * (PARAMETERS[MISTRAL] - inside), abs=1)


@pytest.mark.parametrize(("kind", "wanted"), [("core", FedSB(rank=4)), ("factors", FedIT(rank=4))])
def test_estimated_activations_are_near_what_autograd_keeps(kind: str, wanted: Any) -> None:
    """Counted with hooks on a small Llama: not below nine tenths, not above by two fifths."""
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedsb.adapters.adapted import AdaptedModel

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=50,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=704,
    )
    model = LlamaForCausalLM(settings)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    adapted = AdaptedModel(model, kind=kind, targets=find_targets(model))
    tensors = {}
    for name, (m, n) in adapted.shapes.items():
        if kind == "core":
            tensors |= {
                f"{name}.A": torch.rand(4, n),
                f"{name}.B": torch.rand(m, 4),
                f"{name}.R": torch.rand(1, 1, 4, 4),
            }
        else:
            tensors |= {f"{name}.A": torch.rand(1, 4, n), f"{name}.B": torch.rand(1, m, 4)}
    adapted.load(tensors, trainable=frozenset(k for k in tensors if kind == "factors" or k.endswith(".R")))
    own |= {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model(input_ids=torch.randint(0, 50, (2, 96)))
    counted = sum(size for size, _ in kept.values())
    found = training_memory(
        wanted,
        ModelSizes(
            shapes=adapted.shapes, block_shapes=adapted.shapes, base=0, head=0, vocabulary=0, dtype=torch.float32
        ),
        together=1,
        cohort=1,
        tokens=192,
        private_rows=0,
        activation_checkpointing=False,
    )
    assert 0.9 < found.activations / counted < 1.4, (found.activations, counted)


def test_what_else_takes_memory() -> None:
    def of(method: Any = FedSB(rank=2), **more: Any) -> Any:  # noqa: B008
        shapes = {f"h.{i}.{part}": (20, 10) for i in range(12) for part in ("up", "out")}
        sizes = ModelSizes(shapes=shapes, block_shapes=shapes, base=5, head=7, vocabulary=11, dtype=torch.bfloat16)
        given = {"together": 3, "cohort": 4, "tokens": 6, "private_rows": 0, "activation_checkpointing": False}
        return training_memory(method, sizes, **{**given, **more})

    plain = of()
    assert plain.adapter == 4 * 24 * 2 * 30 + 3 * 16 * (24 * 4 + 7)
    assert plain.activations == 6 * 24 * 30 * 2
    assert plain.logits == 6 * 11 * 12
    assert (plain.carried, plain.row_gradients) == (0, 0)
    assert plain.total == 5 + plain.adapter + plain.activations + plain.logits
    assert of(activation_checkpointing=True).activations == 6 * (2 * 30 + 12 * 10) * 2  # a block, 12 inputs
    private = of(private_rows=9)
    assert private.row_gradients == 9 * 4 * (24 * 4 + 7) and private.total == plain.total + private.row_gradients
    assert of(FLoRA(rank=1)).carried == 4 * 24 * 4 * 30
    assert of(FedIT(rank=2)).adapter == 3 * 16 * (24 * 2 * 30 + 7)
    assert of(FedIT(rank=2)).activations == plain.activations * 1.25


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("fed-sb", {}, 2 * 2 * 2),
        ("ravan", {"blocks": 3}, 2 * 3 * 2 * 2 + 2 * 3),  # a scalar per core too
        ("local", {}, 2 * 2 * 2),  # nothing goes up
        ("central", {"blocks": 3, "scalars": True}, 2 * 3 * 2 * 2 + 2 * 3),
        ("fedit", {}, 2 * (20 + 10) + 2 * (30 + 10)),
        ("ffa-lora", {}, 2 * 20 + 2 * 30),  # B alone
        ("fedsa-lora", {}, 2 * (20 + 10) + 2 * (30 + 10)),  # A goes up, B is trained too
    ],
)
def test_what_a_client_trains_is_not_what_it_sends(name: str, options: dict[str, Any], values: int) -> None:
    """Rank 2 on layers of 20 x 10 and 30 x 10, and a head of 7."""
    method = build_method(name, {"rank": 2, **options})
    assert trained_values(method, {"a": (20, 10), "b": (30, 10)}, 7) == values + 7


@pytest.mark.parametrize("name", ["fed-sb", "fed-sb-personal", "local", "central"])
def test_a_core_that_layers_share_is_trained_once(name: str) -> None:
    method = build_method(name, {"rank": 2, "tied": True})
    assert trained_values(method, {"h.0.q": (20, 10), "h.1.q": (20, 10), "h.0.k": (30, 10)}, 7) == 2 * 2 * 2 + 7


# --- towers ---


def test_blocks_leave_the_vision_tower_alone() -> None:
    """Gemma 3 4B: 34 x 7 layers of its language model, none of the 27 blocks that see."""
    found = priced("google/gemma-3-4b-pt", "fed-sb", 10, 2)
    assert found["values_per_client_round"]["up"] == 34 * 7 * 100


def test_a_saved_model_of_two_senses_leaves_its_tower_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config={**text, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50}, vision_config=vision
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = find_targets(model)
    assert len(names) == 7 and all("language_model.layers.0." in name for name in names)
    assert any("vision_tower" in name for name in find_targets(model, ["q_proj"]))  # by name, it can be had


# --- rows that are not here ---


def test_what_is_not_known_is_said(cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "far.toml", set_all(tiny_config, data={"train": "hub:nobody/nothing"}))
    said = cli("check", toml)
    assert said.code == 0 and said.err == ""
    flat = " ".join(said.out.split())
    assert "time unknown: it depends on the rows" in flat
    assert "Unknown: - rows, tokens, time and epsilon: 'hub:nobody/nothing' cannot be fetched" in flat
    assert "the number of classes: estimated for 2; set data.classes" in flat
    assert "the number of clients in the column 'client': estimated for 8 (clients.count)" in flat
    found = json.loads(cli("check", toml, "--set", "data.classes=3", "--json").out)
    assert (found["seconds"], found["clients"], found["privacy"]) == (None, None, None)
    assert found["values_per_client_round"]["head"] == 99
    assert found["values_per_client_round"]["up"] == 192
    assert len(found["unknown"]) == 3


def test_prices_without_rows_are_those_with_them(tiny_config: dict[str, Any]) -> None:
    config = set_all(tiny_config, clients={"count": 3}, server={"clients_per_round": 2})
    far = set_all(config, data={"train": "hub:nobody/nothing", "classes": 3})
    here, there = estimate(load_config(config)), estimate(load_config(far))
    for key in ("prices", "values_per_client_round", "memory_bytes", "memory_parts", "client_memory_bytes"):
        assert here[key] == there[key], key
    assert here["unknown"] == [] and here["seconds"] > 0


def test_real_faults_are_faults_without_rows_too(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    toml = write_toml(tmp_path / "far.toml", set_all(tiny_config, data={"train": "hub:nobody/nothing"}))
    for override, part in (
        ("method.rank=33", "is above min(m, n)"),
        ('model.target_modules=["querry"]', "no linear layer is called"),
        ("model.name=nobody/nothing", "Cannot load the model 'nobody/nothing'"),
        ("data.train=hub:nobody", "is not a Hub name"),
        ("train.lrr=1", "there is no such key"),
    ):
        said = cli("check", toml, "--set", override)
        assert (said.code, said.out) == (1, "") and part in said.err, override


def test_a_missing_local_file_is_not_known_and_a_misspelt_one_is_a_fault(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    toml = write_toml(
        tmp_path / "far.toml", set_all(tiny_config, data={"train": str(tmp_path / "data" / "train.jsonl")})
    )
    assert cli("check", toml).code == 0
    assert cli("run", toml).code == 1
    write_rows(tmp_path / "data" / "trian.jsonl", labelled_rows(9, 0))
    said = cli("check", toml)
    assert said.code == 1 and "Did you mean trian.jsonl?" in said.err


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data": {"train": "rows/train.jsonl"}}, "data.train"),
        ({"data": {"train": "train.jsonl"}}, "data.train"),
        ({"data": {"test": "test.jsonl"}}, "data.test"),
        ({"basis": {"kind": "update", "data": "public.jsonl"}}, "basis.data"),
    ],
)
def test_a_relative_path_that_does_not_exist_is_a_fault_of_check_as_of_run(
    cli: Callable[..., Said],
    tiny_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, dict[str, Any]],
    key: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {**tiny_config, **{name: {**tiny_config.get(name, {}), **of} for name, of in changes.items()}}
    toml = write_toml(tmp_path / "my.toml", config)
    for command in ("check", "run"):
        said = cli(command, toml)
        assert said.code == 1 and "There is no file" in said.err, command
    said = cli("check", toml)
    assert f"{key} = " in said.err and f"--set {key}=none" in said.err
    if key != "basis.data":  # without its public rows that basis cannot be
        assert cli("check", toml, "--set", f"{key}=none", "--set", "clients.partition=iid").code == 0


def test_a_recipe_is_checked_without_its_rows(
    cli: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are examples. A path of the user's own is not."""
    monkeypatch.chdir(tmp_path)
    assert cli("check", "trec").code == 0
    said = cli("check", "trec", "--set", "data.train=mine.jsonl")
    assert said.code == 1 and "data.train = 'mine.jsonl': There is no file mine.jsonl" in said.err
    (tmp_path / "my.toml").write_text(cli("init", "trec").out)
    assert cli("check", "my.toml").code == 1


def test_a_batch_that_is_larger_than_a_client_is_priced_by_its_rows_and_warned_of(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """90 rows of three clients, a fifth held out: the largest trains on 32, and no forward has more."""
    toml = write_toml(tmp_path / "my.toml", set_all(tiny_config, train={"local_steps": 1, "batch_size": 100_000}))
    found = estimate(load_config(toml))
    most = max(found["clients"].values())
    exact = estimate(load_config(toml, [f"train.batch_size={most}"]))
    assert found["client_memory_bytes"] == exact["client_memory_bytes"]
    (warning,) = found["warnings"]
    assert warning.startswith("train.batch_size = 100,000, but every client has fewer rows than that")
    assert f"has {most:,})" in warning
    said = cli("check", toml)
    assert said.code == 0 and "Warning:" in said.out and "100,000, but every client" in " ".join(said.out.split())
    said = cli("run", toml, "--set", "rounds=1")
    assert said.code == 0 and "Warning: train.batch_size = 100,000, but every client" in said.out
    assert estimate(load_config(tiny_config))["warnings"] == []


def test_no_batch_is_wider_than_the_longest_row(tiny_config: dict[str, Any]) -> None:
    """Rows that are all cut at the window are not padded, so their tokens are rounds x clients x rows x window."""
    config = set_all(tiny_config, model={"max_seq_length": 4}, train={"local_steps": 2, "batch_size": 3})
    found = estimate(load_config(config))
    rows = config["rounds"] * len(found["clients"]) * 2 * 3
    assert found["seconds_reason"].startswith(f"{rows * 4:,} training tokens")


def test_an_estimate_above_this_machines_memory_is_warned_of(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = max(phase["memory_bytes"] for phase in estimate(load_config(tiny_config))["phases"].values())
    monkeypatch.setattr("fedsb.runs.costs.memory_of", lambda device: needed)
    assert estimate(load_config(tiny_config))["warnings"] == []
    monkeypatch.setattr("fedsb.runs.costs.memory_of", lambda device: needed - 1)
    (warning,) = estimate(load_config(tiny_config))["warnings"]
    assert "is more than the" in warning and "train.batch_size" in warning
    said = cli("check", write_toml(tmp_path / "my.toml", tiny_config))
    assert said.code == 0 and "Warning:" in said.out


def test_a_run_is_priced_for_a_gpu_that_is_not_here(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever model.device says, in bfloat16, without a CPU process's own memory; and what would fit a small one."""
    rows = {"data": {"train": None, "test": None}, "task": {"kind": "text"}, "train": {"batch_size": 8}}
    config = {**rows, "model": {"name": LLAMA, "max_seq_length": 1024, "device": "cuda"}}
    config |= {"method": {"name": "fed-sb", "rank": 64}, "clients": {"count": 8}}
    large, small = (estimate(load_config(config), gpu=gigabytes) for gigabytes in (80, 8))
    settings = {choice["key"]: choice for choice in large["settings"]}
    assert (settings["model.dtype"]["value"], settings["model.dtype"]["reason"]) == ("bfloat16", "--gpu 80")
    assert (settings["model.device"]["value"], settings["model.device"]["reason"]) == ("cuda", "--gpu 80")
    assert large["warnings"] == []
    assert PARAMETERS[LLAMA] * 2 < large["memory_bytes"] < 80 << 30
    assert large["phases"].keys() == {"load", "basis", "captured share", "scores", "rounds", "export"}
    (warning,) = small["warnings"]
    assert "model.quantize = '4bit': " in warning and "model.activation_checkpointing = true: " in warning
    assert "train.batch_size = 4: " in warning
    toml = write_toml(tmp_path / "my.toml", {**tiny_config, "model": {**tiny_config["model"], "device": "cuda"}})
    said = cli("check", toml, "--gpu", "80", "--verbose")
    assert said.code == 0 and "assumed for such a GPU" in " ".join(said.out.split())
    assert "captured share" in said.out
    assert cli("check", toml).code == 1
    spread = cli("check", toml, "--gpu", "80", "--set", "model.placement=balanced")
    assert spread.code == 0 and "model.placement is 'balanced'" in " ".join(spread.out.split())


def test_the_memory_of_this_machine() -> None:
    assert 2**28 < (memory_of(torch.device("cpu")) or 0) < 2**50


def served(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As a coordinator has it: without training rows, and with a test file of its own."""
    return set_all(config, data={"test": config["data"]["test"]}, clients={"count": 3}, **changes)


def test_a_coordinators_toml_is_priced_without_rows(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    toml = write_toml(tmp_path / "served.toml", served(tiny_config))
    here, said = estimate(load_config(set_all(tiny_config, clients={"count": 3}))), cli("check", toml, "--verbose")
    assert said.code == 0 and said.err == ""
    flat = " ".join(said.out.split())
    assert (
        "engine.name flower auto: data.train is not set, so the rows are at the sites of `fedsb federation serve`"
        in flat
    )
    assert "Unknown: - the rows: data.train is not set, so this is checked as a run of `fedsb federation serve`" in flat
    assert "the number of sites: estimated for 3 (clients.count)" in flat
    assert "the number of classes: estimated for 3, as in data.test; set data.classes" in flat
    found = json.loads(cli("check", toml, "--set", "engine.name=flower", "--json").out)
    assert found["prices"] == here["prices"]
    assert (found["seconds"], found["clients"], found["privacy"]) == (None, None, None)
    assert found["memory_bytes"] == found["client_memory_bytes"] == here["client_memory_bytes"]


def test_what_a_coordinator_cannot_run_is_refused_by_check(tiny_config: dict[str, Any]) -> None:
    for changes, part in (
        ({"method": {"name": "local", "rank": 2}}, "data.train is not set: the rows are at the sites.*local leaves"),
        ({"data": {"test": "tset.jsonl", "validation_fraction": 0.1}}, "tune in a simulation"),
        ({"task": {"kind": "classification", "label": "lable"}}, "has no column 'lable'"),
    ):
        with pytest.raises(UserError, match=part):
            estimate(load_config({**served(tiny_config), **changes}))


def test_training_rows_may_stand_for_those_of_the_sites(tiny_config: dict[str, Any]) -> None:
    found = estimate(load_config(tiny_config, ["engine.name=flower"]))
    assert found["unknown"] == [
        "the sites and their rows: estimated from data.train and [clients], as in a local federation",
    ]
    assert found["clients"] and found["seconds"] and found["memory_bytes"] == found["client_memory_bytes"]


def test_privacy_without_rows(tiny_config: dict[str, Any]) -> None:
    rows = estimate(load_config(served(tiny_config, privacy={"unit": "example", "epsilon": 3.0})))
    assert rows["privacy"] is None
    assert any("calibrated to privacy.epsilon = 3 once all sites have sent" in line for line in rows["unknown"])
    assert not any("bits of a value" in line for line in rows["unknown"])
    shared = {"privacy": {"unit": "example", "epsilon": 3.0}, "train": {"local_steps": 1}}
    masked = estimate(load_config(served(tiny_config, **shared, server={"secure_aggregation": True})))
    assert any("bits of a value in a masked update: 12 to 24" in line for line in masked["unknown"])
    own = {
        "privacy": {**shared["privacy"], "noise": "local"},
        "server": {"secure_aggregation": True, "secagg_bits": 16},
    }
    local = estimate(load_config(served(tiny_config, **own)))
    assert not any("bits of a value" in line for line in local["unknown"])
    bytes_each, values = local["bytes_per_client_round"], local["values_per_client_round"]
    assert bytes_each["up"] == 2 * (values["up"] + values["head"]) < bytes_each["down"]
    fixed = estimate(load_config(served(tiny_config, privacy={"unit": "example", "noise_multiplier": 1.0})))
    assert any(line.startswith("epsilon: it depends on privacy.noise_multiplier") for line in fixed["unknown"])
    whole = served(tiny_config, privacy={"unit": "client", "epsilon": 3.0}, server={"weighting": "uniform"})
    policy = estimate(load_config(whole))["privacy"]  # hangs on how many sites there are, and on no row
    assert policy == estimate(load_config(set_all(tiny_config, **{**whole, "data": tiny_config["data"]})))["privacy"]


def test_without_rows_nothing_trains_on_others(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    toml = write_toml(tmp_path / "served.toml", served(tiny_config))
    for command in (["run"], ["run", "--engine", "flower"], ["check", "--set", "engine.name=in_process"]):
        said = cli(command[0], toml, *command[1:])
        assert said.code == 1 and "data.train is not set. Name the rows to train on" in said.err, command


def test_a_served_run_is_scored_on_its_own_test_rows_or_on_none(tiny_config: dict[str, Any]) -> None:
    config = load_config(served(tiny_config)).config
    task = build_task(config, load_tokenizer(config.model))
    assert len(load_rows(config, task, None).rows) == 40
    with pytest.raises(UserError, match=r"no test table of its own\. Name one with --data"):
        load_rows(load_config(set_all(tiny_config, data={})).config, task, None)


def test_check_refuses_a_sum_that_hides_nothing(tiny_config: dict[str, Any]) -> None:
    config = set_all(tiny_config, server={"secure_aggregation": True, "clients_per_round": 1})
    with pytest.raises(UserError, match="one client per round"):
        estimate(load_config(config))


def test_check_prices_what_compare_names(tiny_config: dict[str, Any]) -> None:
    loaded = load_config(set_all(tiny_config, compare={"methods": ["fed-sb@4", "fedit@7"]}))
    found = estimate(loaded, also=methods_to_price(loaded))
    assert found["compared"] == ["fed-sb (rank 4)", "fedit (rank 7)"]
    labels = [price["label"] for price in found["prices"]]
    assert labels[0] == "fed-sb (rank 4)" and "fedit (rank 7)" in labels[1:] and len(set(labels)) == len(labels)
    broken = load_config(set_all(tiny_config, compare={"methods": ["fed-sb@4", "nothing@7"]}))
    assert methods_to_price(broken) == []  # `fedsb compare` reports it
