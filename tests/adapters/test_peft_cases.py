"""One table of models and configs through everything PEFT does with an adapter: LoraSBConfig beside LoraConfig.

Each test states what PEFT promises for every method, so that LoRA shows that the test itself is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_model_status, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from fedsb import LoraSBConfig
from fedsb.adapters import peft_export
from fedsb.adapters.peft_export import save_as_lora
from fedsb.adapters.peft_layer import adapter_layers
from fedsb.utils.errors import RunError, UserError

IDS = torch.arange(3, 24).reshape(3, 7)
IDS[:, -1] = 23  # T5 classifies at the last end-of-text token
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS: dict[str, Any] = {**SIZES, "num_attention_heads": 2, "intermediate_size": 24}
MOE: dict[str, Any] = {
    **HEADS,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    tokens = {"eos_token_id": 23, "decoder_start_token_id": 0}
    return T5ForSequenceClassification(T5Config(**sizes, **tokens, num_labels=3, classifier_dropout=0.0))


DEEPSEEK: dict[str, Any] = {  # the first block is dense, the second has experts and a shared expert
    **HEADS,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "v_head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
MAMBA2 = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 4}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**HEADS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**HEADS, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**HEADS, num_labels=3)),
    "t5": t5,
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**SIZES, **MAMBA2)),
    "jamba": lambda: JambaForCausalLM(JambaConfig(**HEADS, num_key_value_heads=2, num_experts=2, **JAMBA)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=12)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, head_dim=8, mlp_only_layers=[0])),
}
COMMON = ["llama", "gpt2", "bert", "roberta", "t5"]
HEAD = {"bert": ["classifier"], "roberta": ["classifier"], "t5": ["classification_head"]}
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "output.dense"],
    "roberta": ["query", "output.dense"],
    "t5": ["q", "wo"],
}
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lambda **more: LoraConfig(r=2, lora_alpha=3, **more),
    "random": lambda **more: LoraSBConfig(r=4, scale=0.5, **more),
    "weights": lambda **more: LoraSBConfig(r=2, blocks=2, basis="weights", **more),
}
every_case = [pytest.param(family, method, id=f"{family}-{method}") for family in COMMON for method in CONFIGS]


def base(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]().eval()


def config(family: str, method: str) -> PeftConfig:
    return CONFIGS[method](target_modules=TARGETS[family], modules_to_save=HEAD.get(family))


def moved(model: Any, adapter: str = "default", seed: int = 1) -> Any:
    """The model after something like training: every trainable tensor of the adapter was changed."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def tuned(family: str, method: str) -> Any:
    return moved(get_peft_model(base(family), config(family, method)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("family", "method"), every_case)
def test_saves_and_loads(family: str, method: str, tmp_path: Path) -> None:
    model = tuned(family, method)
    expected = logits(model)
    assert (expected - logits(base(family))).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(base(family), tmp_path, **settings)
        close(logits(loaded), expected)
        trains = any(parameter.requires_grad for parameter in loaded.parameters())
        assert trains == ("is_trainable" in settings)
    loaded.load_adapter(tmp_path, "more")
    loaded.set_adapter("more")
    close(logits(loaded), expected)
    plain = base(family)
    plain.load_adapter(tmp_path)
    close(logits(plain), expected)


@pytest.mark.parametrize(("family", "method"), every_case)
def test_merges_and_unmerges(family: str, method: str) -> None:
    model = tuned(family, method)
    expected, plain = logits(model), logits(base(family))
    model.merge_adapter(safe_merge=True)
    close(logits(model), expected)
    model.unmerge_adapter()
    close(logits(model), expected)
    with model.disable_adapter():
        close(logits(model), plain)
    merged = copy.deepcopy(model).merge_and_unload()
    close(logits(merged), expected)
    assert [(name, type(module)) for name, module in merged.named_modules()] == [
        (name, type(module)) for name, module in base(family).named_modules()
    ]


@pytest.mark.parametrize(("family", "method"), every_case)
def test_two_adapters(family: str, method: str) -> None:
    model = tuned(family, method)
    first = logits(model)
    model.add_adapter("second", config(family, method))
    model.set_adapter("second")
    second = logits(moved(model, "second", seed=2))
    assert (second - first).abs().max() > 1e-3
    model.set_adapter("default")
    close(logits(model), first)
    model.delete_adapter("second")
    close(logits(model), first)
    assert not [name for name in model.state_dict() if ".second" in name]


@pytest.mark.parametrize(("family", "method"), every_case)
def test_only_the_adapter_trains(family: str, method: str) -> None:
    model = get_peft_model(base(family), config(family, method)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    labels = torch.tensor([0, 1, 2]) if family in HEAD else IDS
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    for _ in range(2):  # LoRA's A moves from the second step on
        model(input_ids=IDS, labels=labels).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed and all(".default." in name for name in changed)


@pytest.mark.parametrize(("family", "method"), every_case)
def test_direct_injection_and_attributes(family: str, method: str) -> None:
    model = inject_adapter_in_model(config(family, method), base(family))
    close(logits(model), logits(base(family)))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    for layer in layers:
        bare = layer.get_base_layer()
        assert {layer.in_features, layer.out_features} == set(bare.weight.shape) or layer.in_features == 16
        assert layer.weight is bare.weight and layer.bias is bare.bias


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model = moved(get_peft_model(base("llama").to(dtype), config("llama", method)))
    found = logits(model)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), logits(tuned("llama", method)), rtol=0, atol=0.1)
    torch.testing.assert_close(logits(model.merge_and_unload()), found, rtol=0, atol=0.1)


@pytest.mark.parametrize("method", CONFIGS)
def test_safe_merge_refuses_nan(method: str) -> None:
    model = tuned("llama", method)
    name = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.get_parameter(name).data[0] = torch.nan
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(("family", "method"), every_case)
def test_unloads(family: str, method: str) -> None:
    plain, expected = tuned(family, method).unload(), base(family)
    if family in HEAD:  # PEFT leaves the trained head in place
        for name in HEAD[family]:
            expected.get_submodule(name).load_state_dict(plain.get_submodule(name).state_dict())
    close(logits(plain), logits(expected))
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())


@pytest.mark.parametrize(("family", "method"), every_case)
def test_merges_one_adapter_of_two(family: str, method: str) -> None:
    model = tuned(family, method)
    first = logits(model)
    model.add_adapter("second", config(family, method))
    moved(model, "second", seed=2)
    model.set_adapter("second")
    second = logits(model)
    if family not in HEAD:  # one head is active, whatever is merged
        model.merge_adapter(["default"])
        close(logits(model), first)
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
        close(logits(model), second)
    merged = model.merge_and_unload(adapter_names=["second"])
    close(logits(merged), second)


@pytest.mark.parametrize(("family", "method"), every_case)
def test_deleting_the_active_adapter_activates_the_other(family: str, method: str) -> None:
    model = tuned(family, method)
    model.add_adapter("second", config(family, method))
    second = logits(moved_alone(model, "second"))
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    close(logits(model), second)


def moved_alone(model: Any, adapter: str) -> Any:
    model.set_adapter(adapter)
    return moved(model, adapter, seed=2)


@pytest.mark.parametrize("method", CONFIGS)
def test_status(method: str) -> None:
    model = tuned("llama", method)
    model.add_adapter("second", config("llama", method))
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    assert status.num_adapter_layers == len([m for m in model.modules() if isinstance(m, BaseTunerLayer)])
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("method", CONFIGS)
def test_compiles(method: str) -> None:
    model = tuned("llama", method)
    expected = logits(model)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        close(compiled(input_ids=IDS).logits, expected)


def test_weighted_adapters_are_refused() -> None:
    model = tuned("llama", "random")
    with pytest.raises(AttributeError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "both")


# --- every architecture, with the default targets ---


@pytest.mark.parametrize("family", MODELS)
def test_default_targets_train_merge_and_convert(family: str, tmp_path: Path) -> None:
    model = get_peft_model(base(family), LoraSBConfig(r=1, modules_to_save=HEAD.get(family)))
    layers = adapter_layers(model)
    assert not [name for name in layers if name.endswith("dt_proj")]
    labels = torch.tensor([0, 1, 2]) if family in HEAD else IDS
    model(input_ids=IDS, labels=labels).loss.backward()
    assert all(layer.lorasb_R["default"].weight.grad is not None for layer in layers.values())
    for layer in layers.values():
        layer.lorasb_R["default"].weight.data[:] = 1.0
    expected = logits(model)
    assert (expected - logits(base(family))).abs().max() > 1e-4
    save_as_lora(model, tmp_path)
    close(logits(PeftModel.from_pretrained(base(family), tmp_path)), expected)
    close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_a_plain_lora_that_peft_would_rewrite_is_not_left_unnoticed(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_export, "lora_targets", lambda layers, model_type: (layers, None))
    model = get_peft_model(base(family), LoraSBConfig(r=1))
    with pytest.raises(RunError, match="as it was trained"):
        save_as_lora(model, tmp_path)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba"])
def test_a_layer_whose_weight_is_read_directly_is_refused(family: str) -> None:
    child = "out_proj" if family == "mamba2" else "dt_proj"
    model = base(family)
    with pytest.raises(UserError, match=f"{child}'. The model reads the weight"):
        get_peft_model(model, LoraSBConfig(r=1, target_modules=["in_proj", child]))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    every = adapter_layers(get_peft_model(model, LoraSBConfig(r=1, target_modules="all-linear")))
    assert every and not [name for name in every if name.endswith(child)]
