"""A configuration is strict, says every fault at once, and knows where each of its values comes from."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fedsb.config.load import (
    KNOWN_ELSEWHERE,
    difference,
    flatten,
    load_config,
    parse_override,
    set_key,
    unused_settings,
)
from fedsb.data.rows import make_table
from fedsb.data.tasks import TASKS, TaskOptions, open_task
from fedsb.utils.errors import ConfigError, UserError


def faults(raw: dict[str, Any], overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(raw, overrides or [])
    return list(caught.value.faults)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        pytest.param({"trian": {}}, "trian: there is no such key; did you mean 'train'? There are:", id="top"),
        pytest.param({"train": {"lrr": 1}}, "train.lrr: there is no such key; did you mean 'lr'?", id="key"),
        pytest.param({"train": {"strategy": 1}}, "train.strategy: there is no such key", id="key like a type's name"),
        pytest.param({"strategy": 1}, "strategy: there is no such key", id="top key like a type's name"),
        pytest.param({"lr": 0.1}, "lr: there is no such key; did you mean train.lr or server.lr?", id="wrong place"),
        pytest.param({"method": {"name": "fed_sb"}}, "method.name: unknown method 'fed_sb'; did you mean 'fed-sb'?"),
        pytest.param({"method": {"name": "lora"}}, "unknown method 'lora'; did you mean 'fedit'"),
        pytest.param({"method": {"name": "FedAvg"}}, "unknown method 'FedAvg'; did you mean 'fedit'"),
        pytest.param({"method": {"name": "lora_sb"}}, "unknown method 'lora_sb'; did you mean 'fed-sb'"),
        pytest.param(
            {"train": {"learning_rate": ""}}, "train.learning_rate: there is no such key; did you mean train.lr?"
        ),
        pytest.param({"method": {"lora_alpha": 4, "name": "fedit"}}, "fedit has no such option; did you mean 'alpha'?"),
        pytest.param({"method": {"r": 4}}, "method.r: fed-sb has no such option; did you mean 'rank'?"),
        pytest.param({"num_rounds": 4}, "num_rounds: there is no such key; did you mean rounds?"),
        pytest.param({"name": float("nan")}, """Write it in quotes: name = "nan" in a TOML, --set 'name="nan"'"""),
        pytest.param({"model": {"name": 7}}, """Write it in quotes: model.name = "7" in a TOML"""),
        pytest.param({"data": {"train": True}}, """Write it in quotes: data.train = "true" in a TOML"""),
        pytest.param({"method": {"name": 3}}, "method.name: it must be a valid string (it is 3)"),
        pytest.param({"method": "fedit"}, "method: it must be a section, [method] with keys below it (it is 'fedit')"),
        pytest.param({"method": {"rnk": 4}}, "method.rnk: fed-sb has no such option; did you mean 'rank'?"),
        pytest.param({"method": {"alpha": 4}}, "method.alpha: fed-sb has no such option; there are: blocks, rank"),
        pytest.param({"method": {"rank": 0}}, "method.rank: it must be greater than or equal to 1 (it is 0)"),
        pytest.param({"method": {"rank": True}}, "method.rank: it must be a valid integer (it is True)"),
        pytest.param({"method": {"rank": "4"}}, "method.rank: it must be a valid integer (it is '4')"),
        pytest.param({"method": {"name": "fedit", "alpha": "6"}}, "method.alpha: it must be a valid number"),
        pytest.param({"method": {"name": "fedit", "alpha": 0}}, "method.alpha: it must be greater than 0 (it is 0)"),
        pytest.param({"model": {"dtype": "fp16"}}, "model.dtype: it must be 'auto', 'float32'"),
        pytest.param({"basis": {"eta": -1}}, "basis.eta: it must be greater than 0 or 'auto' (it is -1)"),
        pytest.param({"engine": {"clients_per_forward": 0}}, "it must be greater than or equal to 1 or 'auto'"),
        pytest.param({"clients": {"sizes": [1, -1]}}, "clients.sizes: it must be greater than 0 (it is -1)"),
        pytest.param({"train": {"lr": float("nan")}}, "train.lr: it must be"),
        pytest.param(
            {"train": {"local_steps": 5, "local_epochs": 1}}, "train: set local_steps or local_epochs, not both; --set"
        ),
        pytest.param({"server": {"clients_per_round": 2, "min_clients": 3}}, "server: min_clients = 3 of 2"),
        pytest.param({"rounds": 0}, "rounds: it must be greater than or equal to 1 (it is 0)"),
        pytest.param({"name": "../x"}, "name: it must begin with a letter or digit and contain only letters, digits"),
        pytest.param({"model": {"template_date": "31.1.2026"}}, "model.template_date: it must be a date such as 2026"),
        pytest.param(
            {"train": {"rounds": 3}},
            "train.rounds: there is no such key; did you mean rounds at the top of the file, before the first [section",
        ),
    ],
)
def test_a_fault_names_its_key(raw: dict[str, Any], said: str) -> None:
    (fault,) = faults(raw)
    assert said in fault


def test_names_of_other_libraries_lead_to_settings_that_exist() -> None:
    settings = {key for key, _ in flatten(load_config({}).config.model_dump())}
    assert set(KNOWN_ELSEWHERE.values()) <= settings | {"method.alpha"}  # of the methods on LoRA's factors
    assert not {key for key in KNOWN_ELSEWHERE if key in settings}


def test_all_faults_come_at_once() -> None:
    found = faults(
        {"rounds": "ten", "trian": {}, "train": {"lr": 0}, "method": {"name": "fedsb"}},
        ["nothing", "rounds.x=1", "data.tset=a.csv"],
    )
    assert len(found) == 7
    for key in ("nothing", "rounds.x", "rounds:", "trian", "train.lr", "method.name", "data.tset"):
        assert any(key in fault for fault in found), key
    with pytest.raises(ConfigError, match=r"^7 faults in the configuration:\n  - "):
        raise ConfigError(found)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.lr=0.01", ("train.lr", 0.01)),
        ("rounds = 3", ("rounds", 3)),
        ("train.persist_optimizer_state=true", ("train.persist_optimizer_state", True)),
        ('model.target_modules=["query", "value"]', ("model.target_modules", ["query", "value"])),
        ("data.train=a b.csv", ("data.train", "a b.csv")),
        ("data.train=x=y.csv", ("data.train", "x=y.csv")),
        ("data.test=none", ("data.test", None)),
        ("name=", ("name", "")),
    ],
)
def test_overrides(text: str, value: tuple[str, Any]) -> None:
    assert parse_override(text) == value


@pytest.mark.parametrize("text", ["train.lr", "=3", ""])
def test_an_override_without_a_key_or_a_value(text: str) -> None:
    with pytest.raises(UserError, match="write key=value"):
        parse_override(text)


def test_set_key_leaves_the_original_alone() -> None:
    raw = {"train": {"lr": 0.1}}
    assert set_key(raw, "train.local_steps", 3) == {"train": {"lr": 0.1, "local_steps": 3}}
    assert raw == {"train": {"lr": 0.1}}


def test_none_takes_a_setting_back() -> None:
    config = load_config({"train": {"local_steps": 10}}, ["train.local_steps=none", "train.local_epochs=2"]).config
    assert (config.train.local_steps, config.train.local_epochs) == (None, 2)


@pytest.mark.parametrize("key", ["data.quoting", "model.quantize", "server.optimizer", "privacy.unit"])
def test_none_is_text_where_it_is_one_of_the_choices(key: str) -> None:
    loaded = load_config({}, [f"{key}=none"])
    section, _, name = key.partition(".")
    assert getattr(getattr(loaded.config, section), name) == "none"
    assert loaded.given[section][name] == "none"


def test_each_value_knows_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("rounds = 4\n[train]\nlr = 0.5\n[method]\nrank = 4\n")
    loaded = load_config(path, ["train.lr=0.25"])
    choices = {choice.key: (choice.value, choice.reason) for choice in loaded.choices()}
    assert choices["rounds"] == (4, "my.toml")
    assert choices["train.lr"] == (0.25, "--set train.lr")
    assert choices["method.rank"] == (4, "my.toml")
    assert choices["seed"] == (0, "default")


def test_a_configuration_survives_its_own_dump() -> None:
    loaded = load_config({"method": {"name": "fedit", "rank": 3, "alpha": 1.5}, "clients": {"sizes": [1, 2.5]}})
    assert load_config(loaded.config.model_dump(mode="json")).config == loaded.config


def test_difference() -> None:
    old = {"rounds": 3, "train": {"lr": 0.1, "local_steps": None}, "method": {"name": "fedit", "alpha": 2}}
    new = {"rounds": 3, "train": {"lr": 0.2, "local_steps": None}, "method": {"name": "fedit", "rank": 4}}
    assert difference(old, old) == []
    assert difference(old, new) == ["method.alpha: 2 -> unset", "method.rank: unset -> 4", "train.lr: 0.1 -> 0.2"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; `fedsb init quickstart"),
        (b"rounds = ", "is not valid TOML"),
        (b"name = '\xff'", "cannot read"),
    ],
)
def test_a_broken_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_config(path)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text("rounds = 1")
    with pytest.raises(UserError, match=r"there is no file .*qiuck.toml; did you mean 'quick.toml'\?"):
        load_config(tmp_path / "qiuck.toml")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xef\xbb\xbfrounds = 3\n")
    assert load_config(path).config.rounds == 3


ROWS: dict[str, list[dict[str, Any]]] = {  # of each task, as its tables are
    "classification": [{"text": "red1", "other": "blue1", "label": label} for label in ("a", "b")],
    "regression": [{"text": "red1", "other": "blue1", "label": label} for label in (0.5, 1.5)],
    "text": [{"text": "red1 blue1"}],
    "instruction": [{"prompt": "red1", "answer": "blue1"}],
    "chat": [{"messages": [{"role": "user", "content": "red1"}, {"role": "assistant", "content": "blue1"}]}],
    "arithmetic": [{"question": "red1", "answer": "blue1 #### 3"}],
    "commonsense": [{"instruction": "red1 Answer format: true/false", "answer": "true"}],
    "code": [
        {"prompt": "def f():", "canonical_solution": "    return 1", "test": "def check(f): f()", "entry_point": "f"}
    ],
}


class Recorded:
    """Task options that remember which of them were read."""

    def __init__(self, options: TaskOptions) -> None:
        self._options, self.read = options, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._options, name)


@pytest.mark.parametrize("score", ["auto", "loss", "options"])
@pytest.mark.parametrize("kind", TASKS)
def test_a_tasks_settings_have_an_effect_where_the_task_reads_them(kind: str, score: str, tiny_llama: Path) -> None:
    """Every kind of task opens and encodes its rows; the settings that it never read are those that are named
    unused_settings."""
    from transformers import AutoTokenizer

    if score != "auto" and score not in TASKS[kind].scorings:
        pytest.skip("a task without this score")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    options = Recorded(TaskOptions(text_pair="other", score=score, run_code=True))  # type: ignore[arg-type]
    task = open_task(kind, tokenizer=tokenizer, options=options, max_tokens=32)  # type: ignore[arg-type]
    rows = ROWS[kind]
    task.columns_of(make_table(rows, "here"))
    if task.problem_type is not None or kind == "classification":
        task.fit_labels(rows, rows)
    task.encode(rows)
    task.encode_test(rows)
    config = load_config({"task": {"kind": kind, "score": score, "run_code": kind == "code"}}).config
    unused = {key.removeprefix("task.") for key in unused_settings(config) if key.startswith("task.")}
    everything = {field.name for field in dataclasses.fields(TaskOptions)}
    if not TASKS[kind].metrics:
        everything -= {"metric"}  # any but "auto" is refused
    if kind == "code":
        options.read.add("run_code")  # also where only a loss is scored: a site's rules read it
    if score == "options":
        options.read.discard("new_tokens")  # it is written into the question, and nothing is generated
    if kind != "classification":
        options.read.discard("names")  # copied by every task, of use where there are classes
    assert options.read & unused == set(), "an option that is read is called unused_settings"
    assert everything - options.read == unused


@pytest.mark.parametrize(
    ("raw", "key", "why"),
    [
        ({"clients": {"partition": "iid"}}, "clients.dirichlet_alpha", "clients.partition is iid"),
        ({"clients": {"partition": "dirichlet"}}, "clients.dirichlet_alpha", None),
        ({"clients": {"partition": "column"}}, "clients.count", "the column says how many clients there are"),
        ({"data": {"validation_fraction": 0.1}}, "data.test", "data.validation_fraction takes training rows"),
        ({"basis": {"kind": "random"}}, "basis.outer", "basis.kind is random"),
        ({"basis": {"kind": "core"}}, "basis.outer", None),
        ({"method": {"name": "fedit"}}, "basis.kind", "fedit has no basis"),
        ({"method": {"name": "fedit"}}, "basis.samples", "fedit has no basis"),
        ({"method": {"name": "central"}}, "server.codec", "all data are in one place, nothing travels"),
        ({"method": {"name": "central"}}, "basis.samples", None),
        ({"train": {"optimizer": "adamw"}}, "train.momentum", "train.optimizer is adamw"),
        ({"server": {"optimizer": "adam"}}, "server.tau", None),
        ({}, "server.tau", "server.optimizer is none"),
        ({}, "server.secagg_clip", "server.secure_aggregation is false"),
        ({}, "privacy.clip", "privacy.unit is none"),
        ({"privacy": {"unit": "example", "epsilon": 3}}, "privacy.clip", None),
        ({}, "engine.deadline_s", "engine.name is in_process"),
        ({"engine": {"name": "flower"}}, "engine.clients_per_forward", "engine.name is flower"),
        ({"task": {"kind": "code", "run_code": True}}, "task.new_tokens", None),
        ({"task": {"kind": "code", "score": "loss"}}, "task.new_tokens", "no answers are written"),
        ({"task": {"kind": "text"}}, "task.pooling", "task.kind is text"),
        ({"basis": {"kind": "update", "data": "public.csv"}}, "data.delimiter", None),
        ({"basis": {"kind": "random", "data": "public.csv"}}, "data.delimiter", "no .csv or .tsv file is read here"),
    ],
)
def test_what_has_no_effect_beside_other_settings(raw: dict[str, Any], key: str, why: str | None) -> None:
    assert unused_settings(load_config(raw).config).get(key) == why


def test_a_setting_without_effect_is_shown_as_such() -> None:
    choices = {choice.key: choice.reason for choice in load_config({"server": {"tau": 0.1}}).choices()}
    assert choices["server.tau"] == "dict; has no effect: server.optimizer is none"
    assert choices["server.lr"] == "default"


# --- the reference of all settings ---


def test_every_setting_is_described() -> None:
    from fedsb.cli.listing import settings

    rows = settings()
    assert len(rows) > 90 and len({row["setting"] for row in rows}) == len(rows)
    assert [row["setting"] for row in rows if not row["what"]] == []


def test_the_reference_in_the_docs_is_that_of_the_code() -> None:
    """`python docs/settings.py` writes it anew."""
    path = Path(__file__).parents[1] / "docs" / "settings.py"
    spec = importlib.util.spec_from_file_location("settings_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert path.with_suffix(".md").read_text() == module.reference()
