"""Quantised bases: what is quantised, training on it as on the weights that its bits stand for, and exports."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import WORDS, Said, save_model, set_all, write_toml
from fedsb.adapters.basis import weight_pair
from fedsb.config.inputs import ModelConfig
from fedsb.config.load import load_config
from fedsb.models.layers import base_weight
from fedsb.models.load import load_base
from fedsb.models.quantise import count_values, missing_package, weight_bytes
from fedsb.runs.run import federate
from fedsb.utils.errors import ConfigError, UserError
from support.server import open_server

LM, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def model_of(kind: str) -> Any:
    """Layers of 64 values a row or a multiple, but for Llama's down_proj, of 96: no whole blocks of 4-bit scales."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = len(WORDS) + 3
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=words, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=2)
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=64,
        )
    )


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), model_of(request.param))


def load(folder: Path, quantize: str, auto_class: str = LM, **more: Any) -> Any:
    labels = 3 if auto_class == CLASSIFIER else 0
    config = ModelConfig(name=str(folder), quantize=quantize, **more)  # type: ignore[arg-type]
    return load_base(config, auto_class=auto_class, num_labels=labels, pad_token=0)


def dequantised(folder: Path, quantize: str, target: Path) -> Path:
    """The folder's model with the weights that its quantised bits stand for, in float32, as an ordinary model."""
    quantised = load(folder, quantize, dtype="float32").model
    plain = type(quantised).from_pretrained(folder, dtype=torch.float32)
    for name, module in quantised.named_modules():
        if type(module).__name__.startswith(("Linear4bit", "Linear8bit")):
            own = plain.get_submodule(name)
            W0 = base_weight(module)
            own.weight.data = W0 if isinstance(own, nn.Linear) else W0.T.contiguous()
    for path in folder.iterdir():
        if path.suffix == ".json":
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name).write_bytes(path.read_bytes())
    plain.save_pretrained(target)
    return target


# --- what is quantised ---


@needs_bitsandbytes
@pytest.mark.parametrize(("quantize", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
@pytest.mark.parametrize("auto_class", [LM, CLASSIFIER])
def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(
    folder: Path, quantize: str, kind: str, auto_class: str
) -> None:
    base = load(folder, quantize, auto_class, dtype="bfloat16")
    chosen = {name for name, module in base.model.named_modules() if type(module).__name__ == kind}
    linear = {name for name, module in base.model.named_modules() if isinstance(module, nn.Linear)}
    left = {name for name in linear if "down_proj" in name} if quantize == "4bit" else set()
    assert linear - chosen == left | ({"lm_head"} if auto_class == LM else {"score"})
    assert all(".0." in name or ".1." in name for name in chosen) and len(chosen | left) in (14, 8)
    assert not any(p.requires_grad for p in base.model.parameters())
    plain = load(folder, "none", auto_class)
    assert base.parameters == plain.parameters == count_values(base.model)
    reasons = {choice.key: choice for choice in base.choices}
    assert reasons["model.quantize"].value == quantize and "as configured" in reasons["model.quantize"].reason
    assert base.model.dtype == torch.bfloat16
    assert "model.quantize" not in {choice.key for choice in plain.choices}


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_what_a_quantised_weight_stands_for_is_near_the_weight(folder: Path, quantize: str) -> None:
    """4 bits: within a tenth or so of its size; 8 bits: within a hundredth. The basis is of that, not of the bits."""
    plain, base = load(folder, "none").model, load(folder, quantize).model
    layers = [name for name, module in base.named_modules() if type(module).__name__.startswith(("Linear4", "Linear8"))]
    for name in layers:
        W0, near = base_weight(plain.get_submodule(name)), base_weight(base.get_submodule(name))
        assert near.shape == W0.shape and near.dtype == torch.float32
        error = float((near - W0).norm() / W0.norm())
        assert 0 < error < (0.13 if quantize == "4bit" else 0.012)
        A, B = weight_pair(near, 4)
        assert A.shape == (4, W0.shape[1]) and B.shape == (W0.shape[0], 4)


@needs_bitsandbytes
def test_the_price_of_a_quantised_base_is_what_it_takes(folder: Path) -> None:
    """Within a hundredth or so, plus the tables of 4-bit values that every layer holds (256 + 16 float32)."""
    for quantize in ("4bit", "8bit"):
        base = load(folder, quantize, dtype="bfloat16").model
        config = ModelConfig(name=str(folder), quantize=quantize, dtype="bfloat16")  # type: ignore[arg-type]
        meta = load_base(config, auto_class=LM, num_labels=0, pad_token=0, shapes_only=True).model
        held = 0
        layers = 0
        for p in base.parameters():
            held += p.numel() * p.element_size()
            state = getattr(p, "quant_state", None)
            if state is not None:
                layers += 1
                held += state.absmax.numel() + 4 * state.state2.absmax.numel()
            elif type(p).__name__ == "Int8Params":
                held += p.shape[0] * 4
        assert weight_bytes(meta, quantize, ()) == pytest.approx(held, rel=0.01)


# --- training on it ---


@needs_bitsandbytes
@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "fedit", "rank": 2}])
@pytest.mark.parametrize("kind", ["text", "classification"])
def test_training_on_4_bits_is_training_on_what_they_stand_for(
    folder: Path, tiny_config: dict[str, Any], tmp_path: Path, method: dict[str, Any], kind: str
) -> None:
    """In float32: the same adapter as on an ordinary model with those weights, to float tolerance."""
    from safetensors.torch import load_file

    plain = dequantised(folder, "4bit", tmp_path / "plain")
    adapters = []
    for name, quantize in ((folder, "4bit"), (plain, "none")):
        model = {"name": str(name), "max_seq_length": 16, "quantize": quantize, "dtype": "float32"}
        basis = {"kind": "weights", "share_samples": 0}
        config = set_all(tiny_config, name=quantize, model=model, method=method, basis=basis, task={"kind": kind})
        config["train"] = {**tiny_config["train"], "optimizer": "sgd", "lr": 0.1}  # Adam's first step is a sign
        run = federate(load_config(config))
        adapters.append(load_file(run.adapter / "adapter_model.safetensors"))
    quantised, ordinary = adapters
    assert quantised.keys() == ordinary.keys()
    moved = 0.0
    for layer in [key for key in quantised if "lora_B" in key]:
        other = layer.replace("lora_B", "lora_A")
        change, wanted = quantised[layer] @ quantised[other], ordinary[layer] @ ordinary[other]
        assert torch.allclose(change, wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-9), layer
        moved += float(wanted.abs().max())
    assert moved > 0


@needs_bitsandbytes
@pytest.mark.parametrize("quantize", ["none", "4bit", "8bit"])
def test_a_run_in_bfloat16_through_the_command_line(
    cli: Callable[..., Said], folder: Path, tiny_config: dict[str, Any], tmp_path: Path, quantize: str
) -> None:
    """Run, score, stop and resume, load again from the card's own lines, merge."""
    model = {"name": str(folder), "max_seq_length": 16, "dtype": "bfloat16", "quantize": quantize}
    config = set_all(tiny_config, model=model, basis={"kind": "weights"}, task={"kind": "text"}, rounds=2)
    toml = write_toml(tmp_path / "q.toml", config)
    said = cli("run", toml)
    assert said.code == 0 and "MatMul8bitLt" not in said.err, said.err
    run = tmp_path / "runs" / "tiny"
    manifest = json.loads((run / "manifest.json").read_text())
    kinds = {"none": None, "4bit": "load_in_4bit", "8bit": "load_in_8bit"}
    keys = manifest["model"]["quantization"]
    assert keys == {} if quantize == "none" else keys[kinds[quantize]] is True
    card = (run / "adapter" / "README.md").read_text()
    assert ("BitsAndBytesConfig(" in card) == ("quantised as above" in card) == (quantize != "none")
    result = json.loads((run / "result.json").read_text())
    scope: dict[str, Any] = {}
    exec(result["load"], scope)
    loaded = {type(module).__name__ for module in scope["base"].modules()}
    assert ("Linear4bit" in loaded) == (quantize == "4bit") and ("Linear8bitLt" in loaded) == (quantize == "8bit")
    assert json.loads(cli("eval", run, "--json").out)["nats_per_token"] == pytest.approx(result["score"], rel=2e-3)
    assert cli("resume", run).code == 0
    assert cli("export", run, "--to", tmp_path / "merged", "--merged").code == 0
    assert (tmp_path / "merged" / "config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@needs_bitsandbytes
def test_scoring_leaves_4_bits_fit_for_training(folder: Path) -> None:
    """Where the CPU has AVX512-BF16, a forward without gradients would repack the weights for good."""
    base = load(folder, "4bit")
    layer = next(module for module in base.model.modules() if type(module).__name__ == "Linear4bit")
    before = layer.weight.data.clone()
    with torch.no_grad():
        base.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert torch.equal(layer.weight.data, before)
    assert not layer.support_avx512bf16_for_cpu
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


# --- what cannot be ---


def test_without_bitsandbytes(
    cli: Callable[..., Said],
    tiny_config: dict[str, Any],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run says which extra brings it; a price needs no such package, and says that a run does."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    model = {"name": str(tiny_llama), "max_seq_length": 16, "quantize": "4bit"}
    toml = write_toml(tmp_path / "q.toml", set_all(tiny_config, model=model))
    said = cli("run", toml)
    assert said.code == 1
    wanted = (
        "model.quantize = '4bit' needs bitsandbytes, which is not installed. Install it: pip install 'fedsb[quant]'"
    )
    assert wanted in said.err and "Without a network" not in said.err
    assert not (tmp_path / "runs" / "tiny").exists()
    checked = cli("check", toml)
    assert checked.code == 0 and wanted in " ".join(checked.out.split())
    assert missing_package("none") is None and missing_package("8bit") == wanted.replace("4bit", "8bit")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"engine": {"clients_per_forward": 2}}, "Set engine.clients_per_forward to 1"),
        ({"privacy": {"unit": "example", "epsilon": 3.0}}, r"so no single row is protected\. Set model.quantize to"),
    ],
)
def test_8_bits_mix_a_batchs_rows(tiny_config: dict[str, Any], more: dict[str, Any], part: str) -> None:
    """LLM.int8() looks for outlier columns in the whole batch."""
    config = set_all(tiny_config, model={**tiny_config["model"], "quantize": "8bit"}, **more)
    with pytest.raises(ConfigError, match=part):
        load_config(config)
    load_config(set_all(config, model={**tiny_config["model"], "quantize": "4bit"}))


@needs_bitsandbytes
def test_8_bits_are_trained_a_client_at_a_time(folder: Path, tiny_config: dict[str, Any]) -> None:
    model = {"name": str(folder), "max_seq_length": 16, "quantize": "8bit"}
    server = open_server(set_all(tiny_config, model=model))
    assert server.channel.clients_per_forward == 1
    assert any(
        "whole batch" in choice.reason for choice in server.settings if choice.key == "engine.clients_per_forward"
    )


@needs_bitsandbytes
def test_roots_logging_is_left_alone(folder: Path) -> None:
    level = logging.getLogger().level
    load(folder, "8bit")
    assert logging.getLogger().level == level


def test_an_unknown_quantisation(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantize"):
        load_config(set_all(tiny_config, model={**tiny_config["model"], "quantize": "2bit"}))
    assert issubclass(ConfigError, UserError)
