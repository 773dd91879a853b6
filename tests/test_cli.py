"""Every verb, in this process and through `main`: what it prints, what it refuses, and its exit code."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, set_all, tiny_settings, write_rows, write_toml
from fedsb.config.load import load_config
from fedsb.runs.run import federate

VERBS = ["ls", "init", "check", "run", "resume", "compare", "eval", "predict", "export", "report", "env"]
HEAVY = ["torch", "transformers", "peft", "datasets", "pydantic", "numpy", "jinja2"]


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return federate(load_config(tiny_settings(tiny_bert, tables, tmp_path_factory.mktemp("finished")))).folder


@pytest.fixture
def toml(tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", tiny_config)


@pytest.mark.parametrize("command", ["import fedsb", "import sys; sys.argv[1:] = ['--help']; import fedsb.__main__"])
def test_nothing_heavy_is_loaded_for_nothing(command: str) -> None:
    script = (
        f"import sys\ntry:\n    {command}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("loaded: []\n")


def test_the_name_of_a_file_without_its_extension(
    toml: Path, cli: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toml.parent)
    said = cli("check", "tiny")
    assert said.code == 1 and said.err == "fedsb: there is no recipe 'tiny'. For the file, write tiny.toml\n"


def test_a_setting_without_effect_is_named_with_where_it_was_set(toml: Path, cli: Callable[..., Said]) -> None:
    said = cli("check", toml, "--set", "server.tau=0.1")
    assert "Warning: server.tau = 0.1 (--set server.tau) has no effect: server.optimizer is none." in said.out


def test_a_private_run_states_its_epsilon_first_and_the_bytes_of_other_methods_last(
    toml: Path, cli: Callable[..., Said]
) -> None:
    said = cli("run", toml, "--set", "privacy.unit=example", "--set", "privacy.epsilon=8")
    lines = said.out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("bytes    "))
    assert lines[start + 1].startswith("privacy  (8, 1e-05)-differentially private for one row of one client")
    assert lines[start + 2] == "" and lines[start + 3].startswith("round")
    after = next(number for number, line in enumerate(lines) if line.startswith("  bytes sent ")) + 1
    prices = [line for line in lines if "would have sent" in line]
    assert prices and lines[after : after + len(prices)] == prices
    assert lines[after + len(prices)].startswith("  privacy ")


def test_help(cli: Callable[..., Said]) -> None:
    said = cli("--help")
    assert said.code == 0 and "..." not in said.out.replace("[ARGS]...", ""), "a verb's first sentence is cut off"
    for verb in VERBS:
        assert f"\n  {verb} " in said.out
        each = cli(verb, "--help")
        assert each.code == 0 and f"Usage: fedsb {verb}" in each.out and "--json" in each.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runn"], "No such command 'runn'"),
        (["ls", "method"], "'methods', 'recipes', 'tasks', 'bases'"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "x.toml", "--sett", "a=1"], "--sett"),
        (["export", "runs/x"], "Missing option '--to'"),
    ],
)
def test_a_command_that_is_misspelt(cli: Callable[..., Said], arguments: list[str], said: str) -> None:
    got = cli(*arguments)
    assert (got.code, got.out) == (1, "") and said in got.err


@pytest.mark.parametrize("width", ["60", "100", "200"])
@pytest.mark.parametrize("what", ["methods", "recipes", "tasks", "bases"])
def test_ls(cli: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, what: str, width: str) -> None:
    """A table where it fits, else a paragraph a row; nothing is cut off, nothing is wider than asked."""
    monkeypatch.setenv("COLUMNS", width)
    rows = json.loads(cli("ls", what, "--json").out)
    monkeypatch.setenv("COLUMNS", width)
    said = cli("ls", what)
    assert said.code == 0 and said.err == ""
    assert max(map(len, said.out.splitlines())) <= int(width)
    assert "…" not in said.out
    flat = " ".join(said.out.split())
    for row in rows:
        assert str(next(iter(row.values()))) in flat


def test_ls_alone_names_everything(cli: Callable[..., Said]) -> None:
    found = {row["list"]: row["names"].split(", ") for row in json.loads(cli("ls", "--json").out)}
    assert list(found) == ["methods", "recipes", "tasks", "bases"]
    for what, names in found.items():
        assert names == [next(iter(row.values())) for row in json.loads(cli("ls", what, "--json").out)]
    assert "quickstart" in cli("ls").out


def test_every_recipe_is_described(cli: Callable[..., Said]) -> None:
    found = {row["recipe"]: row["what"] for row in json.loads(cli("ls", "recipes", "--json").out)}
    assert found["trec"] == "The kind of answer that a question asks for, six classes"
    assert all(10 < len(what) < 120 for what in found.values()), found


def test_the_version(cli: Callable[..., Said]) -> None:
    import fedsb

    assert cli("--version") == Said(0, f"fedsb {fedsb.__version__}\n", "")


def test_an_audit_of_a_run_directory_takes_the_runs_settings(cli: Callable[..., Said], finished: Path) -> None:
    said = cli("audit", finished)
    assert said.code == 1 and "privacy.unit = 'none'" in said.err


def test_a_folder_that_is_deleted_during_a_run(
    cli: Callable[..., Said], toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is one: there is nothing to resume."""
    import shutil

    from fedsb.runs.record import Record

    append = Record.append

    def delete(self: Record, *what: Any) -> None:
        shutil.rmtree(self.folder)
        append(self, *what)

    monkeypatch.setattr(Record, "append", delete)
    said = cli("run", toml)
    assert said.code == 2 and "deleted or moved in the meantime" in said.err
    assert "start the run again" in said.err and "resume" not in said.err and "make room" not in said.err


def test_init_prints_a_recipe_that_loads(cli: Callable[..., Said], tmp_path: Path) -> None:
    for row in json.loads(cli("ls", "recipes", "--json").out):
        said = cli("init", row["recipe"])
        assert said.code == 0
        (tmp_path / "my.toml").write_text(said.out)
        assert load_config(tmp_path / "my.toml").config.name
        assert json.loads(cli("init", row["recipe"], "--json").out) == tomllib.loads(said.out)
    said = cli("init", "quickstrat")
    assert said.code == 1 and "no recipe 'quickstrat'; did you mean 'quickstart'?" in said.err


def test_a_folder_of_a_recipes_name_hides_it_not(
    cli: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    said = cli("check", "quickstart", "--set", "method.rank=0")
    assert "1 fault in the configuration:\n  - method.rank" in said.err


def test_check(cli: Callable[..., Said], toml: Path, tmp_path: Path) -> None:
    short = cli("check", toml, "--set", "train.lr=0.5")
    assert short.code == 0 and short.err == ""
    assert len(short.out.splitlines()) < 20 and max(map(len, short.out.splitlines())) <= 140
    for name in ("rows", "classes", "clients", "test", "length", "model", "bytes", "memory", "time"):
        assert any(line.startswith(f"{name} ") for line in short.out.splitlines()), name
    said = cli("check", toml, "--set", "train.lr=0.5", "--verbose")
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "train.lr 0.5 --set train.lr" in lines
    assert "model.device cpu auto: no CUDA device" in lines
    assert any(line.startswith("fed-sb (rank 4) <- this run 0 B") for line in lines)
    assert "per client and round 192 values up, 192 down, and 99 of the head each way" in lines
    assert "per client and round 1.16 kB up, 1.16 kB down" in lines
    assert not (tmp_path / "runs").exists()


def test_check_prices_what_the_run_then_sends(cli: Callable[..., Said], toml: Path) -> None:
    priced = json.loads(cli("check", toml, "--json").out)["prices"][0]
    sent = json.loads(cli("run", toml, "--json").out)["bytes"]["federation"]["with_head"]
    assert priced["this_run"]
    assert (priced["one_off_bytes"], priced["up_bytes"], priced["down_bytes"], priced["total_bytes"]) == (
        sent["one_off"],
        sent["up"],
        sent["down"],
        sent["total"],
    )


def test_run(cli: Callable[..., Said], toml: Path, tmp_path: Path) -> None:
    said = cli("run", toml)
    assert said.code == 0 and said.err == "", said.err
    folder = tmp_path / "runs" / "tiny"
    assert "round 3/3  loss 1." in said.out
    assert f"adapter         {folder / 'adapter'}" in said.out
    compile(said.out.split("Load the adapter:")[1], "load", "exec")
    again = cli("run", toml)
    assert again.code == 1 and f"{folder} contains a finished run" in again.err and "resume" not in again.err
    (folder / "result.json").unlink()  # as where it was stopped
    again = cli("run", toml)
    assert again.code == 1 and f"{folder} contains an unfinished run. Resume it with `fedsb resume" in again.err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny"]


JSON = {
    "ls": ["ls", "methods"],
    "init": ["init"],
    "check": ["check", "TOML"],
    "run": ["run", "TOML"],
    "resume": ["resume", "RUN"],
    "eval": ["eval", "RUN"],
    "export": ["export", "RUN", "--to", "NEW"],
    "export --merged": ["export", "RUN", "--to", "NEW", "--merged"],
    "report": ["report", "RUN"],
    "env": ["env"],
}


@pytest.mark.parametrize("verb", JSON)
def test_json_is_one_document_on_stdout(
    cli: Callable[..., Said], finished: Path, toml: Path, tmp_path: Path, verb: str
) -> None:
    places = {"TOML": toml, "RUN": finished, "NEW": tmp_path / "new"}
    said = cli(*(places.get(word, word) for word in JSON[verb]), "--json")
    assert said.code == 0, said.err

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(said.out, parse_constant=refuse)
    assert isinstance(found, dict | list) and found
    if verb == "run":
        assert "round 3/3" in said.err
        assert found["finished"] and found["adapter"].endswith("tiny/adapter")


def test_json_of_what_fails_is_nothing_on_stdout(cli: Callable[..., Said], toml: Path) -> None:
    said = cli("run", toml, "--set", "method.rank=0", "--json")
    assert (said.code, said.out) == (1, "") and "method.rank" in said.err


def test_eval_equals_the_runs_last_score(cli: Callable[..., Said], finished: Path, tables: tuple[Path, Path]) -> None:
    wanted = json.loads((finished / "result.json").read_text())["score"]
    found = json.loads(cli("eval", finished, "--json").out)
    assert found["accuracy"] == wanted and found["rows"] == 40
    found = json.loads(cli("eval", finished, "--data", tables[1], "--json").out)
    assert found["accuracy"] == wanted
    said = cli("eval", finished)
    assert said.code == 0 and said.err == ""


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
def test_eval_of_next_token_and_of_a_tokenizer_without_padding(
    cli: Callable[..., Said], tiny_config: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(model), folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.pop("pad_token", None)
            (folder / name).write_text(json.dumps(settings))
    kinds = {"tiny_gpt2": "classification", "tiny_llama": "text"}
    config = set_all(
        tiny_config, model={"name": str(folder), "max_seq_length": 16}, task={"kind": kinds[model]}, rounds=1
    )
    result = federate(load_config(config))
    (metric,) = {"accuracy", "nats_per_token"} & (found := json.loads(cli("eval", result.folder, "--json").out)).keys()
    assert found[metric] == pytest.approx(result.score, rel=1e-6)


def test_eval_of_other_rows(cli: Callable[..., Said], finished: Path, tmp_path: Path) -> None:
    rows = [{"text": "red1 red2", "label": "mauve"}]
    said = cli("eval", finished, "--data", write_rows(tmp_path / "other.jsonl", rows))
    assert said.code == 1 and "'mauve'" in said.err
    said = cli("eval", finished, "--data", tmp_path / "no.jsonl")
    assert said.code == 1 and "There is no file" in said.err


def test_export_copies_the_adapter(cli: Callable[..., Said], finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "a" / "copy"
    said = cli("export", finished, "--to", target)
    assert said.code == 0 and said.out.splitlines()[0] == f"exported to {target}"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in (finished / "adapter").iterdir()
    }
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_export_merged_reloads_with_transformers_alone(
    cli: Callable[..., Said], finished: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    said = cli("export", finished, "--to", tmp_path / "merged", "--merged")
    assert said.code == 0 and said.err == "", said.err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "blue", 1: "green", 2: "red"}
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    adapted = PeftModel.from_pretrained(base, finished / "adapter").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        ["red1 blue2 green3", "grey0"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, adapted(**batch).logits, atol=1e-6)
        with adapted.disable_adapter():
            assert not torch.allclose(merged(**batch).logits, adapted(**batch).logits, atol=1e-3)


def test_export_overwrites_nothing(cli: Callable[..., Said], finished: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        for more in ([], ["--merged"]):
            said = cli("export", finished, "--to", tmp_path / name, *more)
            assert said.code == 1 and "is not empty. Choose a new folder." in said.err
    assert (tmp_path / "full" / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert cli("export", finished, "--to", tmp_path / "empty").code == 0


def test_export_to_the_hub(cli: Callable[..., Said], finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token it is refused; without a network it is an error that leaves the run as it was."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = sorted(finished.rglob("*"))
    said = cli("export", finished, "--to", "hub:me/adapter")
    assert said.code == 1 and "needs a token for the Hub. Set the environment variable HF_TOKEN" in said.err
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    said = cli("export", finished, "--to", "hub:me/adapter")
    assert said.code == 1 and "the Hub refused it" in said.err
    said = cli("export", finished, "--to", "hub:no good/name!")
    assert said.code == 1 and "the Hub refused it" in said.err
    assert sorted(finished.rglob("*")) == before


def test_methods_without_a_global_model(cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path) -> None:
    folder = federate(load_config(set_all(tiny_config, method={"name": "local", "rank": 2}, rounds=1))).folder
    for verb in (["eval", folder], ["export", folder, "--to", tmp_path / "copy"]):
        said = cli(*verb)
        assert said.code == 1
        assert "Method 'local' has no global model. The adapters of its clients are site 0, site 1, site 2" in said.err
    load = json.loads((folder / "result.json").read_text())["load"]
    assert repr(str(folder / "adapter" / "site 0")) in load


def test_a_run_that_is_not_finished(
    cli: Callable[..., Said], toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "runs" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr("fedsb.runs.run.export", stop)
        said = cli("run", toml)
    assert said.code == 130 and f"fedsb resume {folder}\n" in said.err
    for verb in (["eval", folder], ["export", folder, "--to", tmp_path / "copy"]):
        said = cli(*verb)
        assert said.code == 1 and f"{folder} is not finished. Resume it with `fedsb resume {folder}`" in said.err
    said = cli("report", folder)
    assert (
        said.code == 0 and "tiny: 3 of 3 rounds" in said.out and f"report          {folder / 'report.html'}" in said.out
    )
    assert cli("resume", folder).code == 0
    assert cli("eval", folder).code == 0


def test_resume_of_a_finished_run_changes_nothing(cli: Callable[..., Said], finished: Path) -> None:
    """It may write its adapter and its report again, the same."""
    kept = ("adapter", "rounds.jsonl", "traffic.jsonl", "manifest.json", "result.json", "checkpoints")
    before = {
        path: path.read_bytes()
        for name in kept
        for path in [finished / name, *finished.glob(f"{name}/**/*")]
        if path.is_file()
    }
    assert cli("resume", finished).code == 0
    assert {path: path.read_bytes() for path in before} == before


def test_report(cli: Callable[..., Said], finished: Path) -> None:
    (finished / "report.html").unlink()
    said = cli("report", finished)
    assert said.code == 0 and f"report          {finished / 'report.html'}\n" in said.out
    assert "<html" in (finished / "report.html").read_text()
    said = cli("report", finished.parent)
    assert said.code == 1 and "is not a run directory" in said.err


def test_env_names_no_user_and_no_host(cli: Callable[..., Said]) -> None:
    import getpass
    import platform

    found = json.loads(cli("env", "--json").out)
    assert {"torch", "transformers", "platform", "cores"} <= found.keys()
    text = cli("env").out
    assert platform.node() not in text and f"/{getpass.getuser()}" not in text


def test_nothing_changes_the_processs_logging(cli: Callable[..., Said], finished: Path) -> None:
    level = logging.getLogger().level
    cli("report", finished)
    assert logging.getLogger().level == level


def test_the_help_of_a_command_describes_its_arguments(cli: Callable[..., Said]) -> None:
    assert "A TOML file, or the name of a recipe." in " ".join(cli("check", "--help").out.split())
    assert "A run directory, such as runs/quickstart." in " ".join(cli("predict", "--help").out.split())


def test_a_misspelt_verb_gets_one_suggestion(cli: Callable[..., Said]) -> None:
    said = cli("chek", "quickstart")
    assert said.code == 1 and said.err.count("Did you mean 'check'?") == 1


def test_renamed_settings_are_named_on_stderr(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    old = set_all(tiny_config, train={"steps": 3, "batch_size": 4, "lr": 0.02}, rounds=1)
    notice = "Notice: train.steps was renamed to train.local_steps. The old name works in this version only.\n"
    toml = write_toml(tmp_path / "old.toml", old)
    for command in ("check", "run"):
        said = cli(command, toml)
        assert (said.code, said.err) == (0, notice)
    run = tmp_path / "runs" / "tiny"
    said = cli("resume", run, "--config", toml)
    assert (said.code, said.err) == (0, notice)
    both = set_all(old, train={"steps": 3, "local_steps": 3, "batch_size": 4, "lr": 0.02})
    said = cli("check", write_toml(tmp_path / "both.toml", both))
    assert said.code == 1 and "train.steps" in said.err and "train.local_steps" in said.err
