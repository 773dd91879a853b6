"""What comes out of a run, used as others use it: pipelines, snippets in a fresh process, predictions."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsb
from conftest import Said, labelled_rows, set_all, tiny_settings, write_rows, write_toml
from fedsb.adapters.card import merged_lines
from fedsb.config.load import load_config
from fedsb.runs.run import federate
from fedsb.utils.errors import UserError

TEXTS = ["red1 red2 blue3", "grey0", "blue1 blue2 blue3 green4 blue5 red9 blue2", "green3 red1"]
END = "[END]"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CLASSIFIERS = ("classes", "mean", "pair", "number")
WRITERS = ("text", "instruction", "chat")


def chat_model(source: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """Returns a copy of a model whose chat template ends a turn with a token that is not its tokenizer's end token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """Returns the settings of a run of one kind."""
    rows = [row | {"pair": "blue1 red2", "score": float(len(row["text"]))} for row in labelled_rows(60, 0)]
    tables = write_rows(folder / "train.jsonl", rows[:40]), write_rows(folder / "test.jsonl", rows[40:])
    if kind == "two":  # as many classes as a config has that knows of none
        rows = [row for row in rows if row["label"] != "green"]
        tables = write_rows(folder / "train.jsonl", rows[:25]), write_rows(folder / "test.jsonl", rows[25:])
    causal = kind in WRITERS
    source: Path = request.getfixturevalue("tiny_llama" if causal else "tiny_bert")
    model = chat_model(source, folder / "chat-model") if kind == "chat" else source
    if kind in ("instruction", "chat"):
        rows = [row | {"label": f"{row['label']}1 {row['label']}2"} for row in rows]  # words that the tokenizer knows
        talks = [
            {"prompt": row["text"], "answer": row["label"]}
            if kind == "instruction"
            else {
                "messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
            }
            for row in rows
        ]
        tables = write_rows(folder / "train.jsonl", talks[:40]), write_rows(folder / "test.jsonl", talks[40:])
    tasks: dict[str, dict[str, Any]] = {
        "classes": {"kind": "classification"},
        "mean": {"kind": "classification", "pooling": "mean"},
        "two": {"kind": "classification", "pooling": "mean"},
        "pair": {"kind": "classification", "pooling": "mean", "text_pair": "pair"},
        "number": {"kind": "regression", "label": "score", "pooling": "mean"},
        **{name: {"kind": name, "new_tokens": 6} for name in WRITERS},
    }
    return set_all(
        tiny_settings(model, tables, folder / "runs"),
        name=kind,
        model={"name": str(model), "max_seq_length": 64 if causal else 16},
        task=tasks[kind],
        clients={"count": 2},
        train={"local_steps": 20 if kind in ("instruction", "chat") else 8, "batch_size": 8, "lr": 0.05},
        eval={"every": 3},
        basis={"kind": "random", "share_samples": 0},
    )


@pytest.fixture(scope="module")
def run_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of a finished run of a kind; each is made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = federate(load_config(config_of(kind, request, tmp_path_factory.mktemp(kind)))).folder
        return made[kind]

    return of


@pytest.fixture(scope="module")
def merged_of(run_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from fedsb.runs.evaluate import export_to

    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = Path(export_to(run_of(kind), str(tmp_path_factory.mktemp(f"m-{kind}") / "m"), merged=True))
        return made[kind]

    return of


def asked_rows(kind: str) -> list[dict[str, Any]]:
    match kind:
        case "pair":
            return [{"text": text, "pair": "blue1 red2"} for text in TEXTS]
        case "instruction":
            return [{"prompt": "What is the capital of France?"}]
        case "chat":
            return [{"messages": [{"role": "user", "content": "What is the capital of France?"}]}]
        case "text":
            return [{"text": "What is the capital of France?"}]
    return [{"text": text} for text in TEXTS]


CHILD = """
import contextlib, io, json, os, sys
sys.modules["fedsb"] = None
found = []
for folder, code in json.load(sys.stdin):
    os.chdir(folder)
    scope, said = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, scope)
    found.append([said.getvalue(), scope["logits"].tolist() if "logits" in scope else []])
print(json.dumps(found))
"""


def printed(snippets: list[tuple[Path, str]]) -> list[tuple[str, list[list[float]]]]:
    """Runs snippets, each in its folder, in a fresh process without fedsb, with the test's texts.

    Returns what each prints, and the logits of a classifier.
    """
    given = []
    for folder, code in snippets:
        code = re.sub(r"^texts = .*$", f"texts = {TEXTS!r}", code, flags=re.MULTILINE)
        code = re.sub(r"^pairs = .*$", f"pairs = {['blue1 red2'] * len(TEXTS)!r}", code, flags=re.MULTILINE)
        given.append((str(folder), code.replace("max_new_tokens=32", "max_new_tokens=6")))
    ran = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(given), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [(said, logits) for said, logits in json.loads(ran.stdout.splitlines()[-1])]


def same(kind: str, predicted: list[dict[str, Any]], said: str, logits: list[list[float]]) -> None:
    """Asserts that a snippet printed what the run predicts, and that the logits are the run's."""
    if kind in WRITERS:
        assert said == predicted[0]["prediction"] + "\n"
        return
    found, wanted = eval(said), [row["prediction"] for row in predicted]
    assert found == (pytest.approx(wanted, rel=1e-5) if kind == "number" else wanted)
    if kind != "number":
        shares = torch.tensor(logits).softmax(-1)
        those = torch.tensor([list(row["probabilities"].values()) for row in predicted])
        assert float((shares - those).abs().max()) < 1e-5
        assert float((those - those.mean(0)).abs().max()) > 0.01  # else the test shows nothing


# --- snippets ---


@pytest.fixture(scope="module")
def snippets(
    run_of: Callable[[str], Path], merged_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[str, list[list[float]]]]:
    """Returns what every snippet printed: a run's, and those of the cards of folders that were moved."""
    from fedsb.reporting.run_directory import read_result

    given: dict[tuple[str, str], tuple[Path, str]] = {}
    for kind in (*CLASSIFIERS, *WRITERS):
        folder, elsewhere = run_of(kind), tmp_path_factory.mktemp(f"moved-{kind}")
        given["result", kind] = elsewhere, json.loads((folder / "result.json").read_text())["load"]
        for form, source in (("adapter", folder / "adapter"), ("merged", merged_of(kind))):
            moved = Path(shutil.copytree(source, elsewhere / form))
            code = re.findall(r"```python\n(.*?)```", (moved / "README.md").read_text(), re.DOTALL)
            assert ("from peft" in code[-1]) == (form == "adapter")
            given[form, kind] = moved, code[-1]
        run = Path(shutil.copytree(folder, elsewhere / "run"))
        code = (read_result(run) or {})["load"]
        assert str(run / "adapter") in code and str(folder) not in code
        given["moved run", kind] = elsewhere, code
    return dict(zip(given, printed(list(given.values())), strict=True))


@pytest.mark.parametrize("form", ["result", "adapter", "merged", "moved run"])
@pytest.mark.parametrize("kind", [*CLASSIFIERS, *WRITERS])
def test_a_snippet_runs_as_printed(
    run_of: Callable[[str], Path], snippets: dict[tuple[str, str], Any], kind: str, form: str
) -> None:
    """The labels and logits, or the text, are those of `fedsb predict`."""
    same(kind, fedsb.predict(run_of(kind), asked_rows(kind)), *snippets[form, kind])


def test_the_terminal_prints_the_snippet(cli: Callable[..., Said], run_of: Callable[[str], Path]) -> None:
    load = json.loads((run_of("mean") / "result.json").read_text())["load"]
    assert cli("report", run_of("mean")).out.split("Load the adapter:")[1].strip() == load


# --- pipelines ---


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def test_a_base_model_without_a_head_cannot_answer(run_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="no trained task head"):
        fedsb.predict(run_of("classes"), asked_rows("classes"), base=True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pipeline_of_a_merged_classifier(
    run_of: Callable[[str], Path], merged_of: Callable[[str], Path], batch_size: int
) -> None:
    from transformers import pipeline

    found = pipeline("text-classification", model=str(merged_of("classes")), batch_size=batch_size)(TEXTS)
    predicted = fedsb.predict(run_of("classes"), asked_rows("classes"))
    assert [one["label"] for one in found] == [row["prediction"] for row in predicted]
    wanted = [max(row["probabilities"].values()) for row in predicted]
    assert [one["score"] for one in found] == pytest.approx(wanted, abs=1e-5)


def test_a_pipeline_cuts_long_texts_as_training_did(
    run_of: Callable[[str], Path], merged_of: Callable[[str], Path]
) -> None:
    from transformers import pipeline

    text = " ".join(["red1 blue2"] * 8 + ["green3"] * 40)
    (found,) = pipeline("text-classification", model=str(merged_of("classes")))([text], truncation=True)
    (predicted,) = fedsb.predict(run_of("classes"), [{"text": text}])
    assert found["score"] == pytest.approx(predicted["probabilities"][found["label"]], abs=1e-5)


@pytest.mark.parametrize("kind", ["mean", "two", "number"])
def test_a_pipeline_refuses_a_classifier_that_averages(merged_of: Callable[[str], Path], kind: str) -> None:
    """No class of transformers averages logits: any that loads would have a random head."""
    from transformers import pipeline

    with pytest.raises((OSError, ValueError)):
        pipeline("text-classification", model=str(merged_of(kind)))


@pytest.mark.parametrize("kind", ["classes", "mean", "two", "number"])
def test_a_pipeline_refuses_a_classifiers_adapter(run_of: Callable[[str], Path], kind: str) -> None:
    """It loads the base with a config that does not know the classes, and any pooler."""
    from transformers import pipeline

    with pytest.raises((OSError, ValueError)):
        pipeline("text-classification", model=str(run_of(kind) / "adapter"))


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_pipeline_of_a_model_that_writes(
    run_of: Callable[[str], Path], merged_of: Callable[[str], Path], form: str
) -> None:
    from transformers import pipeline

    folder = merged_of("chat") if form == "merged" else run_of("chat") / "adapter"
    messages = asked_rows("chat")[0]["messages"]
    ends = {} if form == "merged" else {"eos_token_id": [2, 51]}
    found = pipeline("text-generation", model=str(folder))(messages, max_new_tokens=6, do_sample=False, **ends)
    (predicted,) = fedsb.predict(run_of("chat"), asked_rows("chat"))
    assert found[0]["generated_text"][-1]["content"] == predicted["prediction"]


def test_sentence_transformers_loads_a_classifier_that_averages(
    run_of: Callable[[str], Path], merged_of: Callable[[str], Path]
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    logits = sentence_transformers.SentenceTransformer(str(merged_of("mean"))).encode(TEXTS)
    predicted = fedsb.predict(run_of("mean"), asked_rows("mean"))
    wanted = torch.tensor([list(row["probabilities"].values()) for row in predicted])
    assert float((torch.tensor(logits).softmax(-1) - wanted).abs().max()) < 1e-5


def test_a_classifier_of_several_layers_that_averages_is_not_merged(
    cli: Callable[..., Said], run_of: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

    folder = tmp_path / "modern"
    config = ModernBertConfig(
        vocab_size=51, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0
    )
    ModernBertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_bert")).save_pretrained(folder)
    settings = config_of("mean", request, tmp_path)
    result = federate(load_config(set_all(settings, model={"name": str(folder), "max_seq_length": 16}, rounds=1)))
    said = cli("export", result.folder, "--to", tmp_path / "out", "--merged")
    assert said.code == 1 and "--merged is not possible: task.pooling = 'mean' is not available" in said.err
    assert "'modernbert'" in said.err and not (tmp_path / "out").exists()
    assert cli("export", result.folder, "--to", tmp_path / "out").code == 0


# --- files ---


def test_the_files_of_an_adapter(run_of: Callable[[str], Path], tiny_bert: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    adapter = run_of("mean") / "adapter"
    assert AutoTokenizer.from_pretrained(adapter)("red1 blue2").input_ids == [4, 17]
    assert AutoConfig.from_pretrained(adapter).id2label == {0: "blue", 1: "green", 2: "red"}
    card = (adapter / "README.md").read_text()
    assert str(tiny_bert) not in card and str(tiny_bert.parent) not in card
    assert f"| Base model | a local folder, `{tiny_bert.name}` |" in card
    assert not (run_of("text") / "adapter" / "config.json").exists()  # a pipeline loads such an adapter right


def test_a_base_that_others_know_is_named_in_the_card(tiny_bert: Path) -> None:
    from fedsb.adapters.card import model_card
    from fedsb.adapters.export import BaseModelInfo

    base = BaseModelInfo(
        name=str(tiny_bert),
        shared_name="owner/name",
        revision=None,
        auto_class="AutoModelForSequenceClassification",
        task_type="SEQ_CLS",
        head=[],
        label_names=["a", "b"],
        conv1d=False,
    )
    card = model_card(base, {})
    assert '\nbase_model: "owner/name"\n' in card and 'base_model = "owner/name"\n' in card
    assert str(tiny_bert) not in card
    made = replace(base, shared_name=str(tiny_bert), origin="converted from the wheel x==1")
    assert f"| Base model | a local folder, `{tiny_bert.name}`: converted from the wheel x==1 |" in model_card(made, {})


@pytest.mark.parametrize("kind", ["classes", "mean", "text"])
def test_files_are_readable_as_the_umask_says(
    merged_of: Callable[[str], Path], run_of: Callable[[str], Path], kind: str
) -> None:
    probe = run_of(kind) / "probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    folders = (merged_of(kind), run_of(kind) / "adapter")
    assert {path.stat().st_mode for folder in folders for path in folder.rglob("*") if path.is_file()} == {mode}


def test_the_licence_of_the_base_comes_along(
    cli: Callable[..., Said], run_of: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue("tiny_bert"), tmp_path / "base"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    (folder / "LICENSE").write_text("the text")
    settings = config_of("classes", request, tmp_path)
    result = federate(load_config(set_all(settings, model={"name": str(folder), "max_seq_length": 16}, rounds=1)))
    assert cli("export", result.folder, "--to", tmp_path / "out", "--merged").code == 0
    assert '\nlicense: "apache-2.0"\n' in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "LICENSE").read_text() == "the text"


def test_a_merged_model_ends_as_it_was_trained_to(
    run_of: Callable[[str], Path], merged_of: Callable[[str], Path]
) -> None:
    """The base's own end token is [EOS], 2; its template ends a turn with [END], 51."""
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(merged_of("chat")).eos_token_id == [2, 51]
    assert "Generation ends at the tokens 2, 51" in (run_of("chat") / "adapter" / "README.md").read_text()


def test_a_merged_model_also_ends_where_its_base_does(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As predictions do: an end token of the base's own generation config, here 7, is kept."""
    from transformers import GenerationConfig

    from fedsb.runs.evaluate import export_to

    folder = Path(shutil.copytree(request.getfixturevalue("tiny_llama"), tmp_path / "base"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 7]}))
    settings = config_of("text", request, tmp_path)
    run = federate(load_config(set_all(settings, model={"name": str(folder), "max_seq_length": 16}, rounds=1))).folder
    assert "Generation ends at the tokens 2, 7." in (run / "adapter" / "README.md").read_text()
    merged = export_to(run, str(tmp_path / "out"), merged=True)
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [2, 7]
    assert "Generation ends at the tokens 2, 7." in (Path(merged) / "README.md").read_text()


def test_a_generation_config_that_contradicts_itself_does_not_stop_an_export(
    cli: Callable[..., Said], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue("tiny_llama"), tmp_path / "base"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.6}))
    settings = config_of("text", request, tmp_path)
    result = federate(load_config(set_all(settings, model={"name": str(folder), "max_seq_length": 16}, rounds=1)))
    said = cli("export", result.folder, "--to", tmp_path / "out", "--merged")
    assert said.code == 0, said.err
    assert "temperature" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())


def test_a_template_that_asks_for_a_system_turn(
    cli: Callable[..., Said], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Conversations that have one are trained on; prompts, which have none, are refused in words."""
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    model = chat_model(request.getfixturevalue("tiny_llama"), tmp_path / "model", template)
    codes = {}
    for kind in ("chat", "instruction"):
        (tmp_path / kind).mkdir()
        settings = config_of(kind, request, tmp_path / kind)
        if kind == "chat":
            for table in settings["data"].values():
                rows = [json.loads(line)["messages"] for line in Path(table).read_text().splitlines()]
                system = {"role": "system", "content": "red1"}
                write_rows(Path(table), [{"messages": [system, *turns]} for turns in rows])
        settings = set_all(settings, model={"name": str(model), "max_seq_length": 64}, rounds=1)
        codes[kind] = cli("run", write_toml(tmp_path / f"{kind}.toml", settings))
    assert codes["chat"].code == 0, codes["chat"].err
    assert "Generation ends at the tokens 2, 51" in (tmp_path / "chat/runs/chat/adapter/README.md").read_text()
    assert codes["instruction"].code == 1
    assert "the chat template refuses a conversation with the roles user" in codes["instruction"].err


def test_check_warns_of_a_template_without_an_end(
    cli: Callable[..., Said], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = config_of("chat", request, tmp_path)

    def end_of(template: str) -> list[dict[str, Any]]:
        model = chat_model(request.getfixturevalue("tiny_llama"), tmp_path / "model", template)
        toml = write_toml(tmp_path / "x.toml", set_all(settings, model={"name": str(model), "max_seq_length": 64}))
        found = json.loads(cli("check", toml, "--json").out)
        return [choice for choice in found["settings"] if choice["key"] == "task.end"]

    (end,) = end_of(TEMPLATE)
    assert end["value"] == END
    (end,) = end_of(TEMPLATE.replace(END, ""))
    assert end["value"] == "none" and "the model does not learn to stop" in end["reason"]


# --- predictions ---


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_predictions_score_as_eval_does(cli: Callable[..., Said], run_of: Callable[[str], Path], kind: str) -> None:
    folder = run_of(kind)
    data = json.loads((folder / "manifest.json").read_text())["config"]["data"]["test"]
    rows = fedsb.predict(folder, data)
    found = json.loads(cli("eval", folder, "--json").out)
    if kind == "number":
        from fedsb.data.grading.metrics import pearson

        predicted, true = (
            torch.tensor([row[name] for row in rows]).double().numpy() for name in ("prediction", "score")
        )
        assert found["pearson"] == pytest.approx(pearson(predicted, true), abs=1e-12)
    else:
        assert sum(row["prediction"] == row["label"] for row in rows) / len(rows) == found["accuracy"]
        assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    given = [json.loads(line) for line in Path(data).read_text().splitlines()]
    assert [{key: row[key] for key in given[0]} for row in rows] == given


def test_the_command_line_predicts(cli: Callable[..., Said], run_of: Callable[[str], Path], tmp_path: Path) -> None:
    data = tmp_path / "new.csv"
    data.write_text("id,text\n7,red1 red2 blue3\n8,blue1 blue2\n")
    wanted = fedsb.predict(run_of("classes"), data)
    assert [row["id"] for row in wanted] == ["7", "8"]
    said = cli("predict", run_of("classes"), "--data", data, "--json")
    assert said.code == 0 and [json.loads(line) for line in said.out.splitlines()] == wanted
    said = cli("predict", run_of("classes"), "--data", data)
    first = said.out.splitlines()[0].split()
    assert first[:2] == ["1", wanted[0]["prediction"]] and "red1 red2 blue3" in said.out
    for name in ("out.jsonl", "out.csv"):
        said = cli("predict", run_of("classes"), "--data", data, "--out", tmp_path / name)
        assert said.code == 0 and said.out == f"2 predictions written to {tmp_path / name}\n"
        again = cli("predict", run_of("classes"), "--data", data, "--out", tmp_path / name)
        assert again.code == 1 and "already exists" in again.err
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == wanted
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in wanted]
    assert [float(row["probability of red"]) for row in rows] == [row["probabilities"]["red"] for row in wanted]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "red1"}\n\n{"text": null}\n', "a.jsonl, line 3: the column 'text' contains None"),
        ("a.csv", "words\nred1\n", "has no column 'text'"),
        ("a.csv", "text,prediction\nred1,x\n", "has a column 'prediction', which a prediction would overwrite"),
        ("a.csv", "text\n", "no rows"),
    ],
)
def test_rows_that_cannot_be_predicted(
    cli: Callable[..., Said], run_of: Callable[[str], Path], tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    got = cli("predict", run_of("classes"), "--data", tmp_path / name)
    assert (got.code, got.out) == (1, "") and said in got.err


def test_a_file_to_predict_is_read_as_the_runs_files_are(
    cli: Callable[..., Said], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = config_of("classes", request, tmp_path)
    settings = set_all(settings, rounds=1, data={**settings["data"], "encoding": "utf-16"})
    for key in ("train", "test"):
        path = Path(settings["data"][key])
        path.write_text(path.read_text(), encoding="utf-16")
    folder = federate(load_config(settings)).folder
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "red1"}\n', encoding="utf-16")
    said = cli("predict", folder, "--data", data, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["text"] == "red1"


def test_what_predict_refuses(cli: Callable[..., Said], run_of: Callable[[str], Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"text": "red1"}])
    said = cli("predict", run_of("classes"), "--data", data, "--new-tokens", 5)
    assert said.code == 1 and "--new-tokens 5 is for models that generate text" in said.err
    said = cli("predict", run_of("text"), "--data", data, "--new-tokens", 0)
    assert said.code == 1 and "must be at least 1" in said.err
    said = cli("predict", run_of("classes"), "--data", data, "--out", tmp_path / "a.xlsx")
    assert said.code == 1 and "a name that ends with .jsonl or .csv" in said.err
    with pytest.raises(UserError, match="row 2: the column 'text' contains 3"):
        fedsb.predict(run_of("classes"), [{"text": "red1"}, {"text": 3}])


@pytest.mark.parametrize("kind", WRITERS)
def test_writing(cli: Callable[..., Said], run_of: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """As long as asked for, the same alone and in a batch; a conversation's last turn of the assistant is not read."""
    one, *_ = asked_rows(kind)
    (alone,) = fedsb.predict(run_of(kind), [one])
    assert alone["ended"] or len(alone["prediction"].split()) <= 6
    (longer,) = fedsb.predict(run_of(kind), [one], new_tokens=9)
    assert longer["prediction"].startswith(alone["prediction"])
    column = {"text": "text", "instruction": "prompt"}.get(kind)
    other = {column: "red1 red2 red3"} if column else {"messages": [{"role": "user", "content": "red1 red2 red3"}]}
    both = fedsb.predict(run_of(kind), [other, one])
    assert both[1] == alone
    if kind == "chat":
        told = {"messages": [*one["messages"], {"role": "assistant", "content": "red1"}]}
        assert fedsb.predict(run_of(kind), [told])[0]["prediction"] == alone["prediction"]
    said = cli("predict", run_of(kind), "--data", write_rows(tmp_path / "a.jsonl", [other, one]))
    assert said.code == 0 and alone["prediction"].strip() in said.out


# --- an adapter that PEFT does not load ---


def test_a_run_whose_adapter_is_not_loaded_is_finished(
    cli: Callable[..., Said], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run reports it at the end, as does every verb that needs the adapter; the trained tensors are on disk."""

    def refuse(*_: object) -> None:
        raise UserError("PEFT loads no LoRA on the layer 'x.out_proj'")

    toml = write_toml(tmp_path / "a.toml", config_of("classes", request, tmp_path))
    folder = tmp_path / "runs" / "classes"
    with monkeypatch.context() as patch:
        patch.setattr("fedsb.training.export.check_adapter", refuse)
        for verb in (["run", toml], ["resume", folder]):
            said = cli(*verb)
            assert said.code == 1 and "'x.out_proj'" in said.err and "fedsb resume" not in said.err
    assert (folder / "adapter" / "adapter_model.safetensors").exists() and (folder / "report.html").exists()
    data = write_rows(tmp_path / "b.jsonl", [{"text": "red1"}])
    for verb in (["eval", folder], ["export", folder, "--to", tmp_path / "out"], ["predict", folder, "--data", data]):
        said = cli(*verb)
        assert said.code == 1 and "'x.out_proj'" in said.err and str(folder) in said.err
    assert cli("resume", folder).code == 0  # PEFT loads it now
    assert cli("eval", folder).code == 0


# --- the Hub ---


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_is_private_unless_asked(
    cli: Callable[..., Said],
    run_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    public: bool,
    tiny_bert: Path,
) -> None:
    made: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str) -> None:
            assert token == "hf_some"

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            made.update(name=name, private=private, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            made["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setenv("HF_TOKEN", "hf_some")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    said = cli("export", run_of("classes"), "--to", "hub:me/adapter", *(["--public"] if public else []))
    assert said.code == 0, said.err
    assert (made["name"], made["private"]) == ("me/adapter", not public)
    assert not any(str(tiny_bert).encode() in content for content in made["files"].values())
    said = cli("export", run_of("classes"), "--to", "folder", "--public")
    assert said.code == 1 and "--public is for a repository on the Hub" in said.err


def test_merged_lines_name_a_folder() -> None:
    from fedsb.adapters.export import BaseModelInfo

    base = BaseModelInfo(
        name="x",
        shared_name="owner/x",
        revision=None,
        auto_class="AutoModelForCausalLM",
        task_type="CAUSAL_LM",
        head=[],
        label_names=[],
        conv1d=False,
    )
    assert "folder = 'a/b'\n" in merged_lines(base, "a/b")
