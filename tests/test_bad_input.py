"""What users get wrong, each line of it: a clear message, the right exit code, nothing lost, nothing left behind."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conftest import Said, adapter_bytes, set_all, write_rows, write_toml
from fedsb.config.load import load_config
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.training.joint import JointTrainer

Cli = Callable[..., Said]


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Both `check` and `run` refuse a configuration in the same words, with exit code 1, and leave no run behind."""

    def both(config: dict[str, Any], *more: str) -> str:
        toml = write_toml(tmp_path / "bad.toml", config)
        before = sorted(tmp_path.rglob("*"))
        checked, ran = cli("check", toml, *more), cli("run", toml, *more)
        assert (checked.code, ran.code) == (1, 1), (checked, ran)
        assert checked.out == ""
        assert checked.err == ran.err
        assert "Traceback" not in ran.err
        assert [path for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "runs"] == before
        return ran.err

    return both


# --- the data ---


def test_a_missing_file(tiny_config: dict[str, Any], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    said = refused(set_all(tiny_config, data={"train": str(tmp_path / "trian.csv")}))
    assert "There is no file" in said and "Did you mean train.csv?" in said


def test_an_empty_file(tiny_config: dict[str, Any], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    assert "is empty. Give a file with at least one row" in refused(
        set_all(tiny_config, data={"train": str(tmp_path / "train.jsonl")})
    )


def test_an_unknown_column(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    said = refused(tiny_config, "--set", "task.text=txt")
    assert "has no column 'txt': did you mean 'text'? There are: client, label, text" in said
    said = refused(tiny_config, "--set", "clients.column=klient")
    assert "has no column 'klient': did you mean 'client'?" in said and "--set task.text=COLUMN" in said


def test_a_label_that_only_the_test_has(
    tiny_config: dict[str, Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = [*rows_of(tiny_config["data"]["test"]), {"text": "red1", "label": "mauve", "client": "x"}]
    data = {**tiny_config["data"], "test": str(write_rows(tmp_path / "test.jsonl", rows))}
    said = refused(set_all(tiny_config, data=data))
    assert "The test has the label 'mauve', which no training row has: there are: blue, green, red. Add" in said


def test_a_label_that_only_some_clients_have_is_fine(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for row in rows_of(tiny_config["data"]["train"]) if (row["client"], row["label"]) != ("site 0", "red")]
    data = {**tiny_config["data"], "train": str(write_rows(tmp_path / "train.jsonl", rows))}
    folder = federate(load_config(set_all(tiny_config, data=data, rounds=1))).folder
    clients = {c["name"]: c["labels"] for c in json.loads((folder / "manifest.json").read_text())["clients"]}
    assert clients["site 0"]["red"] == 0 < clients["site 1"]["red"]


def test_more_clients_than_rows(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    said = refused(set_all(tiny_config, clients={"partition": "iid", "count": 91}))
    assert "91 clients for 90 rows are too many, because a client needs a row. Set clients.count to 90 or fewer" in said


def test_a_client_with_no_rows(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    clients = {"partition": "size", "count": 2, "sizes": [1, 1000]}
    said = refused(set_all(tiny_config, clients=clients))
    assert "client-00 has 0 of 90 rows, fewer than 1. Set fewer clients" in said


def test_a_client_without_a_usable_row(
    tiny_config: dict[str, Any], refused: Callable[..., str], tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [{"text": "red1 red2 red3", "client": "a"}, {"text": "red1", "client": "one word"}]
    data = {"train": str(write_rows(tmp_path / "train.jsonl", rows))}
    config = set_all(tiny_config, model={"name": str(tiny_llama)}, task={"kind": "text"}, data=data)
    assert "Client 'one word' has no usable row" in refused(config)


def test_text_that_is_too_long_is_counted_and_shown(
    cli: Cli, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = rows_of(tiny_config["data"]["train"])
    for row in rows[:7]:
        row["text"] = "red1 " * 40
    data = {"train": str(write_rows(tmp_path / "train.jsonl", rows))}
    said = cli("check", write_toml(tmp_path / "long.toml", set_all(tiny_config, data=data)), "--verbose")
    assert said.code == 0 and "7 of 90 rows (7.78 %) longer than 16 tokens" in " ".join(said.out.split())
    line = next(" ".join(line.split()) for line in said.out.splitlines() if line.startswith("data.cut"))
    assert line.startswith("data.cut 7 counted: rows longer than model.max_seq_length = 16")


# --- the model and the method ---


@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 33}, {"name": "fed-sb", "rank": 17, "blocks": 2}])
def test_a_rank_above_the_layers(
    tiny_config: dict[str, Any], refused: Callable[..., str], cli: Cli, method: dict[str, Any], tmp_path: Path
) -> None:
    """Found while the basis is made, so a run's folder is there already: it is taken back, and the name is free."""
    toml = write_toml(tmp_path / "rank.toml", set_all(tiny_config, method=method))
    for verb in ("check", "run"):
        said = cli(verb, toml)
        assert said.code == 1
        wanted = f"rank x blocks = {method['rank'] * method.get('blocks', 1)} is above min(m, n) in 12 of 12 layers"
        assert wanted in said.err and "Choose at most 32" in said.err
    assert not (tmp_path / "runs" / "tiny").exists()
    assert cli("run", toml, "--set", "method.rank=4").code == 0


def test_an_unknown_target_module(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    said = refused(tiny_config, "--set", 'model.target_modules=["querry"]')
    assert "no linear layer is called 'querry'" in said
    assert "attention.self.key, attention.self.query, attention.self.value" in said
    said = refused(tiny_config, "--set", "model.target_modules=.*nothing")
    assert "matches no linear layer. There are: attention.output.dense" in said
    assert "is not a regular expression" in refused(tiny_config, "--set", "model.target_modules=[a-")


def test_an_unknown_key_and_an_unknown_method(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    said = refused(tiny_config, "--set", "train.lrr=1", "--set", "method.name=fedsb", "--set", "rouns=3")
    assert said.startswith("fedsb: 3 faults in the configuration:\n")
    for part in ("train.lrr: there is no such key; did you mean 'lr'?", "did you mean 'fed-sb'?", "'rounds'?"):
        assert part in said


def test_a_basis_that_looks_at_data_it_is_not_given(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    said = refused(set_all(tiny_config, basis={"kind": "update"}))
    assert "name a file of public rows with basis.data = PATH" in said


def test_min_clients_above_the_clients(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    said = refused(set_all(tiny_config, server={"min_clients": 4}))
    assert "server.min_clients = 4, but only 3 clients take part" in said


def test_no_network_for_a_hub_model(tiny_config: dict[str, Any], refused: Callable[..., str]) -> None:
    said = refused(tiny_config, "--set", "model.name=nobody/nothing")
    assert "Cannot load the model 'nobody/nothing'" in said
    assert "--set model.name=FOLDER" in said and "HF_HOME" in said and "HF_HUB_OFFLINE=1" in said


def test_no_network_for_a_hub_data_set(tiny_config: dict[str, Any], cli: Cli, tmp_path: Path) -> None:
    """`check` prices it without rows, and says in the run's words what is not here."""
    toml = write_toml(tmp_path / "far.toml", set_all(tiny_config, data={"train": "hub:nobody/nothing"}))
    ran, checked = cli("run", toml), cli("check", toml)
    assert (ran.code, checked.code) == (1, 0)
    for said in (ran.err, " ".join(checked.out.split())):
        assert "'hub:nobody/nothing' cannot be fetched from the Hub" in said
        assert "HF_HOME" in said and "HF_HUB_OFFLINE=1" in said and "--set data.train=PATH" in said
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize(
    ("message", "said", "check"),
    [
        ("Dataset 'me/rows' is a gated dataset", "Accept its terms at https://huggingface.co/datasets/me/rows", 0),
        ("Dataset 'me/rows' doesn't exist on the Hub.", "Check the name, or set HF_TOKEN (or: hf auth login)", 1),
    ],
)
def test_a_hub_data_set_that_is_gated_or_none(
    cli: Cli,
    tiny_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    said: str,
    check: int,
) -> None:
    """A gated one is priced without its rows."""
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(message)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    toml = write_toml(tmp_path / "far.toml", set_all(tiny_config, data={"train": "hub:me/rows"}))
    ran, checked = cli("run", toml), cli("check", toml)
    assert (ran.code, checked.code) == (1, check) and said in ran.err
    assert said in " ".join((checked.err or checked.out).split())


def test_a_model_folder_that_is_none(tiny_config: dict[str, Any], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused(tiny_config, "--set", f"model.name={tmp_path / 'empty'}")
    assert "is a folder without a model: it has no config.json. There are: no files. Put the model there" in said
    assert "is not an existing folder" in refused(tiny_config, "--set", f"model.name={tmp_path / 'none'}")
    assert "model.device = 'cuda:7' cannot be used here" in refused(tiny_config, "--set", "model.device=cuda:7")


def test_torn_weights(tiny_config: dict[str, Any], tiny_bert: Path, cli: Cli, tmp_path: Path) -> None:
    """A download that was cut off; `check` says so where there are weights, and prices a run without any."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "torn"))
    weights = folder / "model.safetensors"
    for content in (weights.read_bytes()[:1000], None):
        weights.unlink()
        if content is not None:
            weights.write_bytes(content)
        toml = write_toml(
            tmp_path / "torn.toml", set_all(tiny_config, model={"name": str(folder), "max_seq_length": 16})
        )
        assert cli("check", toml).code == (0 if content is None else 1)
        said = cli("run", toml)
        assert said.code == 1 and f"Cannot load the model '{folder}'" in said.err
        assert (
            "There are: config.json" in said.err and "If a file is missing or incomplete, fetch the model" in said.err
        )
        assert not (tmp_path / "runs" / "tiny").exists()


def test_prompts_that_fill_the_window_are_counted_and_shown(
    cli: Cli, tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"prompt": "red1 " * (60 if i < 3 else 1), "answer": "blue1", "client": i % 2} for i in range(20)]
    train = str(write_rows(tmp_path / "train.jsonl", rows))
    model = {"name": str(tiny_llama), "max_seq_length": 60}
    config = set_all(tiny_config, data={"train": train}, model=model, task={"kind": "instruction"})
    said = cli("check", write_toml(tmp_path / "full.toml", config), "--verbose")
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "data.cut 3 counted: rows longer than model.max_seq_length = 60, whose end is not read" in lines
    assert "data.unused 3 counted: of these, rows with nothing to learn within 60 tokens, left out" in lines


def test_without_an_address_of_the_hub_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set already stays, and so does the network where there is a proxy, or an address."""
    import os
    import socket

    from fedsb.models.hub import stay_offline_without_network

    asked: list[object] = []

    def nowhere(host: object, port: int) -> None:
        asked.append(host)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HF_HUB_OFFLINE", "0"), ("https_proxy", "http://here:1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            stay_offline_without_network()
            assert os.environ.get("HF_HUB_OFFLINE") == ("0" if name == "HF_HUB_OFFLINE" else None)
    assert asked == []
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda host, port: asked.append(host))
        stay_offline_without_network()
    assert asked == ["huggingface.co"] and "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that what is set now is taken back
    stay_offline_without_network()
    assert asked == ["huggingface.co", "mirror.example"] and os.environ["HF_HUB_OFFLINE"] == "1"


# --- a run that fails, and runs that exist ---


def test_a_loss_that_is_nan(cli: Cli, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """The error names client, round and step; completed rounds are kept."""
    train = {
        **tiny_config["train"],
        "optimizer": "sgd",
        "max_grad_norm": 0,
        "lr": 1e30,
        "schedule": "linear",
        "warmup": 0.5,
    }
    config = set_all(tiny_config, train=train, rounds=40, engine={"clients_per_forward": 1})
    folder = tmp_path / "runs" / "tiny"
    said = cli("run", write_toml(tmp_path / "nan.toml", config))
    assert said.code == 2
    assert "the loss of client 'site 0' became nan in round 1, local step 2. Lower train.lr" in said.err
    assert f"fedsb resume {folder}\n" in said.err and "Traceback" not in said.err
    assert (folder / "checkpoints" / "round-0000" / "state.safetensors").exists()


def test_a_loss_that_is_nan_later(
    cli: Cli, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second round; the first is kept, and the run resumes from it."""
    config = set_all(tiny_config, engine={"clients_per_forward": 1})
    whole = federate(load_config(set_all(config, out=str(tmp_path / "whole")))).folder
    gradients = JointTrainer._gradients
    calls: list[int] = []

    def poisoned(self: JointTrainer, *arguments: Any) -> Tensor:
        calls.append(1)
        loss_K = gradients(self, *arguments)
        return loss_K * math.nan if len(calls) == 9 + 3 + 2 else loss_K  # round 2, the second client, its second step

    folder = tmp_path / "runs" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(JointTrainer, "_gradients", poisoned)
        said = cli("run", write_toml(tmp_path / "nan.toml", config))
    assert said.code == 2
    assert "the loss of client 'site 1' became nan in round 2, local step 2" in said.err
    assert [row["round"] for row in read_rows(folder / "rounds.jsonl")] == [1]
    assert cli("resume", folder).code == 0
    assert adapter_bytes(folder) == adapter_bytes(whole)


@pytest.fixture
def done(tiny_config: dict[str, Any]) -> Path:
    return federate(load_config(tiny_config)).folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def test_a_torn_checkpoint(cli: Cli, done: Path) -> None:
    wanted = adapter_bytes(done)
    truncate(done / "checkpoints" / "round-0003" / "state.safetensors")
    said = cli("resume", done)
    assert said.code == 0
    assert "checkpoint round-0003 was skipped: its sha256 differs from the one it was written with" in said.out
    assert "round 3/3" in said.out and "round 2/3" not in said.out
    assert adapter_bytes(done) == wanted


def test_a_foreign_checkpoint(cli: Cli, done: Path, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """One that was copied from another run, of other settings, over this run's own and behind it."""
    other = federate(load_config(set_all(tiny_config, name="other", seed=9))).folder
    wanted = adapter_bytes(done)
    shutil.rmtree(done / "checkpoints" / "round-0003")
    shutil.copytree(other / "checkpoints" / "round-0003", done / "checkpoints" / "round-0003")
    shutil.copytree(other / "checkpoints" / "round-0003", done / "checkpoints" / "round-0012")
    said = cli("resume", done)
    assert said.code == 0, said.err
    assert said.out.count("was skipped: it is of the run") == 2
    assert adapter_bytes(done) == wanted
    assert (done / "checkpoints" / "round-0012").exists(), "what is not ours is not ours to delete"


def test_only_torn_checkpoints(cli: Cli, done: Path) -> None:
    for path in done.glob("checkpoints/*/state.safetensors"):
        truncate(path)
    before = sorted(done.rglob("*"))
    said = cli("resume", done)
    assert said.code == 2
    assert "can be used:\n  checkpoint round-0003 was skipped" in said.err and "checkpoint round-0002" in said.err
    assert sorted(done.rglob("*")) == before


def test_resume_with_a_changed_configuration(cli: Cli, done: Path, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    changed = write_toml(tmp_path / "changed.toml", set_all(tiny_config, rounds=9, method={"name": "fedit", "rank": 2}))
    wanted = [
        "method.blocks: 1 -> unset",
        "method.name: 'fed-sb' -> 'fedit'",
        "method.rank: 4 -> 2",
        "method.tied: False -> unset",
        "rounds: 3 -> 9",
    ]
    said = cli("resume", done, "--config", changed)
    assert said.code == 1 and said.err.splitlines()[1:] == [f"  {line}" for line in wanted]
    assert "was started with other settings. Resume it without them, or start a new run:" in said.err
    said = cli("resume", done, "--set", "train.lr=0.5")
    assert said.code == 1 and said.err.splitlines()[1:] == ["  train.lr: 0.02 -> 0.5"]
    assert cli("resume", done, "--config", write_toml(tmp_path / "same.toml", tiny_config)).code == 0


def test_resume_with_changed_data(cli: Cli, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    rows = rows_of(tiny_config["data"]["train"])
    train = write_rows(tmp_path / "train.jsonl", rows)
    folder = federate(load_config(set_all(tiny_config, data={"train": str(train)}))).folder
    before = adapter_bytes(folder)
    write_rows(train, rows[:-1])
    said = cli("resume", folder)
    assert said.code == 1
    assert "the train data of" in said.err and "(they were 90 rows of" in said.err
    assert adapter_bytes(folder) == before
    train.unlink()
    assert cli("resume", folder).code == 1


def test_what_is_no_run(cli: Cli, done: Path, tmp_path: Path) -> None:
    for verb in (["resume"], ["eval"], ["export", "--to", tmp_path / "copy"], ["report"]):
        said = cli(verb[0], done.parent / "tinny", *verb[1:])
        assert said.code == 1 and "run directory" in said.err and "Traceback" not in said.err
    assert f"did you mean '{done}'?" in cli("resume", done.parent / "tinny").err


def test_an_unwritable_place(cli: Cli, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = cli("run", write_toml(tmp_path / "tiny.toml", set_all(tiny_config, out=str(tmp_path / "file"))))
    assert said.code == 1 and "Choose another place: --set out=FOLDER" in said.err and "Traceback" not in said.err
    assert (tmp_path / "file").read_text() == "mine"
