"""The recipes: each loads, opens with its command, states what `fedsb check` finds, and carries its traps."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import labelled_rows, write_rows
from fedsb.cli.listing import recipes
from fedsb.comparison.contenders import methods_to_price
from fedsb.config.load import ResolvedConfig, load_config
from fedsb.runs.estimate import estimate
from fedsb.runs.find import recipe_path
from fedsb.utils.formatting import bytes_text

NAMES = [row["recipe"] for row in recipes()]
PUBLISHED = {
    "arithmetic-mistral-7b",
    "arithmetic-gemma-2-9b",
    "commonsense-llama-3.2-3b",
    "snli-private-bert",
    "glue-roberta-base",
    "code-llama-2-7b",
    "flowertune-nlp",
    "flowertune-finance",
    "flowertune-medical",
    "flowertune-code",
    "fedllm-aya",
    "fedllm-wildchat",
    "dolly-by-category",
}
INSTITUTES = (820, 814, 798, 792, 778, 555, 380, 308, 203)
ROWS: dict[str, list[dict[str, Any]]] = {  # as many as the tables of these recipes have
    "medquad-private": [
        {"client": f"institute {i}", "query": "what", "positive": "this"}
        for i, count in enumerate(INSTITUTES)
        for _ in range(count)
    ],
    "snli-private": [{"premise": "it is", "hypothesis": "it was", "label": i % 3} for i in range(9999)],
}


def load(name: str, *overrides: str) -> ResolvedConfig:
    return load_config(recipe_path(name), overrides)


def opening(name: str) -> str:
    return " ".join(
        line.removeprefix("#").strip() for line in recipe_path(name).read_text().splitlines() if line.startswith("#")
    )


def test_every_published_setting_has_its_recipe() -> None:
    assert set(NAMES) >= PUBLISHED


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_opens_with_its_command_and_what_to_expect(name: str) -> None:
    text = recipe_path(name).read_text()
    assert text.startswith(f"# fedsb run {name}")
    assert load(name).config.name == name
    assert re.search(r"\d+(\.\d+)? (GB|MB)", opening(name)), "what it takes in memory"
    assert re.search(r"minutes|hour", opening(name)), "how long it takes"
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_setting_says_that_it_was_not_run_and_where_it_differs(name: str) -> None:
    said = opening(name)
    assert re.search(r"[Nn]one (of it was )?run by us|None of it was run by us", said)
    assert "stimates:" in said and re.search(r"Where we differ|are ours", said)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_command_in_an_opening_is_one_that_loads(name: str) -> None:
    """Settings in the comments are real ones: no command fails on a misspelt key."""
    for line in recipe_path(name).read_text().splitlines():
        found = re.match(rf"#\s+fedsb (?:run|check) {re.escape(name)}((?: --set \S+)+)", line)
        if found:
            load(name, *found[1].split(" --set ")[1:])
    for key in re.findall(r"--set ([a-z_.]+)=", opening(name)):
        section, _, field = key.rpartition(".")
        assert not section or field in type(getattr(load(name).config, section)).model_fields or section == "method"


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("arithmetic-mistral-7b", 29),
        ("arithmetic-gemma-2-9b", 32),
        ("commonsense-llama-3.2-3b", 15),
        ("snli-private-bert", 3),
        ("glue-roberta-base", 4),
        ("code-llama-2-7b", 28),
        ("flowertune-nlp", 11),
        ("flowertune-finance", 11),
        ("flowertune-medical", 11),
        ("flowertune-code", 11),
        ("fedllm-aya", 11),
        ("fedllm-wildchat", 7),
        ("dolly-by-category", 5),
    ],
)
def test_the_memory_in_an_opening_is_what_check_says(name: str, gigabytes: int) -> None:
    found = estimate(load(name, "model.device=cpu"))
    assert round(found["memory_bytes"] / 1e9) == gigabytes
    assert f"Estimates: {gigabytes} GB of" in opening(name)


@pytest.mark.parametrize(
    ("name", "label", "direction", "said"),
    [
        ("arithmetic-mistral-7b", "fed-sb (rank 200)", "up", "8.96M"),
        ("arithmetic-mistral-7b", "fed-sb (rank 160)", "up", "5.73M"),
        ("arithmetic-mistral-7b", "fed-sb (rank 120)", "up", "3.23M"),
        ("arithmetic-mistral-7b", "fedit (rank 32)", "up", "83.89M"),
        ("arithmetic-mistral-7b", "flora (rank 32)", "down", "2,097M"),
        ("arithmetic-gemma-2-9b", "flora (rank 32)", "down", "2,701M"),
        ("arithmetic-gemma-2-9b", "fed-sb (rank 200)", "up", "11.76M"),
        ("commonsense-llama-3.2-3b", "fed-sb (rank 160)", "up", "5.02M"),
        ("commonsense-llama-3.2-3b", "flora (rank 32)", "down", "243.1M"),
        ("code-llama-2-7b", "fedit (rank 16)", "up", "40.0M"),
        ("code-llama-2-7b", "flora-na (rank 16)", "up", "40.0M"),
        ("code-llama-2-7b", "fed-sb (rank 128)", "up", "3.7M"),
        ("code-llama-2-7b", "flora (rank 16)", "down", "400M"),
        ("glue-roberta-base", "fed-sb (rank 16)", "up", "6.1K"),
        ("glue-roberta-base", "fedex-lora (rank 4)", "down", "442K"),
    ],
)
def test_the_values_in_an_opening_are_what_check_says(name: str, label: str, direction: str, said: str) -> None:
    loaded = load(name)
    prices = {price["label"]: price for price in estimate(loaded, also=methods_to_price(loaded))["prices"]}
    values = prices[label][f"{direction}_values"]
    number, unit = said.replace(",", "")[:-1], {"M": 1e6, "K": 1e3}[said[-1]]
    assert f"{values / unit:.{len(number.partition('.')[2])}f}" == number
    assert said in opening(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_in_an_opening_are_what_check_prices(name: str, tmp_path: Path) -> None:
    """Of tables that are not here, the number of classes or clients is given; Shakespeare's model is a folder.

    Shared noise sends as many bits as the number of rows requires, so there are rows of that number.
    """
    stories = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
    if name == "shakespeare" and not stories.is_dir():
        pytest.skip("stories260K is not beside the repository, in ../shared/models")
    told = {
        "trec": "data.classes=6",
        "snli": "data.classes=3",
        "shakespeare": f"model.name={stories}",
        "medquad-smollm2": "clients.count=9",
        "fedllm-aya": "clients.count=38",
        "fedllm-wildchat": "clients.count=100",
    }
    overrides = [told[name]] if name in told else []
    if name in ROWS:
        table = write_rows(tmp_path / "rows.jsonl", ROWS[name])
        overrides += [f"data.train={table}", f"data.test={table}"]
    found = estimate(load(name, *overrides))
    (price,) = [price for price in found["prices"] if price["this_run"]]
    parts = (bytes_text(price[f"{part}_bytes"]).replace("\xa0", " ") for part in ("one_off", "up", "down", "total"))
    line = "# Bytes of all clients, all rounds: once {}, up {}, down {}, in all {}.".format(*parts)
    assert line in recipe_path(name).read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "lora", "gibibytes"),
    [
        ("flowertune-nlp", "43.6 GB", 40.6),  # 40.7 GB on the leaderboard
        ("flowertune-medical", "43.6 GB", 40.6),
        ("flowertune-code", "43.6 GB", 40.6),
        ("flowertune-finance", "109 GB", 101.6),
        ("fedllm-aya", "53.7 GB", 50.0),
        ("fedllm-wildchat", "12.6 GB", 11.7),
        ("dolly-by-category", "4.03 GB", 3.75),
    ],
)
def test_the_lora_in_an_opening_costs_what_check_prices(name: str, lora: str, gibibytes: float) -> None:
    """LoRA on q and v in float32, with the settings that the opening tells to append."""
    settings = re.search(r"LoRA instead: append(.*?)(?=Bytes of all clients)", opening(name))
    assert settings is not None
    overrides = [text.strip().strip("'") for text in settings[1].split("--set ")[1:]]
    clients = {"fedllm-aya": 38, "fedllm-wildchat": 100}.get(name)
    overrides += [f"clients.count={clients}"] if clients else []
    (price,) = [price for price in estimate(load(name, *overrides))["prices"] if price["this_run"]]
    assert bytes_text(price["total_bytes"]).replace("\xa0", " ") == lora and lora in opening(name)
    assert price["total_bytes"] / 2**30 == pytest.approx(gibibytes, abs=0.05)


def test_a_core_in_int4_sends_97_megabytes_in_a_flowertune_challenge() -> None:
    """By hand: 7 x 32 layers of 32 x 32 are 229,376 values. In int4, with a scale of 2 bytes per 64 values, they are
    121,856 bytes; 2 of 20 clients, 200 rounds, both directions, but nothing in the first broadcast."""
    message = 229_376 // 2 + 2 * 229_376 // 64
    assert (message * 2 * 200 * 2, message * 2 * (200 + 199)) == (97_484_800, 97_241_088)
    (price,) = [price for price in estimate(load("flowertune-nlp"))["prices"] if price["this_run"]]
    assert price["total_bytes"] == 97_241_088


def test_medquads_table_has_the_columns_of_its_recipe_and_no_topic_twice(tmp_path: Path) -> None:
    """On documents like those of the repository: one without answers, one topic at two institutes, one short answer."""
    for number, (source, topic, answer) in enumerate(
        [(source, f"Topic {n}", f"{source} {n} is {'long ' * 10}.") for source in ("CDC", "GARD") for n in range(30)]
        + [("ADAM", "Topic 1", ""), ("CDC", "Topic 40", "short")]
    ):
        pairs = "".join(
            f"<QAPair><Question>{asked} {topic} ?</Question><Answer>\n {answer}\n\n  {asked}</Answer></QAPair>"
            for asked in ("What is", "What is", "Who has")
        )
        path = tmp_path / "MedQuAD" / f"{source}_QA" / f"{number}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'<Document source="{source}"><Focus>{topic}</Focus>{pairs}</Document>')
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "medquad" / "table.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "MedQuAD"), "--out", str(tmp_path)], check=True)
    tables = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    ]
    config = load("medquad-smollm2").config
    assert set(tables[0][0]) == {config.clients.column, config.task.prompt, config.task.answer, "focus"}
    topics = [{row["focus"] for row in table} for table in tables]
    assert topics[0] and topics[1] and not topics[0] & topics[1]
    assert len(tables[0]) + len(tables[1]) == 2 * 30 * 2, (
        "a repeated pair is dropped, and so are empty and short answers"
    )
    assert {row["client"] for row in tables[0]} == {"CDC", "GARD"}
    assert all(row["positive"] == f"{row['positive'].splitlines()[0]}\n{row['query'][:7].strip()}" for row in tables[0])


def test_openassistants_table_has_the_columns_of_its_recipe(tmp_path: Path) -> None:
    """Two answers to one prompt, an answer to the first, one in another language, one whose prompt was removed."""
    fields = ("message_id", "parent_id", "user_id", "text", "role", "lang")
    messages = [
        ("a", None, "ann", "Hi?", "prompter", "en"),
        ("b", "a", "bob", "Hello.", "assistant", "en"),
        ("c", "a", "cat", "Hey.", "assistant", "en"),
        ("d", "b", "ann", "Why?", "prompter", "en"),
        ("e", "d", "bob", "Why not.", "assistant", "en"),
        ("f", None, "eva", "Was?", "prompter", "de"),
        ("g", "f", "eva", "Ja.", "assistant", "de"),
        ("h", "removed", "bob", "Alone.", "assistant", "en"),
    ]
    with gzip.open(tmp_path / "messages.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in messages)
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "oasst" / "table.py"
    made = tmp_path / "oasst.jsonl"
    subprocess.run([sys.executable, str(script), str(tmp_path / "messages.jsonl.gz"), "--out", str(made)], check=True)
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    config = load("pfl-oasst-private").config
    assert set(rows[0]) == {config.clients.column, config.task.prompt, config.task.answer}
    assert [tuple(row.values()) for row in rows] == [
        ("bob", "User: Hi?", "Hello."),
        ("cat", "User: Hi?", "Hey."),
        ("bob", "User: Hi?\n\nAssistant: Hello.\n\nUser: Why?", "Why not."),
    ]


def test_the_private_recipe_promises_what_it_says(tiny_bert: Path, tmp_path: Path) -> None:
    """On small rows with SNLI's columns: three classes, -1 left out, epsilon 3 by the plan; the central run too."""
    rows: list[dict[str, Any]] = [
        {"premise": row["text"], "hypothesis": row["text"], "label": i % 4 - 1}
        for i, row in enumerate(labelled_rows(240, 0))
    ]
    data = write_rows(tmp_path / "snli.jsonl", rows)
    here = [f"model.name={tiny_bert}", f"data.train={data}", f"data.test={data}", "method.rank=8", "train.batch_size=4"]
    for more in ([], ["method.name=central", "train.local_epochs=3"]):
        found = estimate(load("snli-private-bert", *here, *more))
        assert found["unknown"] == []
        assert sum(found["clients"].values()) == 180
        assert found["privacy"] is not None and "3" in found["privacy"]["says"]
        assert max(plan["epsilon"] for plan in found["privacy"]["plans"].values()) <= 3.0
    assert load("snli-private-bert").config.basis.kind == "weights", "B and A must not tell of the rows"
