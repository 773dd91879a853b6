"""Task families in whole runs: metrics of whole tables, numbers for texts, chat, programs; several tables at once."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CLASSES, Said, labelled_rows, set_all, write_rows, write_toml
from fedsb.config.load import load_config
from fedsb.data.grading import metrics
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.runs.scoring import score_clients
from fedsb.server.server import Server
from support.server import started
from test_answers import SHARED, real_rows

CHAT = (
    "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}grey0 {% endif %}"
).replace("{{ m.content }}", "{% if m.role == 'assistant' %}grey0 {% endif %}{{ m.content }}")


def numbered(count: int, seed: int) -> list[dict[str, Any]]:
    """A text's number is how many of its words are red, halved."""
    rows = labelled_rows(count, seed)
    return [row | {"label": sum(word.startswith("red") for word in row["text"].split()) / 2} for row in rows]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("numbers")
    return tuple(write_rows(folder / f"{i}.jsonl", numbered(60 - 20 * i, i)) for i in range(2))  # type: ignore[return-value]


@pytest.fixture
def regression(tiny_config: dict[str, Any], numbers: tuple[Path, Path]) -> dict[str, Any]:
    return set_all(
        tiny_config,
        task={"kind": "regression"},
        data={"train": str(numbers[0]), "test": str(numbers[1])},
        train={"local_steps": 8, "batch_size": 8, "lr": 0.02, "head_lr": 0.02},
    )


def test_a_regression_from_training_to_the_adapter(
    cli: Callable[..., Said], regression: dict[str, Any], numbers: tuple[Path, Path], tmp_path: Path
) -> None:
    result = federate(load_config(regression))
    rounds = read_rows(result.folder / "rounds.jsonl")
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    manifest = json.loads((result.folder / "manifest.json").read_text())
    task = manifest["task"]
    assert (task["metric"], task["higher_is_better"], task["label_names"]) == ("pearson", True, ["label"])
    assert manifest["before"]["majority"] is None
    assert all(client["labels"] is None for client in manifest["clients"])
    found = json.loads(cli("eval", result.folder, "--json").out)
    assert found["pearson"] == pytest.approx(result.score, rel=1e-5) and -1 <= found["spearman"] <= 1

    load = json.loads((result.folder / "result.json").read_text())["load"]
    assert "print(logits[:, 0].tolist())" in load
    rows = numbered(40, 1)
    script = (
        load + "\nimport json, sys\n"
        "rows = json.load(sys.stdin)\n"
        "outs = [model(**tokenizer(r, return_tensors='pt')).logits.tolist() for r in rows]\n"
        "print(json.dumps([out[0] for out in outs]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps([row["text"] for row in rows]), capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    predicted = json.loads(out.stdout.splitlines()[-1])
    assert [len(one) for one in predicted] == [1] * len(rows)
    import numpy as np

    by_hand = metrics.pearson(np.array(predicted)[:, 0], np.array([row["label"] for row in rows]))
    assert by_hand == pytest.approx(result.score, abs=1e-5)

    said = cli("export", result.folder, "--to", tmp_path / "merged", "--merged")
    assert said.code == 0, said.err
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (settings["problem_type"], settings["id2label"]) == ("regression", {"0": "label"})
    card = (result.folder / "adapter" / "README.md").read_text()
    assert "## Output\n\n- 0: label\n" in card and "| Score | pearson 0." in card


def test_what_a_regression_cannot(cli: Callable[..., Said], regression: dict[str, Any], tmp_path: Path) -> None:
    config = set_all(regression, clients={"partition": "dirichlet", "count": 2})
    said = cli("run", write_toml(tmp_path / "my.toml", config))
    assert said.code == 1 and "label" in said.err


@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_a_metric_of_all_rows_in_a_run_and_for_each_client(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tables: tuple[Path, Path], metric: str
) -> None:
    """The run's, each client's, and eval's number are those of all their rows together, whatever the batch."""
    task = {"kind": "classification", "metric": metric}
    scores = set()
    for size in (7, 64):
        config = set_all(tiny_config, name=f"{metric}-{size}", task=task, eval={"batch_size": size, "gap": True})
        result = federate(load_config(config))
        scores.add(round(result.score or 0, 9))
        found = json.loads(cli("eval", result.folder, "--json").out)
        assert found[metric] == result.score and 0 <= found["accuracy"] <= 1
    assert len(scores) == 1
    server, state = started(set_all(tiny_config, task=task))
    each = score_clients(server, state)
    for site in server.data.clients:  # a head that is all but zero: what it says is read from the model itself
        predicted, true = predictions(server, site.held_out)
        wanted = metrics.f1(predicted, true, len(CLASSES)) if metric == "f1" else metrics.matthews(predicted, true)
        assert each[site.name].value == pytest.approx(wanted)


def predictions(server: Server, examples: list[Any]) -> tuple[Any, Any]:
    import numpy as np
    import torch

    from fedsb.training.scoring import forward

    with torch.no_grad():
        rows = [forward(server.trainer.adapted.model, server.trainer.task, [example]) for example in examples]
    called = [int(logits[0].argmax()) for logits, _ in rows]
    return np.array(called, dtype=float), np.array([example["labels"] for example in examples], dtype=float)


def test_compare_knows_which_correlation_is_better(
    cli: Callable[..., Said], regression: dict[str, Any], tmp_path: Path
) -> None:
    config = set_all(regression, rounds=1, compare={"methods": ["fed-sb", "fedit@2"], "seeds": 1, "trials": 0})
    toml = write_toml(tmp_path / "my.toml", config)
    found = json.loads(cli("compare", toml, "--out", tmp_path / "found", "--json").out)
    assert (found["metric"], found["higher_is_better"], found["failed"]) == ("pearson", True, {})
    mixed = ["--set", 'compare.grid={"task.metric" = ["pearson", "spearman"]}']
    said = cli("compare", toml, "--out", tmp_path / "mixed", *mixed)
    assert said.code == 1
    assert "scores of different tasks cannot be compared: regression pearson, regression spearman" in said.err


def test_several_tables_and_their_plain_mean(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """Of 10 and of 30 rows: the mean counts tables, not rows."""
    result = federate(load_config(set_all(tiny_config, rounds=1)))
    files = [write_rows(tmp_path / f"test{i}.jsonl", labelled_rows(n, i)) for i, n in enumerate((10, 30), start=5)]
    named = [word for file in files for word in ("--data", file)]
    each = [json.loads(cli("eval", result.folder, "--data", file, "--json").out) for file in files]
    found = json.loads(cli("eval", result.folder, *named, "--json").out)
    assert found["tables"] == each and found["metric"] == "accuracy"
    assert found["mean"] == (each[0]["accuracy"] + each[1]["accuracy"]) / 2
    said = cli("eval", result.folder, *named)
    assert said.code == 0
    lines = [line.split() for line in said.out.splitlines() if line.strip()]
    assert lines[-1] == ["mean", f"{found['mean']:.4f}"]
    assert [line[0] for line in lines[-3:-1]] == ["test5.jsonl", "test6.jsonl"]
    said = cli("eval", result.folder, *named, "--data", files[0])
    assert said.code == 1 and "contains a table twice" in said.err
    said = cli("eval", result.folder, *named, "--data", tmp_path / "no.jsonl")
    assert said.code == 1 and "There is no file" in said.err and said.out == ""  # before anything is scored


def test_a_chat_and_its_perplexity(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    files = []
    for seed in range(2):
        rows = [
            {
                "client": row["client"],
                "messages": [
                    {"role": role, "content": f"{row['label']}{i}"}
                    for i, role in enumerate(("user", "assistant", "user", "assistant"))
                ],
            }
            for row in labelled_rows(30, seed)
        ]
        files.append(str(write_rows(tmp_path / f"{seed}.jsonl", rows)))
    config = set_all(
        tiny_config,
        model={"name": str(model), "max_seq_length": 32},
        task={"kind": "chat"},
        data={"train": files[0], "test": files[1]},
    )
    result = federate(load_config(config))
    rounds = read_rows(result.folder / "rounds.jsonl")
    assert rounds[-1]["score"] < rounds[0]["score"]
    found = json.loads(cli("eval", result.folder, "--json").out)
    assert found["nats_per_token"] == pytest.approx(result.score, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data are not beside the repository, in ../shared")
def test_programs_are_run_where_it_is_allowed(
    cli: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model writes no program; with the right one put into its mouth, one of three passes."""
    from fedsb.training import scoring
    from fedsb.training.generation import Written

    rows = real_rows("mbpp/mbpp.jsonl.gz", 9, lambda row: len(str(row["code"]) + str(row["test_list"])) < 230)
    files = [write_rows(tmp_path / f"{i}.jsonl", rows[6 * i : 6 + 3 * i]) for i in range(2)]
    config = {
        "name": "code",
        "rounds": 1,
        "out": str(tmp_path / "runs"),
        "model": {"name": str(SHARED / "models" / "stories260K"), "max_seq_length": 320},
        "data": {"train": str(files[0]), "test": str(files[1])},
        "task": {"kind": "code", "new_tokens": 8},
        "clients": {"count": 2},
        "method": {"name": "fed-sb", "rank": 4},
        "basis": {"kind": "random", "share_samples": 0},
        "train": {"local_steps": 1, "batch_size": 2, "lr": 0.01},
    }
    toml = write_toml(tmp_path / "my.toml", config)
    said = cli("run", toml)
    assert said.code == 1 and "Allow it with task.run_code = true" in said.err
    assert cli("run", toml, "--set", "task.run_code=true").code == 0
    folder = tmp_path / "runs" / "code"
    assert json.loads((folder / "manifest.json").read_text())["task"]["metric"] == "pass@1"
    assert json.loads(cli("eval", folder, "--json").out)["pass@1"] == 0

    def told(*_: Any, **__: Any) -> Any:
        texts = (f"```python\n{rows[6]['code']}\n```", f"```python\n{rows[6]['code']}\n```", "while True: pass")
        yield from ((i, Written(text=text, tokens=8, ended=True)) for i, text in enumerate(texts))

    monkeypatch.setattr(scoring, "write_answers", told)
    shutil.rmtree(folder / "evals")
    found = json.loads(cli("eval", folder, "--json").out)
    assert found["pass@1"] == pytest.approx(1 / 3) and found["grading_faults"] == 1
    lines = read_rows(Path(found["answers"]))
    assert [line["right"] for line in lines] == [True, False, False]
    assert lines[2]["fault"] == "took more than 10 s" and "assert" in lines[0]["gold"]
