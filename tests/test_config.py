"""A configuration is strict, says every fault at once, and knows where each of its values comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsb.config import difference, load_config, parse_override, set_key
from fedsb.errors import ConfigError, UserError


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
        pytest.param({"engine": {"cohort_size": 0}}, "it must be greater than or equal to 1 or 'auto'"),
        pytest.param({"clients": {"sizes": [1, -1]}}, "clients.sizes: it must be greater than 0 (it is -1)"),
        pytest.param({"train": {"lr": float("nan")}}, "train.lr: it must be"),
        pytest.param({"train": {"steps": 5, "epochs": 1}}, "train: set steps or epochs, not both; --set"),
        pytest.param({"server": {"clients_per_round": 2, "min_clients": 3}}, "server: min_clients = 3 of 2"),
        pytest.param({"rounds": 0}, "rounds: it must be greater than or equal to 1 (it is 0)"),
        pytest.param({"name": "../x"}, "name: it must match pattern"),
    ],
)
def test_a_fault_names_its_key(raw: dict[str, Any], said: str) -> None:
    (fault,) = faults(raw)
    assert said in fault


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
        ("train.keep_optimizer=true", ("train.keep_optimizer", True)),
        ('model.targets=["query", "value"]', ("model.targets", ["query", "value"])),
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
    assert set_key(raw, "train.steps", 3) == {"train": {"lr": 0.1, "steps": 3}}
    assert raw == {"train": {"lr": 0.1}}


def test_none_takes_a_setting_back() -> None:
    config = load_config({"train": {"steps": 10}}, ["train.steps=none", "train.epochs=2"]).config
    assert (config.train.steps, config.train.epochs) == (None, 2)


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
    old = {"rounds": 3, "train": {"lr": 0.1, "steps": None}, "method": {"name": "fedit", "alpha": 2}}
    new = {"rounds": 3, "train": {"lr": 0.2, "steps": None}, "method": {"name": "fedit", "rank": 4}}
    assert difference(old, old) == []
    assert difference(old, new) == ["method.alpha: 2 -> unset", "method.rank: unset -> 4", "train.lr: 0.1 -> 0.2"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; `fedsb init quickstart"),
        (b"rounds = ", "is no TOML"),
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
