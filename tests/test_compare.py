"""`fedsb compare`: its arithmetic by hand, what it refuses, and one small comparison, cut off and taken up again."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, set_all, tiny_settings, write_rows, write_toml
from fedsb.comparison import cells, figures
from fedsb.comparison import compare as story
from fedsb.comparison.cells import Cell, CellError, Outcome, Results, make_cell, run_cell, to_toml
from fedsb.comparison.compare import compare, final, plan_of, trial
from fedsb.comparison.contenders import contenders_of
from fedsb.comparison.figures import bytes_to_target, curve, paired, pareto_front, spread
from fedsb.comparison.search import at_boundary, best_rate, next_rate, start_rate
from fedsb.comparison.spent import epsilon_together
from fedsb.comparison.table import difference_text, spread_text
from fedsb.config.load import load_config
from fedsb.data.clients import open_data
from fedsb.methods.fed_sb import FedSB
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.ledger import Ledger, read_ledger
from fedsb.utils.errors import ConfigError, RunError, UserError

Cli = Callable[..., Said]


# --- the search ---


def searched(score: Callable[[float], float | None], start: float, trials: int, *, higher: bool = True) -> list[float]:
    """The rates that a search tries, in order."""
    tried: dict[float, float | None] = {}
    for _ in range(trials):
        lr = next_rate(tried, start, higher)
        assert lr not in tried
        tried[lr] = score(lr)
    return list(tried)


def peak(at: float) -> Callable[[float], float]:
    """A score that falls with the distance to `at`, in octaves."""
    return lambda lr: -abs(math.log2(lr / at))


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        pytest.param(0.01, [0.01, 0.02, 0.005, 0.007071, 0.01414], id="there"),
        pytest.param(0.04, [0.01, 0.02, 0.04, 0.08, 0.02828], id="above"),
        pytest.param(0.0025, [0.01, 0.02, 0.005, 0.0025, 0.00125], id="below"),
        pytest.param(0.015, [0.01, 0.02, 0.04, 0.01414, 0.01682], id="between"),
        pytest.param(10, [0.01, 0.02, 0.04, 0.08, 0.16], id="far above"),
    ],
)
def test_the_search_climbs_and_then_refines(best: float, rates: list[float]) -> None:
    assert searched(peak(best), 0.01, 5) == rates
    assert searched(lambda lr: -peak(best)(lr), 0.01, 5, higher=False) == rates


def test_a_rate_that_breaks_is_the_worst() -> None:
    assert searched(lambda lr: None if lr > 0.003 else peak(0.002)(lr), 0.01, 5) == [
        0.01,
        0.005,
        0.0025,
        0.00125,
        0.001768,
    ]
    assert searched(lambda lr: None, 0.01, 3) == [0.01, 0.005, 0.0025]
    assert best_rate({0.01: None, 0.005: -3.0, 0.02: -3.0}, True) == 0.005, "of equals, the first"
    assert best_rate({0.01: None, 0.005: None}, True) == 0.005
    assert best_rate({0.01: 2.5, 0.02: 2.75}, False) == 0.01


def test_a_best_rate_at_boundary() -> None:
    assert at_boundary({0.01: 1.0, 0.02: 2.0}, 0.02)
    assert not at_boundary({0.01: 1.0, 0.02: 2.0, 0.04: None}, 0.02)


def test_where_the_search_starts() -> None:
    assert start_rate("core", 0.04, None) == 0.04
    assert start_rate("factors", 0.04, None) == 0.005
    assert start_rate("factors", 0.04, 0.3) == 0.3


# --- the figures ---


def test_the_front() -> None:
    points = {"a": (10.0, 0.5), "b": (20.0, 0.7), "c": (20.0, 0.6), "d": (30.0, 0.7), "e": (40.0, 0.9), "f": (5.0, 0.1)}
    assert pareto_front(points, True) == ["f", "a", "b", "e"]
    assert pareto_front(points, False) == ["f"]
    assert pareto_front({"a": (1.0, 0.5), "b": (1.0, 0.5)}, True) == ["a", "b"], "equals do not beat each other"
    assert pareto_front({}, True) == []


def test_differences_are_taken_seed_by_seed() -> None:
    mine, theirs = {0: 0.5, 1: 0.75, 2: 1.0}, {0: 0.25, 1: 1.0, 3: 0.5}
    assert paired(mine, theirs, True) == {
        "mean": 0.0,
        "sd": pytest.approx(0.125**0.5),
        "wins": 1,
        "of": 2,
        "by_seed": {0: 0.25, 1: -0.25},
    }
    assert (paired(mine, theirs, False) or {})["wins"] == 1
    assert paired(mine, {7: 0.5}, True) is None
    assert spread([2.0]) == {"mean": 2.0, "sd": None}
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0}


def kept_cell(scores: list[float | None], one_off: int = 100) -> Outcome:
    """What is kept of a run that sends 10 bytes a round."""
    return {
        "scores_by_round": scores,
        "bytes_by_round": [10] * len(scores),
        "bytes": {"federation": {"with_head": {"one_off": one_off}}},
    }


def test_bytes_to_a_target() -> None:
    cell = kept_cell([0.2, None, 0.6, 0.5])
    assert bytes_to_target(cell, 0.5, True) == 130, "the first round at the target counts, the one-off bytes too"
    assert bytes_to_target(cell, 0.7, True) is None
    assert bytes_to_target(cell, 0.2, False) == 110
    assert curve([cell, kept_cell([0.4, None, 0.8, 0.5], 120)]) == [[120, pytest.approx(0.3)], [140, 0.7], [150, 0.5]]


def test_texts() -> None:
    glued = spread_text("accuracy", {"mean": 0.929, "sd": 0.008})
    assert glued.replace("\N{NO-BREAK SPACE}", " ") == "92.9 ± 0.8 %"
    assert difference_text("accuracy", {"mean": -0.015, "sd": 0.02}).split("\N{NO-BREAK SPACE}") == [
        "−1.5",
        "±",
        "2.0",
        "points",
    ]
    assert difference_text("nats_per_token", {"mean": 0.0471, "sd": None}) == "+0.047"
    assert spread_text("accuracy", None) == "–"


# --- what is compared ---


def asked(config: dict[str, Any], **compare: Any) -> dict[str, Any]:
    return set_all(config, compare=compare)


def names(config: dict[str, Any]) -> list[str]:
    return [contender.name for contender in contenders_of(load_config(config))]


def test_methods_ranks_and_a_grid(tiny_config: dict[str, Any]) -> None:
    methods = {"methods": ["fed-sb", "fedit@4"], "ranks": [8, 32]}
    assert names(asked(tiny_config, **methods)) == ["fed-sb@8", "fed-sb@32", "fedit@4"]
    grid = {"basis": {"kind": ["random", "weights"]}}
    assert names(asked(tiny_config, methods=["fed-sb@8", "fedit"], grid=grid)) == [
        "fed-sb@8 basis.kind=random",
        "fed-sb@8 basis.kind=weights",
        "fedit",  # it has no basis: the grid does nothing to it
    ]
    both = {"basis.kind": ["random", "weights"], "basis.side": ["leading", "trailing"]}
    assert names(asked(tiny_config, methods=["fed-sb@8"], grid=both)) == [
        "fed-sb@8 basis.kind=random",  # no side
        "fed-sb@8 basis.kind=weights basis.side=leading",
        "fed-sb@8 basis.kind=weights basis.side=trailing",
    ]


def test_what_a_contender_is(tiny_config: dict[str, Any]) -> None:
    """One that names a method starts from that method's defaults; another keeps the configuration's own."""
    own = [
        {"name": "core", "set": {"basis": {"kind": "core"}}},
        {"name": "epochs", "set": {"train.local_epochs": 1, "train.local_steps": None}},
    ]
    config = asked(
        set_all(tiny_config, method={"name": "fed-sb", "rank": 4, "blocks": 2}),
        methods=["fed-sb", "fedit@2"],
        contenders=own,
    )
    fed_sb, fedit, core, epochs = contenders_of(load_config(config, ["train.lr=0.03"]))
    assert fed_sb.config.method == FedSB(rank=32, blocks=1)
    assert fedit.config.method.rank == 2
    assert core.config.method == FedSB(rank=4, blocks=2) and core.config.basis.kind == "core"
    assert epochs.config.train.local_epochs == 1 and epochs.config.train.lr == 0.03


@pytest.mark.parametrize(
    ("methods", "control", "options", "of"),
    [
        (["fed-sb@16", "central"], "central", {"adapter": "core", "rank": 16, "blocks": 1}, "fed-sb@16"),
        (["fedit@4", "fed-sb@16", "central"], "central", {"adapter": "factors", "rank": 4, "alpha": None}, "fedit@4"),
        (["fedit@4", "fed-sb@16", "local@16"], "local@16", {"adapter": "core", "rank": 16}, "fed-sb@16"),
        (["fedit@4", "central@8"], "central@8", {"adapter": "factors", "rank": 8}, "fedit@4"),
        (["ravan@8", "local"], "local", {"rank": 8, "blocks": 4, "scalars": True}, "ravan@8"),
        (["central"], "central", {"adapter": "core", "rank": 32, "blocks": 1}, None),
    ],
)
def test_a_control_has_the_adapter_of_a_method_beside_it(
    tiny_config: dict[str, Any], methods: list[str], control: str, options: dict[str, Any], of: str | None
) -> None:
    found = {each.name: each for each in contenders_of(load_config(asked(tiny_config, methods=methods)))}
    assert found[control].config.method.model_dump().items() >= options.items()
    assert found[control].control_of == of


def test_a_control_follows_the_grid_and_says_its_rank(
    tiny_config: dict[str, Any], fake: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    grid = {"method.rank": [4, 8]}
    found = contenders_of(load_config(asked(tiny_config, methods=["fed-sb", "central"], grid=grid)))
    assert [(each.name, each.method.total_rank, each.control_of) for each in found[2:]] == [
        ("central method.rank=4", 4, "fed-sb method.rank=4"),
        ("central method.rank=8", 8, "fed-sb method.rank=8"),
    ]
    own = [{"name": "all rows", "set": {"method.name": "central", "method.rank": 2}}]
    result = fake(lambda cell: 0.5, methods=["fedit@4", "central"], contenders=own, trials=0, seeds=1)
    assert [(row["contender"], row["rank"]) for row in result["contenders"]] == [
        ("fedit@4", 4),
        ("central", 4),
        ("all rows", 2),  # its own settings, whatever is beside it
    ]
    for name in ("table.md", "comparison.html"):
        assert (
            "central is a control that trains the adapter of fedit@4 (rank 4)" in (tmp_path / "out" / name).read_text()
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cell_is_kept_to_one_thread_on_a_cpu_only(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    started = {}

    async def start(*command: str, env: dict[str, str], **_: Any) -> Any:
        started.update(env)
        raise CellError("enough")

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cells, "choose_device", lambda wanted: (torch.device(device), "as asked"))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    with pytest.raises(CellError, match="enough"):
        asyncio.run(run_cell(make_cell("x", load_config(tiny_config).config.model_dump(mode="json")), tmp_path))
    assert started.get("OMP_NUM_THREADS") == ("1" if device == "cpu" else None)


def test_task_settings_that_count_stay_in_a_grid(tiny_config: dict[str, Any]) -> None:
    grid = {"task.new_tokens": [8, 16]}
    code = asked(set_all(tiny_config, task={"kind": "code", "run_code": True}), methods=["fedit"], grid=grid)
    assert names(code) == ["fedit task.new_tokens=8", "fedit task.new_tokens=16"]
    assert names(asked(tiny_config, methods=["fedit"], grid=grid)) == ["fedit"]


def test_a_run_knows_nothing_of_compare(tiny_config: dict[str, Any]) -> None:
    with_it, without = load_config(asked(tiny_config, methods=["fedit"])), load_config(tiny_config)
    assert with_it.config.model_dump() == without.config.model_dump()
    assert with_it.origin == without.origin and with_it.choices() == without.choices()


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ({}, "compare: no contenders. Name them with --methods fed-sb@8,fedit@1"),
        ({"method": ["a"]}, "compare.method: there is no such key; did you mean 'methods'?"),
        ({"seeds": 0}, "compare.seeds: it must be greater than or equal to 1 (it is 0)"),
        ({"contenders": [{"nam": "x"}]}, "contenders.0.nam: there is no such key; did you mean 'name'?"),
        ({"methods": ["fed_sb"]}, "'fed_sb': method.name: unknown method 'fed_sb'; did you mean 'fed-sb'?"),
        ({"methods": ["fed-sb@x"]}, "compare.methods: 'fed-sb@x' is not valid. Write name or name@rank"),
        ({"methods": ["fedit"], "ranks": [0]}, "compare.ranks: it must be greater than"),
        ({"methods": ["fedit@4", "fedit@4"]}, "compare: several contenders have the name 'fedit@4'"),
        ({"methods": ["fedit", "fedit@4"]}, "'fedit' and 'fedit@4' have the same settings. Leave one out"),
        (
            {"methods": ["fedit@4"], "reference": "fedit@1"},
            "no contender is named 'fedit@1'; did you mean 'fedit@4'?",
        ),
        ({"methods": ["fedit"], "grid": {"train.lrr": [1]}}, "contender 'fedit': train.lrr: there is no such key"),
        ({"methods": ["fedit"], "grid": {"train.lr": 1}}, "compare.grid: train.lr needs a list of values (it is 1)"),
        ({"methods": ["fedit"], "grid": {"seed": [1]}}, "contender 'fedit': seed cannot be set here"),
        ({"methods": ["fedit"], "grid": {"task.kind": ["text", "classification"]}}, "scores of different tasks"),
    ],
)
def test_bad_input(tiny_config: dict[str, Any], compare: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        contenders_of(load_config(asked(tiny_config, **compare)))
    assert any(said in fault for fault in caught.value.faults), caught.value.faults


def test_all_faults_come_before_any_cell(cli: Cli, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "bad.toml", tiny_config)
    got = cli("compare", toml, "--methods", "fed_sb, fedit@0,flora@2,nothing", "--out", tmp_path / "out")
    assert got.code == 1 and "3 faults in the configuration:" in got.err, got
    for part in ("did you mean 'fed-sb'?", "'fedit@0' is not valid. Write name", "'nothing': method.name: unknown"):
        assert part in got.err
    assert not (tmp_path / "out").exists()


def test_nothing_to_score(tiny_config: dict[str, Any]) -> None:
    bare = set_all(tiny_config, data={"train": "x.jsonl"}, clients={"partition": "iid"})
    with pytest.raises(ConfigError, match=r"no rows to score. Set data.test or clients.holdout_fraction"):
        contenders_of(load_config(asked(bare, methods=["fedit"])))
    with pytest.raises(ConfigError, match=r"no training data. Set data.train"):
        contenders_of(load_config(asked(set_all(bare, data={}), methods=["fedit"])))


# --- the rows that are tuned on ---


def test_tuning_rows_are_training_rows_that_are_not_trained_on(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_config["model"]["name"])
    rows = [
        {"text": f"red{i % 12} {' '.join(['blue1'] * (i // 12))}", "label": "ab"[i % 2], "client": "xy"[i % 3 % 2]}
        for i in range(120)
    ]
    data = {"train": str(write_rows(tmp_path / "train.jsonl", rows)), "test": "there is no such file"}
    config = set_all(tiny_config, data={**data, "validation_fraction": 0.25})
    tuned = open_data(load_config(config).config, tokenizer)
    whole = open_data(load_config(set_all(config, data={"train": data["train"]})).config, tokenizer)
    assert tuned.test_description == "0.25 of the training rows of all participants, which are not trained on"
    assert list(tuned.tables) == ["train"], "the test rows are not even read"
    scored = {str(example) for example in tuned.test}
    for site, same in zip(tuned.clients, whole.clients, strict=True):
        trained, all_of_it = ({str(example) for example in each.train} for each in (site, same))
        assert trained < all_of_it and not trained & scored
        assert all_of_it - trained <= scored
        assert len(site.train) == len(same.train) - round(0.25 * len(same.train))
        assert site.held_out == same.held_out, "what is held out is drawn apart"
    with pytest.raises(UserError, match=r"data.validation_fraction = 0.001 sets aside none of the 120 rows. Raise it"):
        open_data(load_config(set_all(config, data={**data, "validation_fraction": 0.001})).config, tokenizer)


# --- cells ---


def test_a_trial_and_a_final_run(tiny_config: dict[str, Any]) -> None:
    loaded = load_config(asked(set_all(tiny_config, rounds=5), methods=["fed-sb@8"]))
    (contender,) = contenders_of(loaded)
    tuning, run = trial(contender, 0.5, 0.1).settings, final(contender, 0.25, 2).settings
    assert (tuning["seed"], tuning["train.lr"], tuning["data.validation_fraction"], tuning["eval.every"]) == (
        0,
        0.5,
        0.1,
        5,
    )
    assert (run["seed"], run["train.lr"], run["data.validation_fraction"], run["eval.every"]) == (2, 0.25, 0.0, 1)
    assert "name" not in run and "out" not in run


def test_a_cells_settings_survive_the_toml(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(
        set_all(tiny_config, clients={"partition": "size", "sizes": [1, 2.5]}), ['task.text=a "b"\\']
    ).config
    cell = make_cell("x", config.model_dump(mode="json"))
    path = tmp_path / "cell.toml"
    path.write_text(to_toml({**cell.settings, "name": config.name, "out": config.out}))
    assert load_config(path).config == config
    path.write_text(to_toml({"compare.grid": {"a.b": [1, "x"]}, "compare.target": 1e-7}))
    assert load_config(path).config.compare.grid == {"a.b": [1, "x"]}


def test_a_cell_is_known_by_its_settings_and_its_data(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    def key(folder: str, rows: str, **settings: Any) -> str:
        path = tmp_path / folder / "train.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(rows)
        config = load_config(set_all(tiny_config, data={"train": str(path)}, **settings)).config
        cell = make_cell("any", config.model_dump(mode="json"))
        assert cell.portable["data.train"] == "train.jsonl" and cell.portable["model.name"].startswith("tiny-bert")
        return cell.key

    assert key("here", "rows") == key("there", "rows") == key("here", "rows", name="other", out="elsewhere")
    others = [key("there", "swor"), key("here", "rows", seed=1), key("here", "rows", rounds=4)]
    assert len({key("here", "rows"), *others}) == 4


def test_the_kept_cells(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    settings = load_config(tiny_config).config.model_dump(mode="json")
    one, two = make_cell("a seed 0", settings), make_cell("a seed 0", {**settings, "rounds": 2})
    kept = {"name": "a seed 0", "score": 0.5, "settings": one.portable, "content": one.content}
    with Results.open(tmp_path) as results:
        assert results.get(one) is None
        results.add(one, kept)
        with pytest.raises(UserError, match="is in use by a different fedsb process"), Results.open(tmp_path):
            pass
    with Results.open(tmp_path) as results:
        assert results.get(one) == kept
        assert results.get(two) is None and results.stale(two) == results.get(one) and results.stale(one) is None
    del kept["settings"]["eval.batch_size"]  # as if it were new since: it was what is now the default
    (tmp_path / "cells.json").write_text(json.dumps({"cells": {"any": kept}}))
    with Results.open(tmp_path) as results:
        assert results.get(one) == kept
        assert results.get(make_cell("a seed 0", {**settings, "eval": {"every": 1, "batch_size": 8}})) is None
    kept["settings"]["eval.gone"] = 1
    (tmp_path / "cells.json").write_text(json.dumps({"cells": {"any": kept}}))
    with Results.open(tmp_path) as results:
        assert results.get(one) is None and results.stale(one) == kept
    (tmp_path / "cells.json").write_text("{")
    with pytest.raises(UserError, match=r"is not a valid cells\.json"), Results.open(tmp_path):
        pass


def test_a_loss_that_is_not_finite_is_a_score(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """The real thing: a run that is driven to NaN, in its own process."""
    config = load_config(set_all(tiny_config, rounds=1), ["train.lr=1e38", "method.name=fedit"]).config
    outcome = asyncio.run(run_cell(make_cell("nan", config.model_dump(mode="json")), tmp_path / "ledgers"))
    assert outcome["score"] is None and "became nan in round 1" in outcome["diverged"]


def test_a_cell_that_fails_says_why(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(set_all(tiny_config, method={"name": "fed-sb", "rank": 33})).config
    with pytest.raises(CellError, match=r"^rank x blocks = 33 is above min\(m, n\) in 12 of 12 layers.*at most 32"):
        asyncio.run(run_cell(make_cell("rank", config.model_dump(mode="json")), tmp_path / "ledgers"))


# --- a comparison, its cells made up ---


def made_up(scores: Callable[[Cell], float | None], rows: int | None = None) -> Callable[[Cell, Path, int], Any]:
    async def run(cell: Cell, ledgers: Path, slot: int) -> Outcome:
        score = scores(cell)
        sizes = {"one_off": 0, "up": 500, "down": 500, "total": 1000 * cell.settings["method.rank"]}
        return {
            "name": cell.name,
            "score": score,
            "scores_by_round": [None, score],
            "bytes_by_round": [500, 500],
            "metric": "accuracy",
            **({} if rows is None else {"test_rows": rows}),
            "before": 0.25,
            "majority": 0.5,
            "bytes": {"federation": {"with_head": sizes, "without_head": sizes}},
            "captured_share": None,
            "seconds": 1.0,
            "peak_memory_bytes": 1000,
            "fedsb": "0.1.0",
            "git": None,
            "settings": cell.portable,
            "content": cell.content,
        }

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Runs a comparison whose cells' scores are given by a function."""

    def run(scores: Callable[[Cell], float | None], notes: list[str] | None = None, **compare_: Any) -> dict[str, Any]:
        monkeypatch.setattr(story, "run_cell", made_up(scores))
        loaded = load_config(asked(tiny_config, **{"methods": ["fed-sb@8", "fedit@2"], "trials": 3, **compare_}))
        return compare(loaded, tmp_path / "out", (notes if notes is not None else []).append)

    return run


def test_every_contender_gets_the_same_trials(fake: Callable[..., dict[str, Any]]) -> None:
    found = fake(lambda cell: 0.5 + 0.01 * cell.settings["seed"] + peak(0.04)(cell.settings["train.lr"]) / 100)
    fed_sb, fedit = found["contenders"]
    assert [trial["lr"] for trial in fed_sb["tried"]] == [0.02, 0.04, 0.08]  # from train.lr
    assert [trial["lr"] for trial in fedit["tried"]] == [0.0025, 0.005, 0.01]  # from an eighth of it
    assert (fed_sb["lr"], fed_sb["lr_at_boundary"]) == (0.04, False)
    assert (fedit["lr"], fedit["lr_at_boundary"]) == (0.01, True)
    assert fed_sb["scores"] == [0.5, 0.51, 0.52] and fed_sb["score"] == {"mean": 0.51, "sd": pytest.approx(0.01)}
    assert fedit["difference"] == {
        "test_error": None,  # these cells do not say how many rows they were scored on
        "mean": pytest.approx(-0.02),
        "sd": pytest.approx(0),
        "wins": 0,
        "of": 3,
        "by_seed": {seed: pytest.approx(-0.02) for seed in range(3)},
    }
    assert (fed_sb["bytes"]["total"], fed_sb["on_front"]) == (8000, True)
    assert (fedit["bytes"]["total"], fedit["on_front"]) == (2000, True)
    assert found["failed"] == {}


def test_the_tests_own_error_stands_beside_a_score_and_a_difference(
    cli: Cli, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: sqrt(0.8 0.2 / 300) = 2.31 points, sqrt(0.75 0.25 / 300) = 2.5, and 3.40 of their difference."""
    scored = {"fed-sb": 0.8, "fedit": 0.75}
    monkeypatch.setattr(story, "run_cell", made_up(lambda cell: scored[cell.settings["method.name"]], rows=300))
    config = load_config(asked(tiny_config, methods=["fed-sb@8", "fedit@2"], seeds=1, trials=0))
    found = compare(config, tmp_path / "out", lambda text: None)
    fed_sb, fedit = found["contenders"]
    assert found["test_rows"] == 300
    assert fed_sb["test_error"] == pytest.approx(math.sqrt(0.8 * 0.2 / 300))
    assert fedit["difference"]["test_error"] == pytest.approx(math.sqrt((0.8 * 0.2 + 0.75 * 0.25) / 300))
    for name in ("table.md", "comparison.html"):
        page = (tmp_path / "out" / name).read_text().replace("\N{NO-BREAK SPACE}", " ")
        assert "2.3 points" in page and "better in 0 of 1, test error 3.4 points" in page
        assert "due to 300 test rows" in page


def test_a_metric_that_is_no_share_of_rows_has_no_error_of_the_test() -> None:
    assert figures.test_error([{**kept_cell([0.5]), "test_rows": 300, "score": 0.5, "metric": "matthews"}]) is None
    assert figures.test_error([]) is None


def test_without_trials_the_rate_is_as_it_stands(fake: Callable[..., dict[str, Any]]) -> None:
    found = fake(lambda cell: cell.settings["train.lr"], trials=0, seeds=1, target=0.02)
    assert [row["scores"] for row in found["contenders"]] == [[0.02], [0.02]]
    assert [row["bytes_to_target"] for row in found["contenders"]] == [{"mean": 1000, "reached": 1, "of": 1}] * 2


def test_a_trial_that_breaks_is_no_failure_but_a_search_without_any_is(
    fake: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = fake(lambda cell: None if cell.settings["train.lr"] > 0.01 else cell.settings["train.lr"], trials=2)
    fed_sb, fedit = found["contenders"]
    assert [trial["score"] for trial in fed_sb["tried"]] == [0.01, None] and fed_sb["lr"] == 0.01
    assert fedit["lr"] == 0.005 and found["failed"] == {}
    found = fake(
        lambda cell: None if cell.settings["method.name"] == "fed-sb" else 0.5, seeds=2, methods=["fed-sb@4", "fedit@1"]
    )
    assert list(found["failed"]) == ["fed-sb@4, tuning"]
    assert "None of the learning rates 0.02, 0.01, 0.005 gave a finite loss" in found["failed"]["fed-sb@4, tuning"]
    fed_sb, fedit = found["contenders"]
    assert (fed_sb["lr"], fed_sb["score"], fed_sb["scores"]) == (None, None, [None, None])
    assert fedit["scores"] == [0.5, 0.5] and fedit["difference"] is None
    assert "Failed: fed-sb@4, tuning: None of the learning rates" in (tmp_path / "out" / "table.md").read_text()
    assert "fed-sb@4, tuning failed: None of the learning rates" in (tmp_path / "out" / "comparison.html").read_text()


def test_a_failed_cell_leaves_the_others(fake: Callable[..., dict[str, Any]]) -> None:
    def scores(cell: Cell) -> float:
        if cell.name == "fed-sb@8 seed 1":
            raise CellError("no room")
        return 0.5

    found = fake(scores)
    assert found["failed"] == {"fed-sb@8 seed 1": "no room"}
    assert found["contenders"][0]["scores"] == [0.5, None, 0.5]
    assert found["contenders"][1]["difference"]["of"] == 2


def test_a_disk_that_is_full_ends_the_comparison(fake: Callable[..., dict[str, Any]]) -> None:
    def scores(cell: Cell) -> float:
        raise RunError("the disk is full")

    with pytest.raises(RunError, match="the disk is full"):
        fake(scores)


def test_a_changed_recipe_makes_new_cells_and_says_so(fake: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first: list[str] = []
    fake(lambda cell: 0.5, first, trials=0, seeds=1)
    again: list[str] = []
    fake(lambda cell: 0.75, again, trials=0, seeds=1)
    assert len(first) == 4 and len(again) == 2, "nothing was run again"
    changed: list[str] = []
    found = fake(
        lambda cell: 0.75,
        changed,
        trials=0,
        seeds=1,
        methods=["fedit@2", "fed-sb@8"],
        contenders=[],
        grid={"train.local_steps": [5]},
    )
    assert [row["scores"] for row in found["contenders"]] == [[0.75], [0.75]]
    assert len(json.loads((tmp_path / "out" / "cells.json").read_text())["cells"]) == 4
    more: list[str] = []
    fake(
        lambda cell: 1.0,
        more,
        trials=0,
        seeds=1,
        methods=[],
        contenders=[{"name": "fedit@2", "set": {"method": {"name": "fedit", "rank": 2}, "train.local_steps": 7}}],
    )
    assert "fedit@2 seed 0: a stored run has different settings and is not used (train.local_steps: 3 -> 7)" in more


def test_on_the_command_line(
    cli: Cli, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options go before the TOML, and --set before them; a failed cell is exit code 2, behind the tables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, "run_cell", made_up(lambda cell: cell.settings["train.lr"]))
    table = {"methods": ["fedit@9"], "reference": "fedit@9", "seeds": 5}
    command = ["compare", write_toml(tmp_path / "tiny.toml", asked(tiny_config, **table))]
    command += ["--methods", "fedit@2, fed-sb@8", "--seeds", "1", "--trials", "0", "--set", "train.lr=0.5"]
    said = cli(*command)
    assert (said.code, said.err) == (0, "")
    assert "difference from fedit@2" in said.out and "50.0\N{NO-BREAK SPACE}%" in said.out
    assert "comparisons/tiny/comparison.html" in said.out
    found = json.loads(cli(*command, "--json", "--set", "compare.reference=fed-sb@8").out)
    assert found["comparison"] == "comparisons/tiny" and found["reference"] == "fed-sb@8"
    monkeypatch.setattr(story, "run_cell", made_up(lambda cell: None))
    said = cli(*command, "--out", "other", "--json")
    assert said.code == 2 and list(json.loads(said.out)["failed"]) == ["fedit@2 seed 0", "fed-sb@8 seed 0"]
    assert "Some runs failed:\n  fedit@2 seed 0: The loss is not finite" in said.err


def test_lower_is_better(fake: Callable[..., dict[str, Any]]) -> None:
    found = fake(lambda cell: cell.settings["train.lr"], trials=3, seeds=1, grid={"task.kind": ["text"]})
    fed_sb, fedit = found["contenders"]
    assert [trial["lr"] for trial in fed_sb["tried"]] == [0.01, 0.02, 0.04] and fed_sb["lr"] == 0.01
    assert not found["higher_is_better"] and fedit["difference"]["wins"] == 1 and fedit["on_front"]


def test_workers(tiny_config: dict[str, Any]) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    plan = plan_of(load_config(asked(tiny_config, methods=["fedit"])))
    assert plan.workers == cores and plan.cells == 7
    assert plan_of(load_config(asked(tiny_config, methods=["fedit"], workers=5))).workers == 5


def test_each_worker_has_a_gpu_of_its_own(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan_of(load_config(asked(tiny_config, methods=["fedit"]))).workers == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert plan_of(load_config(asked(tiny_config, methods=["fedit"]))).workers == 2
    cell, seen = make_cell("one", load_config(tiny_config).config.model_dump(mode="json")), []

    async def call(*_: str, environment: dict[str, str]) -> tuple[int, str]:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return 1, "nothing is run here"

    monkeypatch.setattr(cells, "call_process", call)
    for slot in range(3):
        with pytest.raises(CellError):
            asyncio.run(run_cell(cell, tmp_path, slot))
    assert seen == ["5", "7", "5"]


# --- a real one ---


def test_cut_off_and_taken_up_again(
    cli: Cli, tiny_bert: Path, tables: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = set_all(tiny_settings(tiny_bert, tables, tmp_path / "runs"), rounds=2)
    toml = write_toml(
        tmp_path / "tiny.toml", asked(config, methods=["fed-sb@4", "fedit@1"], seeds=2, trials=2, workers=2)
    )
    folder = tmp_path / "out"
    command = ["compare", str(toml), "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsb", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in a shell's background ignore it
    )
    until = time.monotonic() + 120
    while not (folder / "cells.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.5)  # others are on their way
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.endswith(f"interrupted\n  Completed runs are in {folder}. To resume:\n    fedsb {' '.join(command)}\n")
    kept = json.loads((folder / "cells.json").read_text())["cells"]
    assert 0 < len(kept) < 8 and not (folder / "comparison.json").exists()
    assert not list(tmp_path.glob("fedsb-cell-*")), "a run that was ended left its folder"

    said = cli(*command, "--json")
    assert said.code == 0, said.err
    cells = json.loads((folder / "cells.json").read_text())["cells"]
    assert len(cells) == 8 and kept.items() <= cells.items(), "a finished cell was run again"
    assert said.err.count("left") == 8 - len(kept) - 1

    found = json.loads(said.out)
    fed_sb, fedit = found["contenders"]
    for row in (fed_sb, fedit):
        assert len(row["tried"]) == 2 and len(row["scores"]) == 2 and row["peak_memory_bytes"] > 1e7
    of = {cell["name"]: cell for cell in cells.values()}
    assert of["fed-sb@4 seed 0"]["settings"]["data.train"] == "train.jsonl"
    assert str(tmp_path) not in (folder / "cells.json").read_text() + (folder / "comparison.html").read_text()
    # 2 rounds, 3 clients, 12 layers: fed-sb 4 x 4 each and a head of 99
    assert fed_sb["bytes"] == {"one_off": 0, "up": 6984, "down": 6984, "total": 13968, "total_less_head": 9216}
    assert fed_sb["curve"][-1] == [13968, pytest.approx(fed_sb["score"]["mean"])]
    page = (folder / "comparison.html").read_text()
    assert page.count('role="img"') == 4 and "://" not in page

    monkeypatch.setattr(story, "run_cell", None)  # nothing is left to run
    again = cli(*command)
    assert again.code == 0 and "fed-sb@4" in again.out and "comparison.html" in again.out
    assert json.loads((folder / "comparison.json").read_text()) == {k: v for k, v in found.items() if k != "comparison"}


# --- private runs ---

PRIVATE = {"unit": "example", "epsilon": 2.0, "delta": 1e-3, "clip_norm": 0.5}


def ledger(folder: Path, run: str, client: str, *releases: Release) -> None:
    path = folder / "ledgers" / run / "cell" / "privacy" / f"{client}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Ledger.create(path, run=run, client=client, unit="example") as made:
        for release in releases:
            made.charge(release, round=1, clip=1.0)


def test_the_runs_of_a_private_comparison_add_up(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """What it may come to is said before any run, and the ledgers of all runs stay, a failed one's too."""
    config = asked(
        set_all(tiny_config, privacy=PRIVATE, rounds=1),
        methods=["fed-sb@4", "ffa-lora@2", "fed-sb@33"],
        trials=0,
        seeds=1,
    )
    notes: list[str] = []
    found = compare(load_config(config), tmp_path / "out", notes.append)
    assert set(found["failed"]) == {"fed-sb@33 seed 0"}  # before it is charged: the rank is above what fits
    (ahead,) = [i for i, note in enumerate(notes) if note.startswith("privacy: 3 private runs")]
    assert "at most epsilon 6 together" in notes[ahead] and not any("seed 0:" in note for note in notes[:ahead])
    kept = [path for path in (tmp_path / "out" / "ledgers").rglob("*") if path.is_file()]
    assert len(kept) == 9 and {path.suffix for path in kept} == {".jsonl"}
    keys = json.loads((tmp_path / "out" / "cells.json").read_text())["cells"]  # hashes of the private rows
    assert keys and not any(key in str(path) for key in keys for path in kept)
    wanted = max(
        epsilon([e.release for path in kept if path.name == f"site {k}.jsonl" for e in read_ledger(path)], 1e-3)
        for k in range(3)
    )
    assert found["privacy"]["epsilon"] == pytest.approx(wanted) and 2.0 < wanted < 4.0
    assert found["privacy"]["runs"] == 2
    assert "All 2 private runs together spent epsilon" in (tmp_path / "out" / "table.md").read_text()


def test_a_row_may_be_at_any_client_where_splits_differ(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    few, many = Release(q=0.1, sigma=2.0, count=10), Release(q=0.05, sigma=1.0, count=20)
    for run in ("one", "two"):
        ledger(tmp_path, run, "a", few)
        ledger(tmp_path, run, "b", many)
    ledger(tmp_path, "pooled", "central", few)
    config = asked(set_all(tiny_config, privacy=PRIVATE), methods=["fed-sb@4", "fedit@2"], trials=0)
    by_column = epsilon_together(tmp_path, contenders_of(load_config(config)))
    assert by_column is not None and by_column["runs"] == 3
    each = [epsilon([release, release, few], 1e-3) for release in (few, many)]
    assert by_column["epsilon"] == pytest.approx(max(each))
    drawn = set_all(config, clients={"partition": "iid", "count": 2})
    anywhere = epsilon_together(tmp_path, contenders_of(load_config(drawn)))
    assert anywhere is not None
    worst = Release(q=0.1, sigma=1.0, count=20)
    assert anywhere["epsilon"] == pytest.approx(epsilon([worst, worst, few], 1e-3))
    assert epsilon_together(tmp_path / "empty", contenders_of(load_config(config))) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compare": {"trials": 2}}, r"compare.trials = 2: trials score private rows.*Set compare.trials = 0"),
        ({"data": {"test": None}}, r"a private run does not release scores on its clients' rows. Set data.test"),
    ],
    ids=["trials", "no test file"],
)
def test_scores_of_private_rows_are_refused_before_any_run(
    tiny_config: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    config = asked(set_all(tiny_config, privacy=PRIVATE), methods=["fed-sb@4", "ffa-lora@2"], trials=0)
    config = {key: {**value, **changes.get(key, {})} if key in changes else value for key, value in config.items()}
    with pytest.raises(ConfigError, match=words):
        plan_of(load_config(config))
    released = {**PRIVATE, "release": ["scores"]}
    assert plan_of(load_config({**config, "privacy": released})).cells
