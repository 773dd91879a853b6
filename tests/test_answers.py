"""Runs and evaluations whose answers are written: the same number on reload, kept answers, an evaluation taken up."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from conftest import Said, set_all, write_rows
from fedsb.config.inputs import ModelConfig
from fedsb.config.load import load_config
from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.data.tasks.instruction import ALPACA
from fedsb.models.load import load_base
from fedsb.models.tokenizer import load_tokenizer
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.training import scoring
from fedsb.training.generation import Prompt, Written
from fedsb.training.scoring import measured

COUNTS = ("cut", "no_room", "without_answer", "grading_faults")
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def stories() -> Path:
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir() or not (SHARED / "data").is_dir():
        pytest.skip("stories260K and the real data are not in ../shared")
    return folder


def real_rows(name: str, count: int, fits: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    with gzip.open(SHARED / "data" / name, "rt") as file:
        rows = [row for row in map(json.loads, file) if fits(row)]
    return rows[:count]


def answers_config(kind: str, model: Path, folder: Path) -> dict[str, Any]:
    """A run of two rounds on real rows, short ones."""
    if kind == "arithmetic":
        train = real_rows("gsm8k/train.jsonl.gz", 24, lambda row: len(row["question"] + row["answer"]) < 220)
        test = real_rows("gsm8k/test.jsonl.gz", 5, lambda row: len(row["question"]) < 130)
    else:
        train = real_rows("commonsense/train_20k.jsonl.gz", 24, lambda row: row["task"] == "boolq")
        test = real_rows("commonsense/test/boolq.jsonl.gz", 6, lambda row: len(row["instruction"]) < 140)
    return {
        "name": kind,
        "rounds": 2,
        "out": str(folder / "runs"),
        "model": {"name": str(model), "max_seq_length": 320},
        "data": {
            "train": str(write_rows(folder / f"{kind}-train.jsonl", train)),
            "test": str(write_rows(folder / f"{kind}-test.jsonl", test)),
        },
        "task": {"kind": kind, "new_tokens": 28},
        "clients": {"count": 2},
        "method": {"name": "fed-sb", "rank": 16},
        "basis": {"kind": "random", "share_samples": 0},
        "train": {"local_steps": 6, "batch_size": 2, "lr": 0.03},
        "eval": {"every": 2, "batch_size": 4},
    }


@pytest.fixture(scope="module")
def finished(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run of each family."""
    folder = tmp_path_factory.mktemp("answers")
    kinds = ("arithmetic", "commonsense")
    return {kind: federate(load_config(answers_config(kind, stories, folder))) for kind in kinds}


@pytest.mark.parametrize("kind", ["arithmetic", "commonsense"])
def test_a_run_and_its_reload(cli: Callable[..., Said], finished: dict[str, Any], kind: str) -> None:
    result = finished[kind]
    rounds = read_rows(result.folder / "rounds.jsonl")
    assert rounds[1]["loss"] < 0.9 * rounds[0]["loss"] and rounds[1]["score"] is not None
    found = json.loads(cli("eval", result.folder, "--json").out)
    assert found["accuracy"] == result.score
    assert {name: found[name] for name in COUNTS} == rounds[1]["extra_metrics"]
    assert json.loads((result.folder / "result.json").read_text())["extra_metrics"] == rounds[1]["extra_metrics"]
    shown = cli("report", result.folder).out
    assert f"{len(read_rows(Path(found['answers'])))} cut" in shown
    lines = read_rows(Path(found["answers"]))
    assert [line["row"] for line in lines] == list(range(1, found["rows"] + 1))
    assert sum(line["right"] for line in lines) / len(lines) == result.score
    assert found["cut"] == sum(not line["ended"] for line in lines) == len(lines)  # stories260K knows no end token
    assert found["without_answer"] == sum(line["extracted"] is None for line in lines)
    assert found["grading_faults"] == 0
    assert all("### Response:" in line["prompt"] and line["generated"] and line["tokens"] == 28 for line in lines)
    assert json.loads((Path(found["answers"]).parent / "result.json").read_text()) == found
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert (manifest["task"]["metric"], manifest["task"]["higher_is_better"]) == ("accuracy", True)


@pytest.mark.parametrize(
    ("kind", "score"), [("arithmetic", "answers"), ("commonsense", "answers"), ("commonsense", "options")]
)
def test_predictions_are_what_was_scored(
    cli: Callable[..., Said], finished: dict[str, Any], tmp_path: Path, kind: str, score: str
) -> None:
    """Of rows with and without their answers."""
    import fedsb

    folder = finished[kind].folder
    manifest = json.loads((folder / "manifest.json").read_text())
    data = Path(manifest["config"]["data"]["test"])
    rows = read_rows(data)
    bare = write_rows(tmp_path / "bare.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    if score == "options":
        scored = tmp_path / "run"
        shutil.copytree(folder, scored)
        manifest["config"]["task"]["score"] = "options"
        (scored / "manifest.json").write_text(json.dumps(manifest))
        found = json.loads(cli("eval", scored, "--json").out)
        for table in (data, bare):
            predicted = [row["prediction"] for row in fedsb.predict(scored, table)]
            right = [prediction == row["answer"] for prediction, row in zip(predicted, rows, strict=True)]
            assert sum(right) / len(rows) == found["accuracy"]
        return
    lines = read_rows(Path(json.loads(cli("eval", folder, "--json").out)["answers"]))
    for table in (data, bare):
        predicted = fedsb.predict(folder, table)
        assert [row["prediction"] for row in predicted] == [line["generated"] for line in lines]
        assert [row["ended"] for row in predicted] == [line["ended"] for line in lines]


def test_the_base_model_answers_too(
    cli: Callable[..., Said], finished: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fedsb

    folder = finished["arithmetic"].folder
    rows = [{"prompt": "How many apples are 3 and 4?"}, {"prompt": "Lily had 2 cats. How many?"}]
    both, alone = fedsb.predict(folder, rows, base=True, new_tokens=12), fedsb.predict(folder, rows, new_tokens=12)
    assert [row["prediction"] for row in both] == [row["prediction"] for row in alone]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    for row in both:
        ids = tokenizer(ALPACA.format(prompt=row["prompt"]), return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["base_prediction"] == tokenizer.decode(written, skip_special_tokens=True)
        assert row["base_prediction"] != row["prediction"]
    asked = write_rows(tmp_path / "asked.jsonl", rows)
    said = cli("predict", folder, "--data", asked, "--base", "--new-tokens", 12).out
    assert said.count("base model: ") == said.count("with adapter: ") == 2
    cut = sum(not row["base_ended"] for row in both)
    assert cut and said.count("[cut]") == cut + sum(not row["ended"] for row in both)


def test_an_evaluation_goes_on_and_grades_anew(
    cli: Callable[..., Said], finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not written again; a torn line, another row's answer and an old verdict are not believed."""
    folder = finished["commonsense"].folder
    first = json.loads(cli("eval", folder, "--json").out)
    path = Path(first["answers"])
    lines = path.read_text().splitlines()
    strange = json.dumps(json.loads(lines[1]) | {"prompt": "another"})
    doubted = json.dumps(json.loads(lines[2]) | {"right": not json.loads(lines[2])["right"], "extracted": "x"})
    path.write_text("\n".join([lines[0], strange, doubted, lines[4][:40]]))
    asked: list[int] = []
    write = scoring.write_answers

    def counted(model: Any, tokenizer: Any, prompts: list[Prompt], **how: Any) -> Any:
        asked.append(len(prompts))
        return write(model, tokenizer, prompts, **how)

    monkeypatch.setattr(scoring, "write_answers", counted)
    said = cli("eval", folder, "--json")
    assert json.loads(said.out) == first
    assert path.read_text().splitlines() == lines
    assert asked == [len(lines) - 2]
    assert f"2 of {len(lines)} answers are stored in {path}" in said.err and "answered, accuracy" in said.err
    assert json.loads(cli("eval", folder, "--json").out) == first and len(asked) == 1


def test_an_evaluation_that_is_stopped_keeps_its_answers(
    cli: Callable[..., Said], finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = real_rows("commonsense/test/boolq.jsonl.gz", 9, lambda row: 140 < len(row["instruction"]) < 170)
    other = write_rows(tmp_path / "other.jsonl", rows)
    folder, write = finished["commonsense"].folder, scoring.write_answers

    def stop(*arguments: Any, **how: Any) -> Any:
        for count, found in enumerate(write(*arguments, **how)):
            if count == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(scoring, "write_answers", stop)
    assert cli("eval", folder, "--data", other).code == 130
    monkeypatch.setattr(scoring, "write_answers", write)
    said = cli("eval", folder, "--data", other, "--json")
    assert "5 of 9 answers are stored in" in said.err and json.loads(said.out)["rows"] == 9


def test_scored_by_options_and_by_loss(
    cli: Callable[..., Said], stories: Path, tmp_path: Path, finished: dict[str, Any]
) -> None:
    config = answers_config("commonsense", stories, tmp_path)
    for score, metric in (("options", "accuracy"), ("loss", "nats_per_token")):
        changed = set_all(config, name=score, rounds=1, task={"kind": "commonsense", "score": score})
        result = federate(load_config(changed))
        found = json.loads(cli("eval", result.folder, "--json").out)
        assert found[metric] == pytest.approx(result.score, rel=1e-6)
    assert not (result.folder / "evals").exists()
    said = cli("eval", result.folder, "--backend", "vllm")
    assert said.code == 1 and "this run is scored by loss. Leave it out" in said.err


def test_the_likeliest_option(stories: Path) -> None:
    """By a plain loop: the answer whose tokens, the end token included, have the largest sum of log p."""
    import torch

    base = ModelConfig(name=str(stories), device="cpu")
    model = load_base(base, auto_class="AutoModelForCausalLM", num_labels=0, pad_token=2).model
    task = open_task(
        "commonsense", tokenizer=load_tokenizer(base), options=TaskOptions(score="options"), max_tokens=512
    )
    rows = real_rows("commonsense/test/social_i_qa.jsonl.gz", 7, lambda row: len(row["instruction"]) < 260)
    examples, _ = task.encode_test(rows)
    right = []
    for row in rows:
        sums = {}
        for name in ("answer1", "answer2", "answer3"):
            (told,), _ = task.encode([row | {"answer": name}])
            ids, labels = (torch.tensor(told[key]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                log_p = model(ids[None]).logits[0].log_softmax(-1)
            sums[name] = sum(float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)) if labels[t] != -100)
        right.append(max(sums, key=sums.__getitem__) == row["answer"])
    assert 0 < sum(right) < len(right)
    for batch_size in (1, 3, 64):
        found = measured(model, task, examples, batch_size).figures
        assert found == {"accuracy": sum(right) / len(right)} | dict.fromkeys(COUNTS, 0)


@pytest.mark.parametrize(("options", "package"), [(["--backend", "vllm"], "vllm"), (["--lm-eval", "gsm8k"], "lm-eval")])
def test_a_package_that_is_missing_is_named(
    cli: Callable[..., Said],
    finished: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    package: str,
) -> None:
    for name in ("vllm", "lm_eval"):
        monkeypatch.setitem(sys.modules, name, None)
    import shutil

    evals = finished["arithmetic"].folder / "evals"
    shutil.rmtree(evals, ignore_errors=True)
    said = cli("eval", finished["arithmetic"].folder, *options)
    assert said.code == 1 and f"needs the package {package}. Install it" in said.err


def test_vllm_is_asked_as_transformers_is(
    cli: Callable[..., Said], finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the package: what it is told, and that its answers are graded row by row."""
    told: dict[str, Any] = {}

    class LLM:
        def __init__(self, **settings: Any) -> None:
            told["model"] = settings
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))

        def generate(self, prompts: list[Any], how: list[Any], lora_request: Any) -> list[Any]:
            told.update(prompts=prompts, how=how, lora=lora_request)
            made = SimpleNamespace(text="the correct answer is true", token_ids=[1] * 5, finish_reason="stop")
            return [SimpleNamespace(outputs=[made]) for _ in prompts]

    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: path  # type: ignore[attr-defined]
    for name, module in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    folder = finished["commonsense"].folder
    found = json.loads(cli("eval", folder, "--backend", "vllm", "--json").out)
    golds = [line["gold"] for line in read_rows(Path(found["answers"]))]
    assert found["accuracy"] == golds.count("true") / len(golds) and found["cut"] == 0
    assert told["how"][0] == {"temperature": 0.0, "max_tokens": 28, "stop": ["### Instruction:"], "stop_token_ids": [2]}
    assert told["model"]["max_lora_rank"] == 16 and told["lora"] == str(folder / "adapter")
    tokenizer = load_tokenizer(ModelConfig(name=told["model"]["model"]))
    assert tokenizer.decode(told["prompts"][0]["prompt_token_ids"]).endswith("### Response:")


def test_what_was_written_is_kept_with_its_row() -> None:
    """Answers come in the order of their length; each goes to its own question."""
    from fedsb.data.grading.verdict import Verdict
    from fedsb.data.tasks.base import Question

    class Echo:
        def grade(self, question: Question, written: str) -> Verdict:
            return Verdict(right=written == question.gold, extracted=written)

    questions = [Question(prompt=g, gold=g, kind="", new_tokens=1) for g in "abc"]
    written = [(i, Written(text="abc"[i], tokens=1, ended=True)) for i in (2, 0, 1)]
    found = list(scoring.graded(Echo(), questions, written))  # type: ignore[arg-type]
    assert [answered.position for answered in found] == [2, 0, 1]
    assert all(answered.verdict.right for answered in found)


def test_what_went_wrong_is_counted_and_shown() -> None:
    """By hand: right; cut and right; a full window; graded in vain. Counts are ints, shown but for zeros."""
    from fedsb.data.grading.verdict import Verdict
    from fedsb.data.tasks.base import Question
    from fedsb.training.score import Score, mean_of
    from fedsb.utils.formatting import counts_text, extra_metrics_text

    def answered(written: Written, extracted: str | None, *, right: bool, fault: str | None = None) -> scoring.Answered:
        verdict = Verdict(right=right, extracted=extracted, fault=fault)
        question = Question(prompt="", gold="", kind="", new_tokens=1)
        return scoring.Answered(position=0, question=question, written=written, verdict=verdict)

    found = scoring.figures(
        [
            answered(Written(text="1", tokens=1, ended=True), "1", right=True),
            answered(Written(text="1 and", tokens=2, ended=False), "1", right=True),
            answered(Written(text="", tokens=0, ended=False), None, right=False),
            answered(Written(text="2!", tokens=2, ended=True), "2!", right=False, fault="took more than 10 s"),
        ],
        "accuracy",
    )
    assert found == {"accuracy": 0.5, "cut": 2, "no_room": 1, "without_answer": 1, "grading_faults": 1}
    extra = {name: found[name] for name in COUNTS}
    assert counts_text(extra) == ", 2 cut, 1 no room, 1 without answer, 1 grading faults"
    assert counts_text(dict.fromkeys(COUNTS, 0)) == "" == extra_metrics_text({})
    assert extra_metrics_text({"f1": 0.5, "matthews": 0.25, "cut": 3}) == "f1 50.0\xa0%, matthews 0.25, 3 cut"
    both = mean_of(
        {
            "a": Score(value=0.5, count=4, extra_metrics={"cut": 2, "f1": 0.5}),
            "b": Score(value=1, count=4, extra_metrics={"cut": 1, "f1": 1.0}),
        }
    )
    assert (both.value, both.count, both.extra_metrics) == (0.75, 4, {"cut": 3, "f1": 0.75})
    assert both.by_client == {"a": 0.5, "b": 1}
