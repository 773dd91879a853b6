"""A coordinator without the base model's weights: its folder of the model contains no weights at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sites import Notes

from conftest import adapter_bytes, save_model, set_all
from fedsb.config.load import load_config
from fedsb.data.clients import build_task
from fedsb.models.tokenizer import load_tokenizer
from fedsb.reporting.report import summary
from fedsb.reporting.run_directory import read_rows
from fedsb.reporting.terminal import print_summary
from fedsb.runs.run import federate, resume
from fedsb.training.trainer import Trainer
from fedsb.utils.errors import RunError, UserError
from laws.test_channels import METHODS, cut_off, federation, merged, remote_of
from support.architectures import WORDS
from support.replies import RawMessage, Spoil, deriving, nan, spoiled, with_parts, with_update
from support.sites import Federation

CORE = {"method": {"name": "fed-sb", "rank": 4}, "basis": {"kind": "core", "samples": 20, "outer": "random"}}
RUNS = {name: METHODS[name] for name in METHODS if name != "core"} | {"core": CORE}
WEIGHTS = {"basis": {"kind": "weights"}}


@pytest.fixture
def no_weights(tiny_bert: Path, tmp_path: Path) -> Path:
    return without_weights(tiny_bert, tmp_path / "no-weights")


def without_weights(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def settings(tiny_config: dict[str, Any], model: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The run of a coordinator whose folder of the base model is `model`."""
    config = remote_of(tiny_config, changes or {})
    config = merged(config, {"model": {"name": str(model), "dtype": "float32"}, "server": {"load_base_model": False}})
    return set_all(config, name="no-weights", data={})


def sites_with(model: Path, folder: Path) -> Federation:
    """Sites that have the base model."""
    return Federation(folder, federation(folder / "unused").rows, {"model": str(model)})


def run(tiny_config: dict[str, Any], changes: dict[str, Any], no_weights: Path, tiny_bert: Path, folder: Path) -> Path:
    sites = sites_with(tiny_bert, folder / "sites")
    config = load_config(settings(tiny_config, no_weights, changes))
    return federate(config, open_federation=sites.open_federation).folder


@pytest.mark.parametrize("name", RUNS)
def test_the_adapter_is_that_of_a_coordinator_with_the_weights(
    name: str, tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path
) -> None:
    with_weights = load_config(remote_of(tiny_config, RUNS[name]))
    expected = federate(with_weights, open_federation=federation(tmp_path / "with").open_federation).folder
    found = run(tiny_config, RUNS[name], no_weights, tiny_bert, tmp_path)
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert files(found, no_weights) == files(expected, tiny_bert)
    facts = [json.loads((folder / "manifest.json").read_text()) for folder in (found, expected)]
    for key in ("fingerprint", "parameters", "pad_token", "adapted_layers", "trained_values"):
        assert facts[0]["model"][key] == facts[1]["model"][key]
    assert facts[0]["basis_hash"] == facts[1]["basis_hash"]


def files(run: Path, model: Path) -> dict[str, str]:
    """The other files of an adapter folder, without the card's table, which contains the score."""
    paths = [path for path in (run / "adapter").iterdir() if path.suffix != ".safetensors"]
    texts = {path.name: path.read_text().replace(str(model), "MODEL").replace(model.name, "MODEL") for path in paths}
    return {name: "".join(x for x in text.splitlines() if not x.startswith("| ")) for name, text in texts.items()}


def test_a_model_that_generates_has_the_end_tokens_of_its_own_config(
    tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    rows = {
        name: [{"prompt": row["text"], "answer": row["label"]} for row in own]
        for name, own in federation(tmp_path / "rows").rows.items()
    }
    changes = {"task": {"kind": "instruction"}, "name": "llama"}
    config = settings(tiny_config, without_weights(model, tmp_path / "no-weights"), WEIGHTS | changes)
    config = merged(config, {"model": {"max_seq_length": 48}, "clients": {"partition": "iid"}})
    sites = Federation(tmp_path / "sites", rows, {"model": str(model)})
    folder = federate(load_config(config), open_federation=sites.open_federation).folder
    card = (folder / "adapter" / "README.md").read_text()
    assert "Generation ends at the tokens 2, 5." in card
    assert "| Check | not checked: this coordinator has no base model." in card
    for name in sites.rows:
        (own,) = (sites.folder / name).glob("runs/*/adapter/adapter_model.safetensors")
        assert own.read_bytes() == (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_it_says_that_the_adapter_is_not_checked(
    tiny_config: dict[str, Any],
    tiny_bert: Path,
    no_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sites, display = sites_with(tiny_bert, tmp_path / "sites"), Notes()
    config = load_config(settings(tiny_config, no_weights))
    folder = federate(config, display, open_federation=sites.open_federation).folder
    result = json.loads((folder / "result.json").read_text())
    why = "this coordinator has no base model. Score it with `fedsb eval"
    assert result["adapter_unchecked"].startswith(why)
    assert result["score"] is None
    assert all(client["score"] is not None for client in result["clients"])  # the sites' own
    assert [note for note in display.notes if note.startswith(f"The adapter was not checked: {why} {folder}")]
    print_summary(folder, summary(folder))
    assert f"not checked: {why} {folder} --data FILE`" in capsys.readouterr().out


@pytest.mark.parametrize("test_rows", [True, False])
def test_a_coordinator_with_the_weights_checks_the_adapter_on_its_test_rows(
    test_rows: bool, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    config = set_all(remote_of(tiny_config, {}), **({} if test_rows else {"data": {}}))
    folder = federate(load_config(config), open_federation=federation(tmp_path).open_federation).folder
    why = json.loads((folder / "result.json").read_text())["adapter_unchecked"]
    assert why is None if test_rows else why.startswith("this coordinator has no rows to compare it on.")


def test_an_adapter_is_scored_later_on_a_machine_with_the_weights(
    tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tables: tuple[Path, Path], tmp_path: Path, cli: Any
) -> None:
    folder = run(tiny_config, {}, no_weights, tiny_bert, tmp_path)
    assert "no file named model.safetensors" in cli("eval", folder, "--data", tables[1]).err
    shutil.copy(tiny_bert / "model.safetensors", no_weights)
    said = cli("eval", folder, "--data", tables[1], "--json")
    assert (said.code, json.loads(said.out)["rows"]) == (0, 40)


# --- the start ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"test": "test.jsonl"}}, "data.test: the coordinator cannot score test rows"),
        ({"model": {"dtype": "auto"}}, "model.dtype = 'auto' follows the coordinator's device"),
        ({"basis": {"kind": "core"}}, "basis.outer = 'weights': the coordinator cannot derive"),
        ({"basis": {"kind": "update", "data": "public.jsonl"}}, "basis.kind = 'update': the coordinator cannot"),
    ],
)
def test_settings_that_need_the_weights_are_refused_before_a_process_starts(
    changes: dict[str, Any], reason: str, tiny_config: dict[str, Any], no_weights: Path, tmp_path: Path
) -> None:
    from fedsb.deployment.coordinate import prepare
    from fedsb.runs.estimate import estimate

    config = load_config(merged(settings(tiny_config, no_weights), changes))
    for refuse in (lambda: prepare(tmp_path, config), lambda: estimate(config)):
        with pytest.raises(UserError, match=f"^server.load_base_model = false: {reason}"):
            refuse()


def test_the_setting_has_no_effect_in_one_process(tiny_config: dict[str, Any]) -> None:
    """A rehearsal of the same file in one process."""
    config = set_all(tiny_config, server={"load_base_model": False}, rounds=1)
    assert federate(load_config(config)).score is not None


def test_sites_with_different_base_models_are_named(
    tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path
) -> None:
    sites = sites_with(tiny_bert, tmp_path / "sites")
    change_base(sites, "site 1", tiny_bert, tmp_path)
    with pytest.raises(RunError, match=r"different base models.* [0-9a-f]{32} at site 0, site 2; .* at site 1\. Set"):
        federate(load_config(settings(tiny_config, no_weights)), open_federation=sites.open_federation)


def change_base(sites: Federation, name: str, model: Path, folder: Path) -> None:
    """Restarts a site with other weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    other = save_model(folder / "other", BertModel(BertConfig.from_pretrained(model)))
    handler = sites.restarted(name)
    handler.settings = handler.settings.model_copy(update={"model": str(other)})
    sites.channel.handles[name] = handler


def test_a_head_that_only_the_checkpoint_shows_is_refused(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint has no pooler, so it is trained too."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = save_model(
        tmp_path / "bert", BertModel(BertConfig(vocab_size=len(WORDS) + 3, **sizes), add_pooling_layer=False)
    )
    sites = sites_with(model, tmp_path / "sites")
    config = settings(tiny_config, without_weights(model, tmp_path / "no-weights"))
    with pytest.raises(UserError, match=r"trains the modules classifier, bert\.pooler\.dense in full"):
        federate(load_config(config), open_federation=sites.open_federation)


def test_a_classifier_needs_its_own_config(tiny_config: dict[str, Any], tiny_bert: Path) -> None:
    """It is a part of the adapter's folder, and the shapes that ship with fedsb lack some of its numbers."""
    config = load_config(set_all(tiny_config, model={"name": "FacebookAI/roberta-base"})).config
    tokenizer = load_tokenizer(load_config(tiny_config).config.model)
    tokenizer.pad_token_id = 1
    task = build_task(config, tokenizer)
    task.take_classes({"label_names": ["a", "b"], "class_names": None})
    with pytest.raises(UserError, match=r"not on this machine.* hf download FacebookAI/roberta-base config\.json"):
        Trainer(config, config.method, tokenizer, task, shapes_only=True)


# --- the basis of one site ---


def another_basis(message: RawMessage) -> RawMessage:
    """An orthonormal basis that is not the one of W0."""
    return with_update(lambda t: {key: x.flip(0) for key, x in t.items()})(message)


@pytest.mark.parametrize(
    "spoil",
    [
        with_update(nan),
        with_update(lambda t: {key: 2 * x for key, x in t.items()}),
        with_update(lambda t: {key: x[:1] for key, x in t.items()}),
        with_update(lambda t: {f"{key}x": x for key, x in t.items()}),
        another_basis,
        with_parts(b"x" * 100),
        with_parts(),
    ],
)
def test_a_site_that_sends_a_bad_basis_is_passed_over(
    spoil: Spoil, tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path
) -> None:
    honest = run(tiny_config, WEIGHTS, no_weights, tiny_bert, tmp_path / "honest")
    sites = sites_with(tiny_bert, tmp_path / "sites")
    spoiled(sites, "site 0", "get_shared", spoil)
    config = load_config(set_all(settings(tiny_config, no_weights, WEIGHTS), name="spoiled"))
    folder = federate(config, open_federation=sites.open_federation).folder
    assert adapter_bytes(folder) == adapter_bytes(honest)
    sent = [row for row in read_rows(folder / "traffic.jsonl") if row["kind"] == "basis"]
    assert [(row["client"], row["direction"], row["round"]) for row in sent] == [("site 1", "up", 0)]


def test_the_run_ends_if_no_site_sends_its_basis(
    tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path
) -> None:
    sites = Federation(
        tmp_path / "sites", federation(tmp_path).rows, {"model": str(tiny_bert), "allow": {"tensors": ["*.R"]}}
    )
    with pytest.raises(RunError, match=r"No site sent the basis(.|\n)*site 2: .*refuse to send(.|\n)*list \*\.A and"):
        federate(load_config(settings(tiny_config, no_weights, WEIGHTS)), open_federation=sites.open_federation)


@pytest.mark.parametrize("change", [1e-7, 1e-4])
def test_a_single_site_with_another_basis_is_compared_with_the_others(
    change: float, tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path
) -> None:
    sites = sites_with(tiny_bert, tmp_path / "sites")
    deriving(sites, "site 0", change)
    config = load_config(settings(tiny_config, no_weights, WEIGHTS))
    folder = federate(config, open_federation=sites.open_federation).folder
    assert all(not row["dropped"] for row in read_rows(folder / "rounds.jsonl"))
    sent = [row for row in read_rows(folder / "traffic.jsonl") if row["kind"] == "basis" and row["direction"] == "up"]
    assert [row["client"] for row in sent] == ["site 1"]


def rounding(model: Path, folder: Path, change: float) -> Federation:
    """Returns sites of which two differ from the third, and from each other, by this relative change of their basis."""
    sites = sites_with(model, folder)
    deriving(sites, "site 0", change)
    deriving(sites, "site 1", 2 * change)
    return sites


def test_sites_that_differ_by_rounding_agree(
    tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path
) -> None:
    sites = rounding(tiny_bert, tmp_path / "sites", 1e-7)
    config = load_config(settings(tiny_config, no_weights, WEIGHTS))
    assert federate(config, open_federation=sites.open_federation).folder.is_dir()


def test_a_basis_without_a_majority_ends_the_run(
    tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path
) -> None:
    sites = rounding(tiny_bert, tmp_path / "sites", 1e-4)
    with pytest.raises(RunError, match=r"derived a different basis from that of site \d, and without the base model"):
        federate(load_config(settings(tiny_config, no_weights, WEIGHTS)), open_federation=sites.open_federation)


# --- resume ---


@pytest.mark.parametrize("name", ["fed-sb", "weights", "flora", "core", "secure"])
def test_a_run_is_resumed(
    name: str,
    tiny_config: dict[str, Any],
    tiny_bert: Path,
    no_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(tiny_config, RUNS[name], no_weights, tiny_bert, tmp_path / "whole")
    sites = sites_with(tiny_bert, tmp_path / "sites")
    cut = cut_run(sites, set_all(settings(tiny_config, no_weights, RUNS[name]), name="cut"), monkeypatch)
    sites.kill_all()
    folder = resume(cut, open_federation=sites.taken_up(cut)).folder
    assert adapter_bytes(folder) == adapter_bytes(whole)


def cut_run(sites: Federation, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose coordinator was killed after the first round."""
    with monkeypatch.context() as patched:
        cut_off(patched, after=1)
        with pytest.raises(KeyboardInterrupt):
            federate(load_config(config), open_federation=sites.open_federation)
    return Path(config["out"]) / config["name"]


def test_a_site_that_resumes_with_other_weights_is_dropped(
    tiny_config: dict[str, Any], tiny_bert: Path, no_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = sites_with(tiny_bert, tmp_path / "sites")
    cut = cut_run(sites, settings(tiny_config, no_weights), monkeypatch)
    fingerprint = json.loads((cut / "manifest.json").read_text())["model"]["fingerprint"]
    sites.kill_all()
    change_base(sites, "site 1", tiny_bert, tmp_path)
    for path in (sites.folder / "site 1" / "answers").iterdir():
        path.unlink()
    folder = resume(cut, open_federation=sites.taken_up(cut)).folder
    (drop,) = read_rows(folder / "rounds.jsonl")[-1]["dropped"]
    assert drop["client"] == "site 1"
    assert "began here with different weights of the base model" in drop["reason"]
    assert json.loads((folder / "manifest.json").read_text())["model"]["fingerprint"] == fingerprint
