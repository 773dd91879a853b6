"""The data card: what the tables of a run contain, and what looks wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CLASSES, Said, labelled_rows, set_all, write_rows, write_toml
from fedsb.config.load import load_config
from fedsb.data.clients import open_data
from fedsb.models.tokenizer import load_tokenizer
from fedsb.runs.run import Silent, federate
from fedsb.utils.errors import UserError

Cli = Callable[..., Said]


def opened(config: dict[str, Any]) -> Any:
    settings = load_config(config).config
    return open_data(settings, load_tokenizer(settings.model))


def with_rows(config: dict[str, Any], folder: Path, train: list[Any], test: list[Any], **data: Any) -> dict[str, Any]:
    files = {"train": str(write_rows(folder / "own-train.jsonl", train))}
    if test:
        files["test"] = str(write_rows(folder / "own-test.jsonl", test))
    return set_all(config, data={**files, **data})


def test_what_a_clean_run_shows(tiny_config: dict[str, Any]) -> None:
    card = opened(tiny_config).card
    rows = labelled_rows(90, 0)
    counts = {name: sum(row["label"] == name for row in rows) for name in sorted(CLASSES)}
    assert card.train.classes == counts
    assert card.headline() == {
        "rows": "90 of train.jsonl",
        "classes": "3: " + ", ".join(f"{name} {count}" for name, count in counts.items()),
        "clients": "3, 21 to 30 training examples",
        "test": "40 of test.jsonl, 'red' the most frequent class with 35 %",
        "length": "0 of 130 rows (0 %) longer than 16 tokens",
    }
    assert card.warnings() == card.notes() == []
    assert card.clients == {"site 0": 30, "site 1": 21, "site 2": 21}


def test_what_is_counted(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """Of 120 rows: 20 of 40 test rows in train, 30 repeated, 10 with another class, 25 cut."""
    rows = [
        {**row, "text": f"red{i % 12} blue{i // 12 % 12} green{i % 7} grey{i % 11}"}
        for i, row in enumerate(labelled_rows(120, 0))
    ]
    rows[50:80] = [dict(rows[49]) for _ in range(30)]
    for row in rows[80:90]:
        row |= {"text": rows[49]["text"], "label": "blue" if rows[49]["label"] != "blue" else "red"}
    for row in rows[95:120]:
        row["text"] += " red1" * 20
    test = [*rows[20:40], *labelled_rows(20, 5)]
    card = opened(with_rows(tiny_config, tmp_path, rows, test)).card
    counted = card.train.counted
    assert (counted.empty, counted.duplicates, counted.contradictions) == (0, 30, 10)
    assert (card.train.cut, card.train.unused, card.test_in_train) == (25, 0, 20)
    said = card.warnings()
    assert any(line.startswith("20 of 40 test rows (50 %) have a text that is also in the training") for line in said)
    assert any(line.startswith("25 of 160 rows (15.6 %) are longer than model.max_seq_length = 16") for line in said)
    assert any("30 of 120 training rows (25 %) repeat an earlier row" in line for line in said)
    assert any("(8.33 %) repeat the text of an earlier row with a different class" in line for line in said)


def test_empty_texts(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(120, 0)
    for row in rows[30:42]:
        row["text"] = " "
    config = set_all(tiny_config, model={"name": "minilm", "max_seq_length": 64})
    card = opened(with_rows(config, tmp_path, rows, [])).card
    assert card.train.counted.empty == 12
    place = f"{tmp_path / 'own-train.jsonl'}, line 31"
    wanted = f"12 of 120 training rows (10 %) have an empty text, first in {place}. Remove them, or fill them in."
    assert wanted in card.warnings()


def test_rows_held_out_of_training_are_compared_with_the_others(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """Without a test table, the scored rows are some of the training table's; only their copies count."""
    rows = [{**row, "text": f"red{i % 12} blue{i // 12}"} for i, row in enumerate(labelled_rows(90, 0))]
    assert opened(with_rows(tiny_config, tmp_path, rows, [])).card.test_in_train == 0
    twice = [*rows, *rows]
    card = opened(with_rows(tiny_config, tmp_path, twice, [])).card
    assert card.test is not None and 0 < card.test_in_train <= card.test.rows


def test_a_test_of_one_class_and_classes_that_are_alike(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(60, 0)
    for row in rows[:5]:
        row["label"] = "Red"
    for row in rows[5:9]:
        row["label"] = "None"
    test = [row for row in labelled_rows(60, 1) if row["label"] == "blue"]
    said = opened(with_rows(tiny_config, tmp_path, rows, test)).card.warnings()
    assert f"All {len(test)} test rows have the class 'blue': a score on them says little." in said
    assert "'Red' and 'red' differ only by case. Write them the same way if they are the same." in said
    assert any(line.startswith("The class 'None' (4 rows) looks like a missing value") for line in said)


def test_columns_that_nobody_reads(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "id": i, "weight": 0} for i, row in enumerate(labelled_rows(60, 0))]
    card = opened(with_rows(tiny_config, tmp_path, rows, [])).card
    assert card.train.not_read == ("id", "weight") and card.train.read == ("text", "label")
    assert card.headline()["classes"].endswith("; not read: id, weight")
    assert [line for line in card.warnings() if "does not read the column 'weight'" in line]
    kept = opened(with_rows(tiny_config, tmp_path, rows, [], drop={"id": 3})).card
    assert kept.train.not_read == ("weight",)


def test_a_private_run_counts_nothing_of_its_rows(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(90, 0)
    rows[3] = {**rows[3], "text": ""}
    model = {"name": "minilm", "max_seq_length": 64}
    private = {"unit": "example", "epsilon": 8.0}
    train = {"local_steps": 3, "batch_size": 4, "lr": 0.02}
    config = set_all(with_rows(tiny_config, tmp_path, rows, rows[:40]), privacy=private, train=train, model=model)
    card = opened(config).card
    assert card.train.counted is card.train.classes is card.train.dropped is card.test_in_train is None
    assert card.headline()["classes"] == "3: blue, green, red (a private run shows no counts)"
    assert card.train.cut == 0  # shown today, as data.cut
    assert card.test.classes is not None and card.test.counted.empty == 1  # a table of its own is public
    held = opened(set_all(config, data={"train": config["data"]["train"]})).card
    assert held.test.counted is held.test.classes is held.test_in_train is None


def test_it_is_shown_first_in_check_and_run_and_kept(cli: Cli, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(90, 0)
    for row in rows[:30]:
        row["text"] = "red1 " * 40
    config = with_rows(tiny_config, tmp_path, rows, labelled_rows(40, 1))
    toml = write_toml(tmp_path / "tiny.toml", set_all(config, rounds=1))
    warning = "30 of 130 rows (23.1 %) are longer than model.max_seq_length = 16 and lose their end."
    for verb in ("check", "run"):
        said = cli(verb, toml)
        assert said.code == 0, said.err
        lines = said.out.splitlines()
        assert [line.split()[0] for line in lines[:5]] == ["rows", "classes", "clients", "test", "length"]
        assert any(line.startswith(f"Warning: {warning}") for line in lines[5:12])
    folder = tmp_path / "runs" / "tiny"
    for name in ("manifest.json", "result.json"):
        card = json.loads((folder / name).read_text())["data_card"]
        assert card["train"]["rows"] == 90 and card["train"]["cut"] == 30
        assert any(line.startswith(warning) for line in card["warnings"])
    page = (folder / "report.html").read_text()
    assert "<h2>Data</h2>" in page and warning in page
    assert any(line.startswith(f"  warning         {warning}") for line in said.out.splitlines())
    assert json.loads(cli("check", toml, "--json").out)["data"]["train"]["cut"] == 30


def test_whoever_watches_a_run_is_given_it(tiny_config: dict[str, Any]) -> None:
    class Watch(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    watch = Watch()
    federate(load_config(set_all(tiny_config, rounds=1)), watch)
    assert watch.lines[0] == "rows     90 of train.jsonl"


# --- labels, clients and rows that are drawn ---


@pytest.mark.parametrize(
    ("cell", "shown"), [("", "''"), (" ", "' '"), ("NaN", "'NaN'"), ("nan", "'nan'"), (None, "None")]
)
def test_a_label_that_is_missing(tiny_config: dict[str, Any], tmp_path: Path, cell: str | None, shown: str) -> None:
    rows = labelled_rows(60, 0)
    rows[7]["label"] = rows[20]["label"] = cell
    config = with_rows(tiny_config, tmp_path, rows, [])
    with pytest.raises(UserError) as raised:
        opened(config)
    said = str(raised.value)
    assert said.startswith(f"{tmp_path / 'own-train.jsonl'}, line 8 has the label {shown} in the column 'label'. 2 of")
    value = cell or ""
    assert f"data.exclude = {{ label = {json.dumps(value)} }}" in said
    card = opened(with_rows(tiny_config, tmp_path, rows, [], drop={"label": value})).card
    assert card.train.rows == 58 and card.label_names == ("blue", "green", "red")


def test_labels_that_differ_by_spaces(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(60, 0)
    rows[0]["label"] = "blue "
    with pytest.raises(UserError, match="the labels 'blue' and 'blue ' differ only by spaces"):
        opened(with_rows(tiny_config, tmp_path, rows, []))
    rows = labelled_rows(60, 0)
    for row, name in zip(rows[:2], ("café", "cafe\u0301"), strict=True):
        row["label"] = name
    with pytest.raises(UserError, match="differ only by spaces or invisible characters"):
        opened(with_rows(tiny_config, tmp_path, rows, []))


def test_names_that_are_not_shown_are_counted(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(60, 0)
    for number, row in enumerate(rows[:14]):
        row["label"] = f"class {number // 2}" if number % 2 else f"CLASS {number // 2}"
    said = opened(with_rows(tiny_config, tmp_path, rows, [])).card.warnings()
    assert sum("differ only by case. Write" in line for line in said) == 5
    assert "2 more groups of names differ only by case." in said
    for number, row in enumerate(rows[:14]):
        row["label"] = f"class {number // 2}" + " " * (number % 2)
    with pytest.raises(UserError, match=r"; and 2 more differ only by spaces"):
        opened(with_rows(tiny_config, tmp_path, rows, []))


@pytest.mark.parametrize("name", [None, "", "NaN"])
def test_a_client_without_a_name(tiny_config: dict[str, Any], tmp_path: Path, name: str | None) -> None:
    rows = labelled_rows(60, 0)
    rows[4]["client"] = name
    with pytest.raises(UserError, match=r"own-train.jsonl, line 5: the column 'client' \(clients.column\) contains"):
        opened(with_rows(tiny_config, tmp_path, rows, []))


def test_clients_that_differ_by_spaces_or_case(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(60, 0)
    for row in rows[:8]:
        row["client"] = "Site 0"
    card = opened(with_rows(tiny_config, tmp_path, rows, [])).card
    assert "'Site 0' and 'site 0' differ only by case" in " ".join(card.warnings())
    rows[9]["client"] = "site 0 "
    with pytest.raises(UserError, match="the clients 'site 0 ' and 'site 0' differ only by spaces"):
        opened(with_rows(tiny_config, tmp_path, rows, []))


def test_a_text_that_is_null_names_its_line_and_client(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """The line in the file, not the place among the client's rows."""
    rows = labelled_rows(60, 0)
    rows[13]["text"] = None
    with pytest.raises(UserError) as raised:
        opened(with_rows(tiny_config, tmp_path, rows, []))
    assert str(raised.value) == (
        f"client '{rows[13]['client']}': {tmp_path / 'own-train.jsonl'}, line 14: the column 'text' contains None, "
        "where text is expected. Fill it in, or remove the row."
    )


def test_training_rows_are_drawn_by_the_seed_and_test_rows_once(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """Of a file that is sorted by label, every class is still there."""
    rows = sorted(labelled_rows(300, 0), key=lambda row: str(row["label"]))
    config = with_rows(tiny_config, tmp_path, rows, rows, train_rows=60, test_rows=50)
    found = opened(config)
    assert sum(found.card.train.classes.values()) == 60 and min(found.card.train.classes.values()) > 8
    assert len(found.test) == 50 and min(found.card.test.classes.values()) > 5
    assert found.card.headline()["rows"] == "60 of own-train.jsonl (drawn from 300 by the seed)"
    again, other = opened(config), opened(set_all(config, seed=1))
    assert found.test == again.test == other.test  # runs with other seeds are scored on the same rows
    assert found.clients[0].train == again.clients[0].train != other.clients[0].train
    whole = opened(set_all(config, data={**config["data"], "train_rows": 10_000}))
    assert whole.card.train.rows == 300 and whole.card.train.drawn_from is None


def test_the_public_rows_of_a_basis_are_drawn_too(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    from fedsb.training.resolved import public_rows

    rows = sorted(labelled_rows(300, 0), key=lambda row: str(row["label"]))
    path = str(write_rows(tmp_path / "public.jsonl", rows))
    config = set_all(tiny_config, basis={"kind": "update", "data": path, "samples": 60})
    task = opened(config).task
    examples = public_rows(load_config(config).config, task)
    counts = [sum(example["labels"] == label for example in examples) for label in range(3)]
    assert sum(counts) == 60 and min(counts) > 8


def test_how_a_file_is_read_is_set_in_data(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = labelled_rows(60, 0)
    lines = [f"{row['text']} café;{row['label']};{row['client']}\n" for row in rows]
    (tmp_path / "train.tsv").write_bytes("".join(lines).encode("cp1252"))
    form = {"delimiter": ";", "encoding": "cp1252", "columns": ["text", "label", "client"]}
    config = set_all(tiny_config, data={"train": str(tmp_path / "train.tsv"), **form})
    found = opened(config)
    assert found.card.train.rows == 60 and found.card.label_names == ("blue", "green", "red")
    choices = {choice.key: choice.reason for choice in load_config(config).choices()}
    assert choices["data.delimiter"] == "dict"
    unused_settings = load_config(set_all(tiny_config, data={**tiny_config["data"], **form})).choices()
    reasons = {choice.key: choice.reason for choice in unused_settings}
    assert "has no effect: no .csv or .tsv file is read here" in reasons["data.delimiter"]


def test_tables_of_different_columns_are_compared_by_their_prompts(stories: Any) -> None:
    """MetaMathQA to train on, GSM8K as the test; Alpaca rows with and without an input."""
    from fedsb.data.card import make_card
    from fedsb.data.rows import make_table
    from fedsb.data.tasks import open_task
    from fedsb.data.tasks.base import TaskOptions

    def card(kind: str, train: list[dict[str, Any]], test: list[dict[str, Any]], **options: Any) -> Any:
        task = open_task(kind, tokenizer=stories, options=TaskOptions(**options), max_tokens=64)
        tables = make_table(train, "train.jsonl"), make_table(test, "test.jsonl")
        return make_card(task, *tables, clients={"a": 1}, lost={"train": (0, 0), "test": (0, 0)})

    train = [{"query": f"question {i}", "response": "The answer is: 1", "type": "GSM_AnsAug"} for i in range(9)]
    test = [{"question": f"question {i}", "answer": "#### 1"} for i in range(7, 12)]
    found = card("arithmetic", train, test)
    assert found.test_in_train == 2 and found.train.not_read == found.test.not_read == ()
    train = [{"prompt": "add", "input": f"{i}", "answer": "1", "id": i} for i in range(5)]
    test = [{"prompt": "add", "input": "3", "answer": "1"}, {"prompt": "add", "input": "9", "answer": "1"}]
    found = card("instruction", train, test)
    assert found.test_in_train == 1 and found.train.not_read == ("id",)
    assert (
        found.headline()["classes" if found.label_names else "columns"] == "read: prompt, input, answer; not read: id"
    )
