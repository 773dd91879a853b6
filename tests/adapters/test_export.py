"""Adapters as others load them: the files, the check that refuses a wrong one, the merged model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedsb.adapters.adapted import AdaptedModel, head_linears
from fedsb.adapters.basis import make_basis, random_pair
from fedsb.adapters.card import load_lines, model_card
from fedsb.adapters.export import BaseModelInfo, has_conv1d, lora_config, lora_files, lora_tensors
from fedsb.adapters.export_check import check_adapter, try_adapter
from fedsb.adapters.factors import Factors
from fedsb.adapters.merge import merge
from fedsb.adapters.serving import serving
from fedsb.methods.base import Method
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT
from fedsb.models.layers import find_targets
from fedsb.utils.errors import RunError, UserError

INFO = BaseModelInfo(
    name="folder",
    shared_name="tiny",
    revision=None,
    auto_class="AutoModelForSequenceClassification",
    task_type="SEQ_CLS",
    head=["classifier"],
    label_names=["blue", "green", "red"],
    conv1d=False,
)
METHODS = [FedSB(rank=2, blocks=3), FedSB(rank=4), FedIT(rank=3, alpha=7.5)]


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def drawn(method: Method, shapes: dict[str, tuple[int, int]], head: dict[str, Tensor]) -> dict[str, Tensor]:
    """A client's tensors after some training, all random but a core's basis."""
    pairs = [(layer, random_pair(m, n, method.total_rank, 0, layer)) for layer, (m, n) in shapes.items()]
    state = method.start(shapes, make_basis("random", pairs), head, seed=0)
    draw = torch.Generator().manual_seed(0)
    tensors = {key: 0.3 * torch.randn(t.shape, generator=draw) for key, t in state.tensors.items()}
    return {**state.shared, **tensors}


@dataclasses.dataclass
class Exported:
    """A tiny model, an adapter on it, and what the adapted model answers."""

    info: BaseModelInfo
    plain: nn.Module
    folder: Path
    inputs: dict[str, Tensor]
    logits: Tensor
    tensors: dict[str, Tensor]
    factors: dict[str, Factors]

    def check(self) -> float:
        return check_adapter(self.folder, self.plain, self.inputs, self.logits, self.factors, self.info)


def exported(source: Path, auto_class: str, method: Method, folder: Path) -> Exported:
    labels = {"num_labels": 3, "pad_token_id": 0} if "Sequence" in auto_class else {}
    auto = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
    }[auto_class]
    torch.manual_seed(0)
    plain = auto.from_pretrained(source, **labels).eval()
    head = [name for name in ("classifier", "score") if labels and hasattr(plain, name)]
    adapted = AdaptedModel(
        plain,
        kind=method.adapter,
        targets=find_targets(plain, "blocks", head),
        head=head,
        scale=method.scale,
    )
    tensors = drawn(method, adapted.shapes, adapted.head_tensors())
    adapted.load({key: t if adapted.is_shared(key) else t.unsqueeze(0) for key, t in tensors.items()})
    inputs = {"input_ids": torch.randint(3, 40, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    with torch.no_grad():
        logits = plain(**inputs).logits
    info = dataclasses.replace(
        INFO,
        name=str(source),
        auto_class=auto_class,
        task_type="SEQ_CLS" if labels else "CAUSAL_LM",
        head=head,
        label_names=INFO.label_names if labels else [],
        conv1d=has_conv1d(adapted.layers),
        pad_token=0,
        model_type=plain.config.model_type,
    )
    own_head = {key: tensors[key] for key in adapted.head_keys}
    plain = adapted.unwrap()
    files = lora_files(method.export(tensors), own_head, info, "card")
    return Exported(info, plain, written(folder, files), inputs, logits, tensors, method.export(tensors))


CASES = [
    pytest.param("tiny_bert", "AutoModelForSequenceClassification", id="bert"),
    pytest.param("tiny_llama", "AutoModelForCausalLM", id="llama"),
    pytest.param("tiny_gpt2", "AutoModelForCausalLM", id="gpt2, Conv1D"),
    pytest.param("tiny_gpt2", "AutoModelForSequenceClassification", id="gpt2 classifier"),
    pytest.param("tiny_deepseek", "AutoModelForCausalLM", id="deepseek, a mixture of experts"),
]


# --- the files ---


def test_blocks_are_stacked() -> None:
    """Two blocks of rank 1: lora_B = (B_1 R_1, B_2 R_2) = (2 b_1, 3 b_2), lora_A = A, rank 2, alpha = 2."""
    B, A = torch.eye(3)[:, :2], torch.eye(4)[:2]
    tensors = {"x.A": A, "x.B": B, "x.R": torch.tensor([[[2.0]], [[3.0]]])}
    files = lora_files(FedSB(rank=1, blocks=2).export(tensors), {}, dataclasses.replace(INFO, head=[]), "card")
    saved = load(files["adapter_model.safetensors"])
    assert saved["base_model.model.x.lora_B.weight"].tolist() == [[2, 0], [0, 3], [0, 0]]
    assert torch.equal(saved["base_model.model.x.lora_A.weight"], A)
    config = json.loads(files["adapter_config.json"])
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["x"])
    assert config["peft_type"] == "LORA" and not config["modules_to_save"]


@pytest.mark.parametrize(
    ("method", "rank", "alpha"),
    [
        (FedSB(rank=2, blocks=3), 6, 6),
        (FedIT(rank=3, alpha=7.5), 3, 7.5),
        (FedIT(rank=4), 4, 8),
        (FedIT(rank=3, alpha=7), 3, 7),
    ],
)
def test_rank_and_alpha(method: Method, rank: int, alpha: float) -> None:
    """alpha / rank is the scale: 1, 2.5, 2."""
    files = lora_files(method.export(drawn(method, {"x": (8, 9)}, {})), {}, INFO, "card")
    config = json.loads(files["adapter_config.json"])
    assert config["r"] == rank
    assert config["lora_alpha"] == pytest.approx(alpha)


def test_tensors_are_float32_and_named_as_peft_names_them() -> None:
    factor = Factors(A=torch.ones(2, 4, dtype=torch.float64).T.mT, B=torch.ones(3, 2, dtype=torch.bfloat16), scale=1)
    made = lora_tensors({"a.b": factor}, {"classifier.weight": torch.ones(3, 3).T})
    assert set(made) == {
        "base_model.model.a.b.lora_A.weight",
        "base_model.model.a.b.lora_B.weight",
        "base_model.model.classifier.weight",
    }
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in made.values())


# --- loading them again ---


@pytest.mark.parametrize("method", METHODS, ids=["fed-sb, three blocks", "fed-sb", "fedit"])
@pytest.mark.parametrize(("model", "auto_class"), CASES)
def test_peft_answers_as_the_trained_model_did(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, auto_class: str, method: Method
) -> None:
    made = exported(request.getfixturevalue(model), auto_class, method, tmp_path)
    with torch.no_grad():
        before = made.plain(**made.inputs).logits
        assert float((before - made.logits).abs().max()) > 0.01  # the adapter does something
        assert made.check() < 1e-5
        after = made.plain(**made.inputs).logits
    if not made.info.head:  # PEFT leaves a trained head in place
        assert torch.equal(after, before)
    assert not any("lora" in name for name, _ in made.plain.named_modules())
    made.check()  # and once more, on the same base


@pytest.mark.parametrize("fault", ["a layer halved", "a layer left out", "alpha", "nan", "transposed"])
def test_a_wrong_adapter_is_refused(tiny_bert: Path, tmp_path: Path, fault: str) -> None:
    made = exported(tiny_bert, "AutoModelForSequenceClassification", FedSB(rank=4), tmp_path)
    path, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(path), json.loads(settings.read_text())
    key = "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"
    square = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_"
    match fault:
        case "a layer halved":
            tensors[key] = tensors[key] / 2
        case "a layer left out":
            del tensors[key]
        case "alpha":
            config["lora_alpha"] = 8
        case "nan":
            tensors[key][0, 0] = torch.nan
        case "transposed":
            A, B = tensors[f"{square}A.weight"], tensors[f"{square}B.weight"]
            tensors |= {f"{square}A.weight": B.T.contiguous(), f"{square}B.weight": A.T.contiguous()}
    save_file(tensors, path, metadata={"format": "pt"})
    settings.write_text(json.dumps(config))
    with pytest.raises(RunError, match="is not the trained model: the change of a layer differs"):
        made.check()


@pytest.mark.parametrize("fault", ["a head left out", "another shape", "torn"])
def test_an_adapter_that_peft_cannot_load_is_refused(tiny_bert: Path, tmp_path: Path, fault: str) -> None:
    made = exported(tiny_bert, "AutoModelForSequenceClassification", FedSB(rank=4), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    if fault == "a head left out":
        del tensors["base_model.model.classifier.weight"]
    else:
        key = "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"
        tensors[key] = tensors[key][:, :3].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunError, match="PEFT cannot load the adapter in"):
        made.check()


@pytest.mark.parametrize(("model", "auto_class"), CASES[:3])
def test_on_a_bfloat16_base_weights_are_compared(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, auto_class: str
) -> None:
    """Logits differ there by rounding, and more with a larger adapter; the change of each weight does not."""
    made = exported(request.getfixturevalue(model), auto_class, FedSB(rank=4), tmp_path)
    made.plain.to(torch.bfloat16)
    assert made.check() < 1e-5
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file({**tensors, key: 1.1 * tensors[key]}, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match="is not the trained model"):
        made.check()


# --- merged ---


@pytest.mark.parametrize(("model", "auto_class"), CASES)
def test_the_merged_model_answers_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, auto_class: str
) -> None:
    """Loaded as any model is, without PEFT; a batch of three needs the pad token that GPT-2's config lacks."""
    made = exported(request.getfixturevalue(model), auto_class, FedSB(rank=2, blocks=3), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(model))
    merge(made.info, made.folder, tmp_path / "merged", tokenizer)
    auto: Any = AutoModelForCausalLM if auto_class == "AutoModelForCausalLM" else AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        got = plain(**made.inputs).logits
    assert float((got - made.logits).abs().max()) < 1e-4
    assert not any("lora" in name for name, _ in plain.named_modules())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("red1").input_ids
    if made.info.label_names:
        assert plain.config.id2label == {0: "blue", 1: "green", 2: "red"}
        assert plain.config.label2id == {"blue": 0, "green": 1, "red": 2}


# --- what a user reads ---


def test_the_lines_name_a_revision() -> None:
    assert "revision='abc'" in load_lines(dataclasses.replace(INFO, revision="abc"), "adapter")


def test_the_card() -> None:
    card = model_card(dataclasses.replace(INFO, shared_name='a "b"'), {"Method": "fed-sb"})
    import yaml

    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == 'a "b"' and head["library_name"] == "peft"
    assert "| Method | fed-sb |" in card and "- 2: red" in card and "Serving" not in card
    servers = serving({"r": 8, "target_modules": ["x"], "task_type": "SEQ_CLS"}, "bert")
    said = "- vLLM and llama.cpp will not load it: they serve causal language models, and this adapter has a task head"
    assert f"## Serving\n\n{said}" in model_card(INFO, {}, servers)


PEFT_0_13 = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
}


def test_an_older_peft_knows_every_key_of_the_config() -> None:
    """PEFT 0.13 makes a LoraConfig of all keys, and raises TypeError at one that it does not know."""
    factor = Factors(A=torch.ones(2, 4), B=torch.ones(3, 2), scale=1)
    assert lora_config({"a.b": factor}, INFO).keys() <= PEFT_0_13


# --- before training ---


def test_an_adapter_of_zeros_is_tried_before_training(tiny_bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
    inputs = {"input_ids": torch.randint(3, 40, (3, 7))}
    with torch.no_grad():
        logits = model(**inputs).logits
        targets = find_targets(model, "blocks", ["classifier"])
        shapes = {name: model.get_submodule(name).weight.shape for name in targets}
        factors = {name: Factors(A=torch.zeros(2, n), B=torch.zeros(m, 2), scale=1) for name, (m, n) in shapes.items()}
        head = {f"classifier.{name}": tensor.clone() for name, tensor in model.classifier.state_dict().items()}
        assert try_adapter(model, inputs, logits, factors, head, INFO) < 1e-5
        assert torch.equal(model(**inputs).logits, logits)
        assert not any("lora" in name for name, _ in model.named_modules())


def test_a_layer_that_peft_refuses_is_named() -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    model = Mamba2ForCausalLM(config).eval()
    layers = [name for name, _ in model.named_modules() if name.endswith(("in_proj", "out_proj"))]
    factors = {
        name: Factors(A=torch.zeros(2, n), B=torch.zeros(m, 2), scale=1)
        for name in layers
        for m, n in [model.get_submodule(name).weight.shape]
    }
    base = dataclasses.replace(INFO, task_type="CAUSAL_LM", head=[], label_names=[])
    inputs = {"input_ids": torch.randint(3, 40, (1, 7))}
    with torch.no_grad(), pytest.raises(UserError) as raised:
        try_adapter(model, inputs, model(**inputs).logits, factors, {}, base)
    said = str(raised.value)
    assert (
        "PEFT loads no LoRA on the layers 'backbone.layers.0.mixer.out_proj'" in said and "model.target_modules" in said
    )
    assert "in_proj'" not in said.split(":")[0]


def test_a_layer_that_peft_leaves_alone_is_named(tiny_bert: Path, tmp_path: Path) -> None:
    made = exported(tiny_bert, "AutoModelForSequenceClassification", FedSB(rank=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    left_out = config["target_modules"].pop()
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"PEFT loads no LoRA on the layer '{left_out}'"):
        made.check()


def test_the_head_of_a_classifier_is_one_linear_layer(tiny_bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    assert head_linears(model, ["classifier"]) == ["classifier"]
