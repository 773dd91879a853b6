"""What classes are called, and on which side a text is padded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import labelled_rows, set_all, write_rows
from fedsb.config.load import load_config
from fedsb.data.sources import load_table
from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.runs.run import federate
from fedsb.utils.errors import RunError, UserError
from laws.test_channels import federation, remote_of
from support.sites import Federation


def numbered(folder: Path) -> dict[str, str]:
    numbers = {"blue": 0, "green": 1, "red": 2}
    made = {}
    for name, seed in (("train", 0), ("test", 1)):
        rows = [{**row, "label": numbers[row["label"]]} for row in labelled_rows(60, seed)]
        made[name] = str(write_rows(folder / f"{name}.jsonl", rows))
    return made


def test_classes_are_called_by_their_names(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """In the card, the report, the adapter's README and a merged model; rows keep their labels."""
    from transformers import AutoConfig

    from fedsb.runs.evaluate import evaluate_tables, export_to

    names = {"0": "Blau", "1": "Grün", "2": "Rot"}
    task = {"kind": "classification", "names": names}
    folder = federate(load_config(set_all(tiny_config, data=numbered(tmp_path), task=task, rounds=1))).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["task"]["label_names"] == ["0", "1", "2"]
    assert manifest["task"]["class_names"] == ["Blau", "Grün", "Rot"]
    assert manifest["data_card"]["headline"]["classes"].startswith("3: Blau ")
    assert "- 1: Grün" in (folder / "adapter" / "README.md").read_text()
    assert (folder / "report.html").read_text().count("<span>Rot</span>") == 2  # who holds what, and the predictions
    export_to(folder, str(tmp_path / "merged"), merged=True)
    assert AutoConfig.from_pretrained(tmp_path / "merged").id2label == {0: "Blau", 1: "Grün", 2: "Rot"}
    assert evaluate_tables(folder)["tables"][0]["rows"] == 60


@pytest.mark.parametrize(
    ("names", "said"),
    [({"3": "x"}, "a name for '3', which no row has as label"), ({"0": "a", "1": "a"}, "gives two classes one name")],
)
def test_names_that_cannot_be(tiny_config: dict[str, Any], tmp_path: Path, names: dict[str, str], said: str) -> None:
    task = {"kind": "classification", "names": names}
    with pytest.raises(UserError, match=said):
        federate(load_config(set_all(tiny_config, data=numbered(tmp_path), task=task)))


def test_a_hub_table_brings_its_names(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classes of a ClassLabel; the labels stay numbers, so that their order is kept and -1 can be dropped."""
    import datasets

    names = ["not_equivalent", "equivalent"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": [f"red{i % 12} blue{i % 5}" for i in range(40)], "label": [[0, 1, 1, -1][i % 4] for i in range(40)]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows, features=features))
    monkeypatch.chdir(tmp_path)
    table = load_table("hub:me/data")
    assert table.class_names == {"label": ("not_equivalent", "equivalent")} and table.rows[3]["label"] == -1
    data = {"train": "hub:me/data", "exclude": {"label": -1}}
    clients = {"partition": "iid", "count": 2, "holdout_fraction": 0.2}
    folder = federate(load_config(set_all(tiny_config, data=data, clients=clients, rounds=1))).folder
    task = json.loads((folder / "manifest.json").read_text())["task"]
    assert (task["label_names"], task["class_names"]) == (["0", "1"], names)


def test_sites_that_write_a_class_in_several_ways(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """By case: a warning. By spaces: an error that names the sites. Never merged."""
    own = federation(tmp_path).rows
    for row in own["site 1"]:
        row["label"] = "Red" if row["label"] == "red" else row["label"]
    config = load_config(remote_of(tiny_config, {"rounds": 1}))
    folder = federate(config, open_federation=Federation(tmp_path / "case", own).open_federation).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["task"]["label_names"] == ["Red", "blue", "green", "red"]
    assert any("'Red' and 'red' differ only by case" in line for line in manifest["data_card"]["warnings"])
    for row in own["site 2"]:
        row["label"] += " " if row["label"] == "blue" else ""
    with pytest.raises((UserError, RunError), match=r"'blue' and 'blue ' differ only by spaces.*They have: site 0: "):
        federate(
            load_config(remote_of(tiny_config, {"out": str(tmp_path / "again")})),
            open_federation=Federation(tmp_path / "spaces", own).open_federation,
        )


def test_a_real_federation_shows_what_its_sites_tell(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """Rows, classes, and what is cut; of a private run only rows. Its own test table is counted whole."""
    sites = federation(tmp_path)
    config = remote_of(tiny_config, {"rounds": 1})
    folder = federate(load_config(config), open_federation=sites.open_federation).folder
    card = json.loads((folder / "manifest.json").read_text())["data_card"]
    assert card["headline"]["rows"] == "72 of 3 sites"
    assert sum(card["train"]["classes"].values()) == 72 and card["train"]["cut"] == 0
    assert card["test"]["counted"]["empty"] == 0 and card["test"]["rows"] == 40
    assert card["test_in_train"] is None and card["train"]["counted"] is None
    private = {"out": str(tmp_path / "private"), "privacy": {"unit": "example", "epsilon": 8.0}}
    folder = federate(
        load_config(remote_of(config, private)), open_federation=Federation(tmp_path / "p", sites.rows).open_federation
    ).folder
    card = json.loads((folder / "manifest.json").read_text())["data_card"]
    assert card["train"]["classes"] is card["train"]["cut"] is card["train"]["unused"] is None
    assert card["headline"]["classes"].startswith("3: blue, green, red (a private run shows no counts)")


def test_sites_call_the_classes_as_the_coordinator_does(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names may come from the coordinator's own test table, which no site has; a killed site keeps them."""
    from fedsb.server import opened

    numbers = {"blue": 0, "green": 1, "red": 2}
    rows = [row | {"label": numbers[row["label"]]} for row in labelled_rows(60, 0)]
    sites = Federation(tmp_path / "sites", {"a": rows[:30], "b": rows[30:]})
    test = str(write_rows(tmp_path / "test.jsonl", rows[:20]))
    real = opened.load_test

    def named(*args: Any) -> Any:
        return replace(real(*args), class_names={"label": ("Blau", "Grün", "Rot")})

    monkeypatch.setattr(opened, "load_test", named)
    config = remote_of(tiny_config, {"rounds": 1, "data": {"test": test}})
    federate(load_config(config), open_federation=sites.open_federation)
    for name in ("a", "b"):
        (adapter,) = (tmp_path / "sites" / name / "runs").glob("*/adapter")
        assert json.loads((adapter / "config.json").read_text())["id2label"] == {"0": "Blau", "1": "Grün", "2": "Rot"}


def test_a_model_that_reads_the_last_token_is_padded_on_the_left() -> None:
    """XLNet: the class token is the last one, so a text alone and in a batch must have the same logits."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLNetConfig, XLNetForSequenceClassification

    words = ["<pad>", "<cls>", "<sep>", "<unk>", "one", "two", "three"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A:0 <sep>:0 <cls>:2", special_tokens=[("<sep>", 2), ("<cls>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="<cls>",
        sep_token="<sep>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer._pad_token_type_id = 3  # as XLNet's own tokenizer has it
    task = open_task("classification", tokenizer=tokenizer, options=TaskOptions(), max_tokens=32)
    task.label_names = ["a", "b"]
    rows = [{"text": "one two", "label": "a"}, {"text": "one two three " * 6, "label": "b"}]
    examples, _ = task.encode(rows)
    torch.manual_seed(0)
    model = XLNetForSequenceClassification(
        XLNetConfig(vocab_size=7, d_model=16, n_layer=2, n_head=2, d_inner=16, num_labels=2, pad_token_id=0)
    ).eval()

    def logits(examples: list[Any], **options: int) -> Any:
        batch = task.collate(examples, **options)
        batch.pop("labels")
        return model(**batch).logits[0]

    batch = task.collate(examples)
    assert batch["input_ids"][:, -1].tolist() == [1, 1]
    assert batch["token_type_ids"][0].tolist()[:3] == [3, 3, 3] and batch["attention_mask"][0, 0] == 0
    torch.testing.assert_close(logits(examples), logits(examples[:1], multiple_of=1), atol=1e-5, rtol=1e-5)
    decoder = open_task("classification", tokenizer=tokenizer, options=TaskOptions(), max_tokens=32)
    tokenizer.cls_token = None  # a decoder whose tokenizer pads on the left, to generate
    assert decoder.collate(examples)["input_ids"][0, 0] != 0
