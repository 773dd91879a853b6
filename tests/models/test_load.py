"""The base model: dtypes, devices, heads, and what a checkpoint may lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from conftest import WORDS, save_model, set_all
from fedsb.adapters.adapted import AdaptedModel
from fedsb.config.inputs import ModelConfig
from fedsb.config.load import load_config
from fedsb.config.resolved import ResolvedSetting
from fedsb.models.heads import find_head, head_start
from fedsb.models.layers import find_targets
from fedsb.models.load import BaseModel, choose_device, choose_dtype, load_base
from fedsb.runs.run import federate
from fedsb.runs.scoring import score_global
from fedsb.utils.errors import UserError
from support.server import open_server, replies_of, started

CLASSIFIER, LM = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def load(folder: Path, auto_class: str = CLASSIFIER, *, shapes_only: bool = False, **settings: Any) -> BaseModel:
    labels = 3 if auto_class == CLASSIFIER else 0
    config = ModelConfig(name=str(folder), **settings)
    return load_base(config, auto_class=auto_class, num_labels=labels, pad_token=0, shapes_only=shapes_only)


def choice(base: BaseModel, key: str) -> ResolvedSetting | None:
    return next((c for c in base.choices if c.key == key), None)


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model"])
def test_a_model_that_cannot_be_had_says_what_helps(name: str) -> None:
    with pytest.raises(UserError, match="Cannot load the model 'no-such-owner/no-such-model'") as caught:
        load(Path(name))
    assert "HF_HOME" in str(caught.value) and "model.name=FOLDER" in str(caught.value)


# --- dtype and device ---


def test_dtype_and_device_come_with_reasons(tiny_bert: Path) -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == (torch.float32, "auto: the fastest and most exact on cpu")
    assert choose_dtype("bfloat16", cpu) == (torch.bfloat16, "as configured")
    assert choose_device("cpu") == (cpu, "as configured")
    for wrong in ("warp", "cuda:99"):
        with pytest.raises(UserError, match=f"model.device = '{wrong}' cannot be used here"):
            choose_device(wrong)
    base = load(tiny_bert, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert choice(base, "model.dtype") is None  # the configuration itself shows it, with its origin


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    device, reason = choose_device("auto")
    assert (device.type, reason) == ("cuda", "auto: a CUDA device is available")
    assert choose_dtype("auto", device)[0] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose_dtype("auto", device)[0] == torch.float32


def test_the_base_is_frozen_and_its_dropout_off(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert base.model.config.hidden_dropout_prob > 0  # there is some to be off


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_shapes_without_weights_are_those_with_them(request: pytest.FixtureRequest, model: str) -> None:
    """What `fedsb check` prices is what `fedsb run` trains."""
    folder = request.getfixturevalue(model)
    for auto_class in (CLASSIFIER,) if model == "tiny_bert" else (CLASSIFIER, LM):
        found = []
        for shapes_only in (True, False):
            base = load(folder, auto_class, shapes_only=shapes_only)
            parameters = base.parameters
            targets = find_targets(base.model, "blocks", base.head)
            adapted = AdaptedModel(base.model, kind="core", targets=targets, head=base.head)
            head = {key: tuple(t.shape) for key, t in adapted.head_tensors().items()}
            found.append((adapted.shapes, head, base.head, parameters))
            assert all(p.is_meta == shapes_only for p in base.model.parameters())
        assert found[0] == found[1]


# --- heads ---


def test_heads_of_linear_layers_train(tiny_bert: Path, tiny_gpt2: Path, tiny_llama: Path) -> None:
    assert load(tiny_bert).head == ("classifier",)
    assert load(tiny_gpt2).head == load(tiny_llama).head == ("score",)
    assert load(tiny_llama, LM).head == ()
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=50, num_labels=3, **TINY))
    assert find_head(roberta) == (("classifier",), ())  # dense, dropout, out_proj
    toy = nn.Module()
    toy.base_model_prefix = "encoder"
    toy.encoder, toy.norm, toy.dropout, toy.out = nn.Linear(2, 2), nn.LayerNorm(2), nn.Dropout(), nn.Linear(2, 2)
    assert find_head(toy) == (("out",), ("norm",))


def test_a_head_with_a_norm_stays_frozen_and_is_named(tmp_path: Path) -> None:
    """ModernBERT's: dense and norm stand frozen as the checkpoint has them, the classifier trains."""
    config = ModernBertConfig(vocab_size=len(WORDS) + 3, pad_token_id=0, num_labels=3, **TINY)
    base = load(save_model(tmp_path, ModernBertForSequenceClassification(config)))
    assert base.head == ("classifier",)
    assert choice(base, "model.frozen") == ResolvedSetting(
        key="model.frozen", value="head", reason="auto: not linear layers"
    )


def test_head_start() -> None:
    """Keyed by seed and name: N(0, 0.02^2) for weights, 0 for biases."""
    like = {"a.weight": torch.empty(50, 100), "a.bias": torch.empty(50), "b.weight": torch.empty(50, 100)}
    first = head_start(like, seed=0)
    assert float(first["a.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(first["a.weight"].mean())) < 1e-3
    assert first["a.weight"].dtype == torch.float32
    assert not first["a.bias"].any()
    assert not torch.equal(first["a.weight"], first["b.weight"])
    assert not torch.equal(first["a.weight"], head_start(like, seed=1)["a.weight"])
    assert torch.equal(first["b.weight"], head_start({"b.weight": like["b.weight"]}, seed=0)["b.weight"])


# --- what a checkpoint lacks ---


@pytest.fixture
def without_pooler(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS) + 3, **TINY)
    return save_model(tmp_path / "without-pooler", BertModel(config, add_pooling_layer=False))


def test_a_linear_layer_that_the_checkpoint_lacks_trains_with_the_head(without_pooler: Path) -> None:
    base = load(without_pooler)
    assert base.head == ("classifier", "bert.pooler.dense")
    head = choice(base, "model.head")
    assert head is not None and head.value == "classifier, bert.pooler.dense" and "checkpoint" in head.reason


def test_the_exported_adapter_brings_what_the_checkpoint_lacks(
    without_pooler: Path, tiny_config: dict[str, Any]
) -> None:
    """Two loads of the base draw two poolers; with the adapter on, both answer alike."""
    from peft import PeftModel

    run = federate(
        load_config(set_all(tiny_config, rounds=1, model={"name": str(without_pooler), "max_seq_length": 16}))
    )
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    logits, poolers = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(without_pooler, num_labels=3)
        poolers.append(base.bert.pooler.dense.weight.detach().clone())
        logits.append(PeftModel.from_pretrained(base, run.adapter).eval()(input_ids=ids).logits)
    assert not torch.equal(*poolers)
    assert torch.equal(*logits)


def test_two_processes_start_with_the_same_head(without_pooler: Path, tiny_config: dict[str, Any]) -> None:
    config = set_all(tiny_config, model={"name": str(without_pooler), "max_seq_length": 16})
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(open_server(config).trainer.head)
    assert heads[0].keys() == {
        f"{part}.{t}" for part in ("classifier", "bert.pooler.dense") for t in ("weight", "bias")
    }
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])


def test_a_language_model_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    """An encoder's checkpoint, untied, loaded as a causal model: its output layer would be random."""
    config = BertConfig(vocab_size=len(WORDS) + 3, tie_word_embeddings=False, is_decoder=True, **TINY)
    with pytest.raises(UserError, match=r"has no 'cls\.predictions.*AutoModelForCausalLM"):
        load(save_model(tmp_path / "encoder", BertModel(config)), LM)
    assert load(save_model(tmp_path / "whole", BertForMaskedLM(config)), LM).head == ()


def test_a_checkpoint_without_its_embeddings_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_bert / "model.safetensors")
    tensors.pop("embeddings.word_embeddings.weight")
    for path in tiny_bert.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no 'bert\.embeddings\.word_embeddings\.weight'"):
        load(tmp_path)


# --- memory ---


def test_activation_checkpointing_where_there_is_none(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertModel, "supports_gradient_checkpointing", False)
    from transformers import BertForSequenceClassification

    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"BertForSequenceClassification does not support it\. Set it to false"):
        load(tiny_bert, activation_checkpointing=True)


def test_a_pad_token_is_told_only_to_a_model_that_names_none(tiny_bert: Path, tiny_gpt2: Path) -> None:
    assert load(tiny_bert).pad_token is None  # its config has one
    told = load(tiny_gpt2)
    assert told.pad_token == 0 == told.model.config.pad_token_id


def test_attention_and_matrix_precision_are_as_asked(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The precision holds while training and scoring, and no longer."""
    from fedsb.training import joint, scoring

    seen: set[str] = set()

    def watched(*args: Any) -> Any:
        seen.add(torch.get_float32_matmul_precision())
        return forward(*args)

    forward = scoring.forward
    monkeypatch.setattr(joint, "forward", watched)
    monkeypatch.setattr(scoring, "forward", watched)
    model = {**tiny_config["model"], "attn_implementation": "eager", "float32_matmul_precision": "medium"}
    server, state = started(set_all(tiny_config, model=model))
    assert server.trainer.base.model.config._attn_implementation == "eager"
    replies_of(server, state, [server.clients[0].name])
    assert seen == {"medium"}
    seen.clear()
    assert score_global(server, state) is not None
    assert seen == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"


# --- models that are none for the task, or not to be had ---


def test_an_encoder_decoder_is_no_language_model_here(tmp_path: Path) -> None:
    """T5, and BART, whose decoder alone transformers would load."""
    from transformers import BartConfig, T5Config

    for config in (T5Config(), BartConfig()):
        config.save_pretrained(tmp_path)
        for shapes_only in (True, False):
            with pytest.raises(UserError, match=r"is an encoder-decoder model.*Choose a decoder-only model"):
                load(tmp_path, LM, shapes_only=shapes_only)


def test_weights_that_do_not_fit_the_config(tiny_llama: Path, tmp_path: Path) -> None:
    import json

    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 56}))
    with pytest.raises(
        UserError, match=r"do not fit its config.json: model\.layers\.\S+ is \(.*48.*\) in the checkpoint"
    ):
        load(tmp_path, LM)


def test_a_head_of_other_classes_is_drawn_anew(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    config = BertConfig(vocab_size=len(WORDS) + 3, num_labels=5, **TINY)
    base = load(save_model(tmp_path, BertForSequenceClassification(config)))
    assert base.head == ("classifier",)
    assert base.model.classifier.weight.shape == (3, 32)
    assert base.model.classifier.weight.isfinite().all()


def test_a_gated_model_says_where_its_licence_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' words, as its `cached_file` raises them."""
    from transformers import AutoConfig

    from fedsb.utils.errors import NotAvailableError

    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://hub/x.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(
        NotAvailableError, match=r"accept a licence. Do so at https://huggingface.co/meta-llama/Llama-3.2-3B.*HF_TOKEN"
    ):
        load(Path("meta-llama/Llama-3.2-3B"), LM)
    priced = load(Path("meta-llama/Llama-3.2-3B"), LM, shapes_only=True)  # without any token
    assert priced.parameters == 3_212_749_824


def test_a_package_that_a_tokenizer_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from fedsb.models.tokenizer import load_tokenizer

    def refuse(*_: object, **__: object) -> None:
        raise ImportError("this tokenizer needs mecab")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"needs mecab\n    A package is missing. Install the package"):
        load_tokenizer(ModelConfig(name="owner/name"))
