"""What must be the same at all sites and on all days: the tokenizer, the model's config, the chat template's date."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from conftest import set_all
from fedsb.channels.in_process import open_in_process
from fedsb.config.inputs import ModelConfig
from fedsb.config.load import load_config
from fedsb.models.load import load_base
from fedsb.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedsb.reporting.run_directory import read_manifest
from fedsb.runs.evaluate import export_to
from fedsb.runs.run import federate, resume
from fedsb.utils.errors import UserError
from support.architectures import build, save_tokenizer, write_rows

LM = "AutoModelForCausalLM"
DATED = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }} [EOS]{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build(tmp_path / "model", "llama", LM)


def prints(folder: Path, **settings: Any) -> tuple[str, str]:
    """(the model's fingerprint, the tokenizer's)."""
    config = ModelConfig(name=str(folder), **settings)
    base = load_base(config, auto_class=LM, num_labels=0, pad_token=0)
    return base.fingerprint, tokenizer_fingerprint(load_tokenizer(config))


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


# --- fingerprints ---


def test_another_config_with_the_same_weights_is_another_model(model: Path) -> None:
    before = prints(model)
    changed(model / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    after = prints(model)
    assert before[0] != after[0] and before[1] == after[1]


def test_names_versions_and_labels_make_no_other_model(model: Path) -> None:
    before = prints(model)
    names = {"transformers_version": "5.0", "_name_or_path": "mine", "architectures": ["Mine"], "id2label": {"0": "a"}}
    changed(model / "config.json", lambda config: config.update(names))
    assert prints(model) == before
    shutil.copytree(model, other := model.with_name("elsewhere"))
    assert prints(other) == before


@pytest.mark.parametrize("part", ["chat template", "normaliser", "pre-tokeniser"])
def test_how_text_becomes_tokens_is_in_the_fingerprint(model: Path, part: str) -> None:
    before = prints(model)[1]
    if part == "chat template":
        save_tokenizer(model, template="{% for m in messages %}{{ m.content }} [EOS]{% endfor %}")
    elif part == "normaliser":
        changed(model / "tokenizer.json", lambda found: found.update(normalizer={"type": "Lowercase"}))
    else:
        changed(model / "tokenizer.json", lambda found: found.update(pre_tokenizer={"type": "WhitespaceSplit"}))
    assert prints(model)[1] != before


def test_using_a_tokenizer_does_not_change_its_fingerprint(model: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name=str(model)))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["red1 red2 red3", "red1"], truncation=True, max_length=2, padding=True)
    assert tokenizer_fingerprint(tokenizer) == before


def test_a_run_is_not_resumed_on_a_model_with_another_config(tiny_config: dict[str, Any], model: Path) -> None:
    config = set_all(tiny_config, model={"name": str(model), "max_seq_length": 16}, task={"kind": "text"})
    result = federate(load_config(config))
    changed(model / "config.json", lambda found: found.update(rms_norm_eps=0.5))
    with pytest.raises(UserError, match=r"the base model of .* has changed"):
        resume(result.folder)


# --- a chat template that writes the date ---


def test_the_date_of_a_chat_template_is_that_of_the_runs_start(tiny_config: dict[str, Any], model: Path) -> None:
    save_tokenizer(model, template=DATED)
    rows = [{"prompt": f"red{i}", "answer": f"blue{i}"} for i in range(8)]
    data = {"train": str(write_rows(model.with_name("rows.jsonl"), rows))}
    config = set_all(
        tiny_config, model={"name": str(model), "max_seq_length": 32}, task={"kind": "instruction"}, data=data,
        clients={"count": 2}, rounds=1,
    )  # fmt: skip
    result = federate(load_config(config))
    manifest = read_manifest(result.folder)
    assert manifest["config"]["model"]["template_date"] == date.today().isoformat()
    card = (result.folder / "adapter" / "README.md").read_text()
    assert f"| Date in the prompts | {date.today().isoformat()} |" in card
    assert resume(result.folder, changed=load_config(config)).score == result.score  # not set there: no difference


def test_an_exported_model_writes_the_date_that_it_was_trained_with(
    tiny_config: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(model, template=DATED)
    rows = [{"prompt": f"red{i}", "answer": f"blue{i}"} for i in range(8)]
    settings = set_all(
        tiny_config,
        model={"name": str(model), "max_seq_length": 32, "template_date": "2020-01-02"},
        task={"kind": "instruction"},
        data={"train": str(write_rows(tmp_path / "rows.jsonl", rows))},
        clients={"count": 2},
        rounds=1,
    )
    folder = federate(load_config(settings)).folder
    for made in (folder / "adapter", export_to(folder, str(tmp_path / "merged"), merged=True)):
        text = AutoTokenizer.from_pretrained(made).apply_chat_template(
            [{"role": "user", "content": "red1"}], tokenize=False
        )
        assert text == "02 Jan 2020 red1 [EOS]"


def test_a_run_of_another_day_writes_its_own_date(tiny_config: dict[str, Any], model: Path) -> None:
    save_tokenizer(model, template=DATED)
    settings = ModelConfig(name=str(model), template_date="2020-01-02")
    text = load_tokenizer(settings).apply_chat_template([{"role": "user", "content": "red1"}], tokenize=False)
    assert text == "02 Jan 2020 red1 [EOS]"
    assert prints(model, template_date="2020-01-02")[1] != prints(model, template_date="2020-01-03")[1]


def test_a_date_that_the_template_computes_is_refused(model: Path) -> None:
    save_tokenizer(model, template="{% set form = '%d' %}{{ strftime_now(form) }}{{ messages[0].content }}")
    with pytest.raises(UserError, match="in a format that it computes"):
        load_tokenizer(ModelConfig(name=str(model), template_date="2020-01-02"))


def test_a_date_that_is_none(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model.template_date"):
        load_config(set_all(tiny_config, model={"template_date": "tomorrow"}))


# --- what is never run, and what is missing ---


def test_code_of_a_model_folder_is_never_run(tiny_config: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": classes}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    save_tokenizer(folder)
    config = load_config(set_all(tiny_config, model={"name": str(folder)}, task={"kind": "text"})).config
    with pytest.raises(UserError, match="comes with its own Python code, which fedsb never runs"):
        open_in_process(config, config.method, "run")
    assert not (tmp_path / "ran").exists()


def test_a_sentencepiece_model_alone_is_read(tmp_path: Path) -> None:
    """DeBERTa-v3 and Llama 2 ship no tokenizer.json."""
    folder = sentencepiece_folder(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    ids = tokenizer("the red5 cat")["input_ids"]
    assert len(ids) >= 4 and tokenizer.decode(ids, skip_special_tokens=True) == "the red5 cat"


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sentencepiece_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("transformers.utils.import_utils._sentencepiece_available", False, raising=False)
    try:
        load_tokenizer(ModelConfig(name=str(folder)))
    except UserError as error:
        assert "pip install 'fedsb[sentencepiece]'" in str(error) and "tiktoken" not in str(error)
    else:
        pytest.fail("the package is still found")


def sentencepiece_folder(tmp_path: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import DebertaV2Config

    folder = tmp_path / "pieces"
    folder.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the red{i} cat sat on the blue mat number {i}" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=120, minloglevel=2
    )
    DebertaV2Config(vocab_size=130, hidden_size=32).save_pretrained(folder)
    return folder


def test_a_task_that_transformers_has_no_class_for_is_named(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    folder = build(tmp_path / "squeeze", "squeezebert", "AutoModelForSequenceClassification")
    with pytest.raises(UserError, match="transformers has no class for this task for the model"):
        load_base(ModelConfig(name=str(folder)), auto_class=LM, num_labels=0, pad_token=0)
