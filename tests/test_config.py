"""A configuration is strict, reports every fault at once, and knows the origin of each of its values."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fedsb.config.load import load_config, parse_override, unused_settings
from fedsb.config.nested import difference, flatten, set_key
from fedsb.config.registry import method_types
from fedsb.config.renamed import KNOWN_ELSEWHERE, RENAMED
from fedsb.config.schema import Config
from fedsb.config.section import Section, UsedIf
from fedsb.data.rows import make_table
from fedsb.data.tasks import TASKS, open_task
from fedsb.data.tasks.base import TaskOptions
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
            {"train": {"local_steps": 5, "local_epochs": 1}},
            "train: local_steps and local_epochs are both set. Remove one",
        ),
        pytest.param(
            {"server": {"clients_per_round": 2, "min_clients": 3}},
            "server: min_clients = 3 is above clients_per_round = 2. Lower",
        ),
        pytest.param({"eval": {"gap": True}}, "eval.gap scores clients on held-out rows. Set clients.holdout_fraction"),
        pytest.param(
            {"model": {"compile": True}, "train": {"dropout": 0.1}},
            "model.compile = true with train.dropout would compile every step again. Set model",
        ),
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
    assert said in fault and not fault.startswith(":")


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
        (b"", "is empty. `fedsb init quickstart"),
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
    """Every kind of task opens and encodes its rows. The settings that it never read are those without effect."""
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
        options.read.discard("metric")  # read by every task, and refused if it is not "auto"
    if len(TASKS[kind].scorings) == 1:
        options.read.discard("score")  # likewise
    if kind == "code":
        options.read.add("run_code")  # also where only a loss is scored: a site's rules read it
    if score == "options":
        options.read.discard("new_tokens")  # it is written into the question, and nothing is generated
    if kind != "classification":
        options.read.discard("names")  # copied by every task, of use where there are classes
    assert options.read & unused == set(), "an option that is read is said to have no effect"
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
        ({"method": {"name": "central"}}, "basis.kind", None),
        ({"method": {"name": "central", "adapter": "factors"}}, "basis.kind", "central has no basis"),
        ({}, "basis.samples", "basis.kind is weights"),
        ({"basis": {"kind": "core"}}, "basis.samples", None),
        ({"basis": {"kind": "core", "outer": "random"}}, "basis.side", "B and A are not singular vectors of W0 here"),
        ({"basis": {"kind": "core"}}, "basis.side", None),
        ({"basis": {"kind": "core"}}, "basis.eta", "R starts at zero"),
        ({"basis": {"kind": "update"}}, "basis.eta", None),
        ({"basis": {"share_samples": 0}}, "basis.budget_mib", "no gradients of whole weights are computed"),
        ({}, "basis.budget_mib", None),
        ({"method": {"name": "local"}}, "server.codec", "local sends nothing"),
        ({"method": {"name": "local"}, "basis": {"kind": "core"}}, "server.codec", None),
        (
            {"method": {"name": "local"}, "server": {"optimizer": "adam"}},
            "server.optimizer",
            "local aggregates nothing",
        ),
        ({"method": {"name": "central"}}, "method.alpha", "method.adapter is core"),
        ({"method": {"name": "central", "adapter": "factors"}}, "method.blocks", "method.adapter is factors"),
        ({"method": {"name": "hetlora", "gamma": 1.0}}, "method.penalty_weight", "method.gamma is 1"),
        ({"method": {"name": "hetlora"}}, "method.penalty_weight", None),
        ({"server": {"secure_aggregation": True}}, "server.max_norm_ratio", "server.secure_aggregation is true"),
        ({"privacy": {"unit": "client", "epsilon": 3}}, "server.max_norm_ratio", "privacy.unit is client"),
        ({"server": {"optimizer": "momentum"}}, "server.tau", "server.optimizer is momentum"),
        (
            {"privacy": {"unit": "example", "epsilon": 3}},
            "train.max_grad_norm",
            "privacy.clip_norm bounds each row's g",
        ),
        ({"train": {"optimizer": "sgd"}}, "train.persist_optimizer_state", "SGD without momentum has no state"),
        ({"task": {"kind": "text"}}, "train.head_lr", "task.kind is text"),
        ({"task": {"kind": "text"}}, "task.score", "task.kind is text"),
        ({"task": {"kind": "chat"}}, "model.template_date", None),
        ({}, "model.template_date", "task.kind is classification"),
        ({"data": {"train": "a.csv"}}, "data.train_split", "data.train is not a data set of the Hub"),
        ({"data": {"train": "hub:a/b"}}, "data.revision", None),
        ({"data": {"train": "a.csv"}}, "data.test_rows", "data.test is not set"),
        ({"compare": {"trials": 0}}, "compare.validation_fraction", "compare.trials is 0"),
        ({"train": {"optimizer": "adamw"}}, "train.momentum", "train.optimizer is adamw"),
        ({"server": {"optimizer": "adam"}}, "server.tau", None),
        ({}, "server.tau", "server.optimizer is none"),
        ({}, "server.secagg_clip", "server.secure_aggregation is false"),
        ({}, "privacy.clip_norm", "privacy.unit is none"),
        ({"privacy": {"unit": "example", "epsilon": 3}}, "privacy.clip_norm", None),
        ({}, "engine.deadline_s", "engine.name is in_process"),
        ({"engine": {"name": "flower"}}, "engine.clients_per_forward", "engine.name is flower"),
        ({"task": {"kind": "code", "run_code": True}}, "task.new_tokens", None),
        ({"task": {"kind": "code", "score": "loss"}}, "task.new_tokens", "no answers are written"),
        ({"task": {"kind": "text"}}, "task.pooling", "task.kind is text"),
        ({"basis": {"kind": "update", "data": "public.csv"}}, "data.delimiter", None),
        ({"basis": {"kind": "random", "data": "public.csv"}}, "data.delimiter", "no .csv or .tsv file is read here"),
    ],
)
def test_what_has_no_effect_with_other_settings(raw: dict[str, Any], key: str, why: str | None) -> None:
    found = unused_settings(load_config(raw).config).get(key)
    assert found == why if why is None else found is not None and found.startswith(why)


ALWAYS_USED = {  # settings that have an effect, or are refused, whatever the others are
    "": "name seed rounds out keep_checkpoints model task data clients method train server privacy engine eval compare",
    "model": "name dtype quantize device placement target_modules max_seq_length activation_checkpointing "
    "attn_implementation float32_matmul_precision",
    "task": "kind",
    "data": "train train_rows exclude classes validation_fraction",
    "clients": "partition min_rows holdout_fraction holdout_clients total_ranks memory_mib",
    "method": "rank blocks tied alpha adapter scalars gamma sweeps tolerance best_error personal",
    "basis": "kind refresh",
    "train": "local_steps local_epochs batch_size gradient_accumulation_steps optimizer lr weight_decay schedule "
    "warmup_ratio dropout",
    "server": "clients_per_round secure_aggregation",
    "privacy": "unit epsilon noise_multiplier",
    "engine": "name",
    "eval": "every batch_size gap",
    "compare": "methods grid contenders seeds trials target reference workers",
}


def sections() -> dict[str, list[type[Section]]]:
    """Every section of the schema; [method] has one for each method."""
    found: dict[str, list[type[Section]]] = {"": [Config], "method": list(method_types().values())}
    for name, field in Config.model_fields.items():
        if name != "method" and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = [field.annotation]
    return found


def test_every_setting_states_when_it_has_an_effect() -> None:
    """A new field needs `UsedIf` in its annotation, or a place in ALWAYS_USED."""
    found = sections()
    assert found.keys() == ALWAYS_USED.keys()
    for name, classes in found.items():
        fields = [item for cls in classes for item in cls.model_fields.items()]
        plain = {key for key, field in fields if not any(isinstance(each, UsedIf) for each in field.metadata)}
        assert plain == set(ALWAYS_USED[name].split()), name
        assert [key for key, field in fields if name and not field.description] == [], name


# --- renamed keys ---


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_works_with_a_notice(old: str) -> None:
    """Every renamed key leads to a setting that exists, in a file and with --set."""
    new = RENAMED[old]
    section, _, key = new.partition(".")
    field = Config.model_fields[section].annotation.model_fields[key]  # type: ignore[union-attr]
    value = {"clients.total_ranks": [2], "data.exclude": {"label": "x"}}.get(new, field.default)
    value = 3 if value is None else value
    by_file = load_config({section: {old.partition(".")[2]: value}})
    by_override = load_config({}, [f"{old}={json.dumps(value)}"]) if not isinstance(value, dict) else by_file
    for loaded in (by_file, by_override):
        assert getattr(getattr(loaded.config, section), key) == value
        assert key in loaded.given[section]
        (notice,) = loaded.notices
        assert f"{old} was renamed to {new}. The old name works in this version only" in notice
    assert old not in by_file.origin


def test_an_old_value_works_with_a_notice() -> None:
    for loaded in (load_config({"engine": {"name": "embedded"}}), load_config({}, ["engine.name=embedded"])):
        assert loaded.config.engine.name == "in_process"
        assert "embedded" in loaded.notices[0] and "in_process" in loaded.notices[0]


def test_an_old_and_a_new_key_are_one_fault() -> None:
    (fault,) = faults({"train": {"steps": 3, "local_steps": 4}})
    assert fault == "train.steps: it was renamed to train.local_steps, and both are set. Remove train.steps"
    (fault,) = faults({"compare": {"grid": {"train.steps": [3], "train.local_steps": [4]}}})
    assert "train.steps: it was renamed to train.local_steps, and both are set" in fault


def test_old_keys_are_renamed_in_a_comparison() -> None:
    contenders = [{"name": "a", "set": {"privacy.clip": 1.0}}]
    loaded = load_config({"compare": {"grid": {"train.steps": [3]}, "contenders": contenders}})
    assert loaded.config.compare.grid == {"train.local_steps": [3]}
    assert loaded.config.compare.contenders[0].set == {"privacy.clip_norm": 1.0}
    assert len(loaded.notices) == 2


def test_the_settings_of_a_run_of_the_last_version_are_read() -> None:
    old = {"method": {"name": "fedit", "rank": 3, "alpha": None}, "train": {"steps": 4, "clip_norm": 0.5}}
    config = load_config(old | {"engine": {"name": "embedded", "cohort_size": "auto"}}).config
    assert (config.method.rank, config.train.local_steps, config.train.max_grad_norm) == (3, 4, 0.5)


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
    """`python docs/settings.py` writes it."""
    path = Path(__file__).parents[1] / "docs" / "settings.py"
    spec = importlib.util.spec_from_file_location("settings_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert path.with_suffix(".md").read_text() == module.reference()
