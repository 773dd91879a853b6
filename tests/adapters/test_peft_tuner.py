"""The PEFT tuner: everything a PEFT user does, on tiny models of three families."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.lora.conversion import save_as_lora as peft_save_as_lora
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import fedsb.adapters.peft_layer
import fedsb.adapters.peft_tuner
from fedsb import LoraSBConfig
from fedsb.adapters.basis import random_pair, truncated_svd, weight_pair
from fedsb.adapters.peft_export import save_as_lora, to_lora
from fedsb.adapters.peft_layer import LoraSBLinear, adapter_layers
from fedsb.adapters.peft_update import single_samples, update_basis_
from fedsb.models.layers import base_weight
from fedsb.utils.errors import UserError

IDS = torch.arange(21).reshape(3, 7)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=24,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.2)
    )


FAMILIES = {"bert": bert, "llama": llama, "gpt2": gpt2}


def base(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def moved(model: Any, adapter: str = "default", seed: int = 1) -> Any:
    """The model with a random R, as if it were trained."""
    draw = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model, adapter).values():
        R = layer.lorasb_R[adapter].weight
        R.data = 0.3 * torch.randn(R.shape, generator=draw)
    return model.eval()


def tuned(family: str = "llama", **settings: Any) -> Any:
    return moved(get_peft_model(base(family), LoraSBConfig(**{"r": 4, **settings})))


# --- the layer and its bases ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", ["random", "weights"])
def test_starts_at_the_base_model_and_trains_only_R(family: str, basis: str) -> None:
    model = get_peft_model(base(family), LoraSBConfig(r=4, blocks=2, basis=basis))
    assert torch.equal(logits(model), logits(base(family)))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(".lorasb_R." in name for name in names)
    layers = adapter_layers(model)
    assert model.get_nb_trainable_parameters()[0] == len(layers) * 2 * 4**2
    labels = torch.tensor([0, 1, 2]) if family == "bert" else IDS
    model(input_ids=IDS, labels=labels).loss.backward()
    assert all(layer.lorasb_R["default"].weight.grad.any() for layer in layers.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_bases_are_those_of_the_federation() -> None:
    name, W0 = Q_PROJ, base_weight(base().get_submodule(Q_PROJ))
    for settings, expected in [
        ({"basis": "random", "seed": 7}, random_pair(16, 16, 8, 7, name)),
        ({"basis": "weights"}, weight_pair(W0, 8)),
        ({"basis": "weights", "weights_side": "trailing"}, weight_pair(W0, 8, "trailing")),
    ]:
        layer = adapter_layers(get_peft_model(base(), LoraSBConfig(r=4, blocks=2, **settings)))[name]
        assert torch.equal(layer.lorasb_A["default"].weight, expected[0])
        assert torch.equal(layer.lorasb_B["default"].weight, expected[1])


def test_one_sgd_step_is_the_projection_of_the_full_step() -> None:
    full = base()
    full(input_ids=IDS, labels=IDS).loss.backward()
    G = full.get_submodule(Q_PROJ).weight.grad
    model = get_peft_model(base(), LoraSBConfig(r=4))
    model(input_ids=IDS, labels=IDS).loss.backward()
    layer = adapter_layers(model)[Q_PROJ]
    with torch.no_grad():
        layer.lorasb_R["default"].weight -= 0.1 * layer.lorasb_R["default"].weight.grad
    A, B = layer.lorasb_A["default"].weight, layer.lorasb_B["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), -0.1 * (B @ B.T @ G @ A.T @ A), rtol=1e-4, atol=1e-7)


def test_given_and_update_are_nan_until_they_are_given() -> None:
    model = get_peft_model(base(), LoraSBConfig(r=4, basis="given"))
    assert logits(model).isnan().all()
    for name, layer in adapter_layers(model).items():
        m, n = base_weight(layer.get_base_layer()).shape
        layer.set_basis("default", *random_pair(m, n, 4, 0, name))
    assert torch.equal(logits(model), logits(base()))
    with pytest.raises(UserError, match="have wrong shapes"):
        layer.set_basis("default", torch.zeros(1, 16), torch.zeros(16, 4))
    assert logits(get_peft_model(base(), LoraSBConfig(r=4, basis="update"))).isnan().all()


# --- save, load, merge, convert ---


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_merge_and_plain_lora_agree(family: str, tmp_path: Path) -> None:
    model = tuned(family, blocks=2, scale=0.5, basis="weights")
    expected = logits(model)
    assert (expected - logits(base(family))).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "sb")
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(base(family), tmp_path / "sb", low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config["default"].basis == "weights"

    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base(family), tmp_path / "lora")
    assert lora.peft_config["default"].peft_type == PeftType.LORA and lora.peft_config["default"].r == 8
    torch.testing.assert_close(logits(lora), expected, rtol=0, atol=1e-5)

    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert not any(isinstance(module, LoraSBLinear) for module in merged.modules())


def test_loading_computes_no_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base().save_pretrained(tmp_path / "base")
    model = tuned(basis="weights")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path)
    expected = logits(model)
    monkeypatch.setattr(fedsb.adapters.peft_layer, "weight_pair", None)
    model = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] == 14 * 4**2
    assert torch.equal(logits(model), expected)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    plain = base()
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain), expected)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("basis", ["random", "weights"])
def test_a_config_read_from_a_file_makes_new_adapters(basis: str, tmp_path: Path) -> None:
    """As in SFT, save, load, then DPO: new adapters of that config get their bases, and no NaN."""
    tuned(basis=basis).save_pretrained(tmp_path)
    config = LoraSBConfig.from_pretrained(tmp_path)
    model = get_peft_model(base(), config)
    assert torch.equal(logits(model), logits(base()))
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(base()))
    assert torch.equal(logits(moved(model, "second")), logits(tuned(basis=basis)))

    loaded = PeftModel.from_pretrained(base(), tmp_path)
    loaded.add_adapter("second", loaded.peft_config["default"])
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(base()))


def test_a_pending_basis_is_computed_before_it_is_saved_or_merged(tmp_path: Path) -> None:
    tuned(basis="weights").save_pretrained(tmp_path / "first")
    config = LoraSBConfig.from_pretrained(tmp_path / "first")
    get_peft_model(base(), config).save_pretrained(tmp_path / "second")
    again = moved(PeftModel.from_pretrained(base(), tmp_path / "second"))
    assert torch.equal(logits(again), logits(tuned(basis="weights")))
    assert torch.equal(logits(get_peft_model(base(), config).merge_and_unload()), logits(base()))
    _, tensors = to_lora(get_peft_model(base(), config))
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("basis", ["weights", "given"])
def test_an_adapter_is_copied_by_its_parameter_names(basis: str, tmp_path: Path) -> None:
    """TRL copies "default" to "ref" like this, for the reference of DPO and GRPO."""
    source = get_peft_model(base(), LoraSBConfig(r=4, basis=basis))
    for name, layer in adapter_layers(source).items():
        layer.set_basis("default", *random_pair(layer.out_features, layer.in_features, 4, 3, name))
    moved(source).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), logits(source))


def test_pefts_own_lora_conversion(tmp_path: Path) -> None:
    model = tuned("gpt2")
    assert model.supports_lora_conversion()
    peft_save_as_lora(tmp_path, model, rank=4)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base("gpt2"), tmp_path)), logits(model), rtol=0, atol=1e-4
    )


def test_plain_lora_loads_in_a_process_without_fedsb(tmp_path: Path) -> None:
    model = tuned()
    base().save_pretrained(tmp_path / "base")
    save_as_lora(model, tmp_path / "lora")
    torch.save(logits(model), tmp_path / "logits.pt")
    script = """
import sys, torch
sys.modules["fedsb"] = None
from peft import PeftModel
from transformers import LlamaForCausalLM
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "lora").eval()
logits = model(torch.arange(21).reshape(3, 7)).logits
torch.testing.assert_close(logits, torch.load("logits.pt"), rtol=0, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


def test_task_head_travels_and_converts(tmp_path: Path) -> None:
    config = LoraSBConfig(r=4, task_type=TaskType.SEQ_CLS)
    model = get_peft_model(base("bert"), config)
    assert not any("classifier" in name for name in adapter_layers(model))
    moved(model).classifier.modules_to_save["default"].weight.data.normal_(generator=torch.Generator().manual_seed(2))
    expected = logits(model)
    model.save_pretrained(tmp_path / "sb")
    assert torch.equal(logits(PeftModel.from_pretrained(base("bert"), tmp_path / "sb")), expected)
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base("bert"), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, rtol=0, atol=1e-5)


# --- several adapters ---


def test_several_adapters() -> None:
    model = tuned()
    first, plain = logits(model), logits(base())
    model.add_adapter("second", LoraSBConfig(r=2, basis="weights", target_modules=["q_proj", "lm_head"]))
    assert torch.equal(logits(model), first)
    assert model.get_nb_trainable_parameters()[0] == 14 * 16
    model.set_adapter("second")
    assert torch.equal(logits(model), plain)
    assert model.get_nb_trainable_parameters()[0] == 3 * 4
    second = logits(moved(model, "second"))
    assert not torch.allclose(second, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first) and not torch.allclose(both, second)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), both, rtol=0, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    with pytest.raises(UserError, match="there are: default"):
        to_lora(model, "second")


def test_default_targets_of_a_second_adapter() -> None:
    model = tuned()
    model.add_adapter("second", LoraSBConfig(r=2))
    assert list(adapter_layers(model, "second")) == list(adapter_layers(model))


def test_each_row_takes_the_adapter_named_for_it() -> None:
    model = tuned()
    model.add_adapter("second", LoraSBConfig(r=2, target_modules=["q_proj", "down_proj"]))
    moved(model, "second", seed=2)
    first, plain = logits(model), logits(base())
    model.set_adapter("second")
    second = logits(model)
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["second", "__base__", "default"]).logits
    expected = torch.stack([second[0], plain[1], first[2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert (expected - first).abs().max() > 1e-3
    assert torch.equal(logits(model), second)  # the names were for one forward only
    for names, message in [
        (["second"] * 2, "got 2 and 3"),
        (["second", "thrid", "default"], "non-existing adapter.*thrid.*Known names: __base__, default, second"),
    ]:
        with pytest.raises(UserError, match=message):
            model(input_ids=IDS, adapter_names=names)
    with pytest.raises(UserError, match="training mode"):
        model.train()(input_ids=IDS, adapter_names=["second"] * 3)
    model.eval().merge_adapter(["second"])
    with pytest.raises(UserError, match="unmerge_adapter"):
        model(input_ids=IDS, adapter_names=["second"] * 3)


def test_generation_with_beams_takes_the_adapter_of_each_row() -> None:
    model = tuned()
    settings: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    adapted = model.generate(input_ids=IDS, **settings)
    plain = base().generate(input_ids=IDS, **settings)
    assert not torch.equal(adapted, plain)
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "__base__", "default"], **settings)
    assert torch.equal(mixed, torch.stack([adapted[0], plain[1], adapted[2]]))


# --- what to adapt ---


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 14),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*self_attn\.(q|k)_proj"}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"layers_to_transform": [1]}, 7),
        ({"layers_to_transform": 0, "layers_pattern": "layers", "exclude_modules": ["q_proj"]}, 6),
        ({"layers_to_transform": [1], "target_modules": [Q_PROJ, "v_proj"]}, 2),
        ({"exclude_modules": ["down_proj"]}, 12),
        ({"exclude_modules": r".*layers\.0\..*"}, 7),
    ],
)
def test_targets(settings: dict[str, Any], count: int) -> None:
    assert len(adapter_layers(get_peft_model(base(), LoraSBConfig(r=4, **settings)))) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": "weight"}, "did you mean 'weights'"),
        ({"r": 0}, "r = 0"),
        ({"weights_side": "left"}, "weights_side = 'left'"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "cannot be used when `target_modules` is a str"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraSBConfig(**settings)


def test_bad_targets_leave_the_model_untouched() -> None:
    for settings, message in [
        ({"r": 9, "blocks": 2}, "r x blocks = 18 is above"),
        ({"target_modules": ["embed_tokens"]}, "Embedding: not a linear"),
        ({"target_modules": r".*self_attn.*"}, "LlamaAttention: not a linear"),
    ]:
        model = base()
        with pytest.raises(UserError, match=message):
            get_peft_model(model, LoraSBConfig(**{"r": 4, **settings}))
        assert not any(isinstance(module, LoraSBLinear) for module in model.modules())


def test_a_model_without_blocks_needs_targets() -> None:
    with pytest.raises(UserError, match="Please specify `target_modules`") as caught:
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraSBConfig(r=2))
    assert "model.target_modules" not in str(caught.value)


def test_layers_show_their_base() -> None:
    layer = adapter_layers(tuned("gpt2"))["transformer.h.0.mlp.c_fc"]
    assert (layer.in_features, layer.out_features) == (16, 64)
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias


def test_registered_once_and_copies_keep_the_type() -> None:
    fedsb.adapters.peft_tuner.register()
    assert PeftType("LORASB") is PeftType.LORASB is PeftType["LORASB"]
    assert copy.deepcopy(LoraSBConfig()).peft_type is PeftType.LORASB
    assert isinstance(get_peft_model(base(), LoraConfig(target_modules=["q_proj"])), PeftModel)


# --- precision, checkpointing, quantised bases ---


def test_bfloat16_base_keeps_R_in_float32(tmp_path: Path) -> None:
    model = moved(get_peft_model(base().to(torch.bfloat16), LoraSBConfig(r=4)))
    layer = adapter_layers(model)[Q_PROJ]
    R = layer.lorasb_R["default"].weight.detach().clone()
    assert R.dtype == torch.float32
    model.to(torch.bfloat16)
    assert torch.equal(layer.lorasb_R["default"].weight, R)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert layer.lorasb_R["default"].weight.grad.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):  # PEFT's own move to the device would cast R to bfloat16 here
        loaded = PeftModel.from_pretrained(base().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(adapter_layers(loaded)[Q_PROJ].lorasb_R["default"].weight, R)


def test_autocast() -> None:
    model = tuned()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert adapter_layers(model)[Q_PROJ].lorasb_R["default"].weight.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tuned().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([layer.lorasb_R["default"].weight.grad for layer in adapter_layers(model).values()])
    torch.testing.assert_close(*gradients)


class IntBackend(QuantizationBackend):
    """Weights rounded to multiples of 1/64."""

    layer_type, supports_merge, backend_name = "linear", True, "test"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.weight.data / 64

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().weight.data = (weight_data * 64).round()


class IntLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / 64)


def test_merging_into_a_quantised_base_goes_through_its_backend() -> None:
    quantised = IntLinear(16, 16, bias=False)
    quantised.weight.data = torch.randint(-8, 8, (16, 16)).float()
    W0 = quantised.weight.data / 64
    layer = LoraSBLinear(quantised)
    layer.quantization_backend = IntBackend()
    layer.add("default", LoraSBConfig(r=4, basis="weights"), "layer")
    assert torch.equal(layer.lorasb_A["default"].weight, weight_pair(W0, 4)[0])
    assert "quantization_backend='test'" in repr(layer)
    layer.lorasb_R["default"].weight.data.fill_(0.2)
    delta = layer.get_delta_weight("default").detach()
    layer.merge()
    assert (quantised.weight / 64 - W0 - delta).abs().max() <= 0.5 / 64 + 1e-6
    assert torch.equal(quantised.weight, quantised.weight.round())


def test_merging_a_broken_adapter_is_refused() -> None:
    layer = LoraSBLinear(nn.Linear(8, 8))
    layer.add("default", LoraSBConfig(r=2, basis="given"), "layer")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


# --- the update basis ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sign", [True, False])
def test_update_starts_one_truncated_full_step_away(family: str, sign: bool) -> None:
    labels = torch.tensor([0, 1, 2]) if family == "bert" else IDS
    full = base(family)
    (3 * full(input_ids=IDS, labels=labels).loss).backward()  # rows are alike in length: 3 x mean = sum
    model = get_peft_model(base(family), LoraSBConfig(r=4, blocks=2, scale=0.5, basis="update"))
    captured = update_basis_(model, [{"input_ids": IDS, "labels": labels}], lr=1e-2, sign=sign, budget_bytes=3000)
    for name, layer in adapter_layers(model).items():
        G = full.get_submodule(name).weight.grad
        G = G.T if family == "gpt2" else G
        U, S, V = truncated_svd(-1e-2 * G, 8)
        delta = layer.get_delta_weight("default")
        delta = delta.T if family == "gpt2" else delta
        if not sign:  # the tail of a sign matrix hangs on the rounding of single entries
            torch.testing.assert_close(delta, (U * S) @ V.T, rtol=1e-3, atol=1e-6)
        assert 0.2 < captured[name] < 1.00001  # a share, to float tolerance
        assert torch.linalg.matrix_rank(delta) <= 8
    assert model(input_ids=IDS, labels=labels).loss < full(input_ids=IDS, labels=labels).loss


def test_update_leaves_the_model_as_it_was() -> None:
    model = get_peft_model(base("bert"), LoraSBConfig(r=4, basis="update", task_type=TaskType.SEQ_CLS)).train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1, 2])}
    update_basis_(model, [batch], lr=1e-3)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(not p.grad_fn and p.isfinite().all() for p in model.parameters())
    assert model.peft_config["default"].basis == "update"


def test_update_weights_samples_equally_whatever_their_length() -> None:
    long, short = IDS[:1], IDS[1:2, :3]
    padded = torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    ids = torch.cat([long, padded])
    batched = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    alone = [{"input_ids": ids, "labels": ids} for ids in (long, short)]
    deltas = []
    for batches in ([batched], alone):
        model = get_peft_model(base(), LoraSBConfig(r=4, basis="update"))
        update_basis_(model, batches, lr=1.0, sign=False)
        deltas.append([layer.get_delta_weight("default") for layer in adapter_layers(model).values()])
    torch.testing.assert_close(*deltas, rtol=1e-3, atol=1e-5)
    by_hand = get_peft_model(base(), LoraSBConfig(r=4, basis="update"))
    update_basis_(by_hand, alone, lambda model, batch: model(**batch).loss, lr=1.0, sign=False)
    found = [layer.get_delta_weight("default") for layer in adapter_layers(by_hand).values()]
    torch.testing.assert_close(found, deltas[1], rtol=1e-3, atol=1e-5)


def test_update_refuses_a_generator_and_nothing() -> None:
    model = get_peft_model(base(), LoraSBConfig(r=4, basis="update"))
    with pytest.raises(UserError, match="list or a DataLoader"):
        update_basis_(model, ({} for _ in range(1)), lr=1e-3)
    with pytest.raises(UserError, match="empty"):
        update_basis_(model, [], lr=1e-3)
    assert model.get_nb_trainable_parameters()[0] == 14 * 16  # R trains again after the failure


def test_single_samples_keep_what_is_not_by_row() -> None:
    parts = list(single_samples({"a": torch.arange(4).reshape(2, 2), "scale": torch.tensor(2.0), "flag": True}))
    assert [part["a"].tolist() for part in parts] == [[[0, 1]], [[2, 3]]]
    assert all(part["scale"] == 2 and part["flag"] for part in parts)


# --- the Trainer, and the page's script ---


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def train(steps: int, resume: bool = False) -> Trainer:
        arguments = TrainingArguments(
            tmp_path / "out",
            max_steps=steps,
            save_steps=2,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        model = get_peft_model(base(), LoraSBConfig(r=8, basis="weights"))
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    train(2)
    resumed = train(4, resume=True).model
    saved = PeftModel.from_pretrained(base(), tmp_path / "out" / "checkpoint-4")
    torch.testing.assert_close(logits(saved), logits(resumed))
    (tmp_path / "out").rename(tmp_path / "broken")
    torch.testing.assert_close(logits(train(4).model), logits(resumed))
    with torch.no_grad():
        assert resumed(input_ids=IDS, labels=IDS).loss < base()(input_ids=IDS, labels=IDS).loss - 0.01


def test_the_script_of_the_page_runs(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "docs" / "one_machine.py"
    spec = importlib.util.spec_from_file_location("one_machine", path)
    assert spec and spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, last, difference = page.main(None, tmp_path, steps=8)
    assert last < first and difference < 1e-5
