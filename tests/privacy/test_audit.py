"""The audit in one run: its bound against hand and simulation, and what it makes of whole and of broken code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Said, set_all, write_toml
from fedsb.audit import audit
from fedsb.config import load_config
from fedsb.errors import UserError
from fedsb.privacy import audit as module
from fedsb.privacy import per_example, setup
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.audit import SHARES, Canaries, audited, best_bound, ceiling, lower_bound, p_value
from fedsb.privacy.guard import Guard
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.plan import PrivacyPlan
from fedsb.run import federate

# --- the bound ---


@pytest.mark.parametrize(
    ("at", "correct", "wanted"),
    [
        # two guesses at epsilon 0: W is 0, 1, 2 with 1/4, 1/2, 1/4; slack 2 * 10 * 0.01 = 0.2
        (0.0, 2, 1 / 4 + 0.2 * max(1 / 2, (1 / 2 + 1 / 4) / 2)),
        (0.0, 1, 3 / 4 + 0.2 * (1 / 4)),
        (0.0, 0, 1.0),
        # at ln 3 a guess is right with 3/4: W is 0, 1, 2 with 1/16, 6/16, 9/16
        (math.log(3), 2, 9 / 16 + 0.2 * max(6 / 16, 7 / 16 / 2)),
        (math.log(3), 1, 15 / 16 + 0.2 * (1 / 16)),
    ],
)
def test_the_p_value_of_two_guesses(at: float, correct: int, wanted: float) -> None:
    assert p_value(at, 0.01, canaries=10, guesses=2, correct=correct) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("guesses", [10, 100, 10_000])
def test_all_guesses_right_and_no_delta(guesses: int) -> None:
    """p^r = 5 %, so epsilon = ln(p / (1 - p))."""
    p = 0.05 ** (1 / guesses)
    bound = lower_bound(0.0, canaries=guesses, guesses=guesses, correct=guesses)
    assert bound == pytest.approx(math.log(p / (1 - p)), abs=2e-6)


def test_few_guesses_or_half_of_them_right_show_nothing() -> None:
    assert lower_bound(0.0, canaries=100, guesses=4, correct=4) == 0  # 1/16 is more than 5 %
    assert lower_bound(0.0, canaries=100, guesses=100, correct=50) == 0
    assert lower_bound(0.01, canaries=100, guesses=100, correct=60) == 0  # m delta = 1: as good as no promise


def test_which_way_the_bound_moves() -> None:
    def bound(delta: float = 1e-5, canaries: int = 200, correct: int = 95, error: float = 0.05) -> float:
        return lower_bound(delta, canaries=canaries, guesses=100, correct=correct, error=error)

    by_correct = [bound(correct=v) for v in range(101)]
    assert by_correct == sorted(by_correct) and by_correct[100] > by_correct[80] > 0
    assert bound(delta=0) > bound() > bound(delta=1e-4) > 0
    assert bound() > bound(canaries=2000)
    assert bound() > bound(error=0.01)
    rising = [p_value(at, 1e-5, canaries=200, guesses=100, correct=95) for at in np.linspace(0, 6, 61)]
    assert rising == sorted(rising)


def test_every_split_pays_for_its_look() -> None:
    """Ten of 320 canaries are known to be in: only the smallest split shows it, held against a sixth of the 5 %."""
    inside = np.arange(320) % 2 == 0
    scores = np.where(inside & (np.arange(320) < 20), 1.0, 0.0)
    bound = best_bound(scores, inside, 0.0)
    assert (bound.guessed_in, bound.guessed_out, bound.correct) == (10, 0, 10)
    p = (0.05 / (2 * len(SHARES))) ** (1 / 10)
    assert bound.epsilon == pytest.approx(math.log(p / (1 - p)), abs=2e-6)


def test_what_canaries_can_show_at_most() -> None:
    inside = np.arange(1000) % 2 == 0
    assert best_bound(inside.astype(float), inside, 1e-5).epsilon == ceiling(1000, 1e-5) == pytest.approx(5.2, abs=0.1)
    assert ceiling(1000, 1e-5) < ceiling(10_000, 1e-5)


def simulated(audits: int, canaries: int, score: Callable[[Any, Any], Any], delta: float) -> list[float]:
    """The bounds of so many audits; `score` makes scores of the coins."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(audits):
        inside = draw.random(canaries) < 0.5
        found.append(best_bound(score(draw, inside), inside, delta).epsilon)
    return found


@pytest.mark.parametrize("sigma", [2.0, 0.5])
def test_a_gaussian_mechanism_is_hardly_ever_accused(sigma: float) -> None:
    bounds = simulated(200, 500, lambda draw, inside: inside + sigma * draw.standard_normal(500), 1e-5)
    assert sum(bound > epsilon([Release(sigma=sigma)], 1e-5) for bound in bounds) <= 2


def test_the_bound_comes_near_a_gaussian_mechanism() -> None:
    bounds = simulated(10, 10_000, lambda draw, inside: inside + draw.standard_normal(10_000), 1e-5)
    true = epsilon([Release(sigma=1.0)], 1e-5)
    assert max(bounds) < true
    assert sum(bounds) / 10 > 0.4 * true


def test_the_bound_of_what_is_as_bad_as_it_may_be() -> None:
    """Each coin is told truly with e / (1 + e), epsilon 1: at most 5 % of the bounds are above, and most are near."""

    def told(draw: Any, inside: Any) -> Any:
        return np.where(draw.random(2000) < math.e / (1 + math.e), inside, ~inside) + 1e-3 * draw.random(2000)

    bounds = simulated(200, 2000, told, 0.0)
    assert sum(bound > 1 for bound in bounds) <= 10
    assert sum(bounds) / 200 > 0.8


# --- the canaries ---


def guarded(tmp_path: Path, noise: Any, **changes: Any) -> Guard:
    settings = {"clip": 0.5, "delta": 1e-5, "batch": 8, "rows": 32, "steps": 1, "rounds": 4, "sigma": 1.0, **changes}
    ledger = Ledger.create(tmp_path / "one.jsonl", run="test", client="one", unit="example")
    return Guard(plan=PrivacyPlan(unit="example", **settings), ledger=ledger, noise=noise)


def test_canaries_are_drawn_and_clipped_like_rows(tmp_path: Path) -> None:
    class Quiet(SeededNoise):
        def normal(self, shape: Any) -> Any:
            return np.zeros(shape)

    guard = guarded(tmp_path, Quiet(0))
    canaries = Canaries(1000, guard.noise, 7)
    inside = canaries.inside
    assert 430 < len(inside) < 570
    guard = audited(guard, canaries)
    rows = guard.draw()
    assert all(0 <= row < 32 for row in rows)
    assert 0.15 < len(canaries.drawn) / len(inside) < 0.35  # q = 1/4

    canaries.drawn = [3]
    sums = {"b": torch.randn(40, 5), "a": torch.randn(100)}
    mean = guard.mean(sums)
    planted = {key: 8 * mean[key] - sums[key] for key in sums}
    length = torch.cat([x.flatten() for x in planted.values()]).norm()
    assert float(length) == pytest.approx(0.5, rel=1e-4)  # ten clips long before
    scores = canaries.scores()
    assert scores.argmax() == inside[3]
    assert scores.max() == pytest.approx(0.5, rel=1e-4)


def test_directions_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"a": torch.randn(30), "b": torch.randn(4, 5)}
    each = []
    for chunk in (1, 1 << 22):
        monkeypatch.setattr(module, "CHUNK", chunk)
        canaries = Canaries(40, SeededNoise(0), 7)
        canaries.see(seen)
        canaries.see({"a": seen["a"]})  # a round that trains less
        each.append(canaries.scores())
    assert np.allclose(*each, atol=1e-5)


# --- whole runs, and broken ones ---


@pytest.fixture
def config(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Epsilon 1; some 3000 trained values."""
    monkeypatch.setattr(setup, "noise_for", lambda client: SeededNoise(0, client))
    privacy = {"unit": "example", "epsilon": 1.0, "clip": 0.5}
    return set_all(tiny_config, method={"name": "fed-sb", "rank": 16}, privacy=privacy)


LOUD = {"unit": "example", "noise_multiplier": 0.5, "clip": 0.5}  # epsilon 17, and canaries that are heard


def test_whole_code_passes(config: dict[str, Any]) -> None:
    found = audit(load_config(config))
    assert not found["broken"]
    assert found["epsilon_audited"] < found["epsilon"] == found["epsilon_ledger"] <= 1.0
    assert (found["steps"], found["canaries"]) == (9, 1000)


def test_whole_code_passes_where_canaries_are_heard(config: dict[str, Any]) -> None:
    found = audit(load_config(set_all(config, privacy=LOUD)))
    assert not found["broken"] and "it could not have failed" in found["says"]
    assert 1.0 < found["epsilon_audited"] < found["epsilon_most"] < found["epsilon"]


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "noised", lambda self, total, std: total)


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_example, "norms", lambda gradients: torch.zeros(len(next(iter(gradients.values())))))


def thin_noise(share: float) -> Callable[[pytest.MonkeyPatch], None]:
    whole = Guard.noised
    return lambda monkeypatch: monkeypatch.setattr(
        Guard, "noised", lambda self, total, std: whole(self, total, std * share)
    )


def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "draw", lambda self: self.noise.poisson_sample(self.rows, 1.0))


@pytest.mark.parametrize(
    ("mutant", "batch"),
    [
        pytest.param(no_noise, 8, id="no noise"),
        pytest.param(no_clipping, 8, id="no clipping"),
        pytest.param(thin_noise(1 / 10), 8, id="a tenth of the noise"),
        pytest.param(thin_noise(1 / 8), 8, id="the noise is divided by the batch too"),
        pytest.param(every_row, 2, id="every row in every step"),
    ],
)
def test_broken_code_is_caught(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], batch: int
) -> None:
    mutant(monkeypatch)
    found = audit(load_config(set_all(config, train={"steps": 3, "batch_size": batch, "lr": 0.02})))
    assert found["epsilon_ledger"] == found["epsilon"] <= 1.0 < found["epsilon_audited"]
    assert found["broken"] and "Publish nothing" in found["says"]


def test_a_ledger_without_the_steps_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "charge", lambda self, round: None)
    found = audit(load_config(set_all(config, privacy=LOUD)))
    assert found["epsilon_ledger"] == 0 < found["epsilon_audited"] < found["epsilon"]
    assert found["broken"] and "the ledger lacks releases" in found["says"]


def test_a_ledger_that_lacks_a_round_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    charge = Guard.charge
    monkeypatch.setattr(Guard, "charge", lambda self, round: charge(self, round) if round != 2 else None)
    found = audit(load_config(config))
    assert 0 < found["epsilon_ledger"] < found["epsilon"]
    assert found["broken"] and "the ledger lacks releases" in found["says"]


def test_a_basis_that_is_not_in_the_ledger_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "charge_basis", lambda self, round: self.noise.poisson_sample(self.plan.rows, 0.5))
    found = audit(load_config(set_all(config, basis={"kind": "core", "samples": 30})), canaries=64)
    assert 0 < found["epsilon_ledger"] < found["epsilon"]
    assert found["broken"] and "the ledger lacks releases" in found["says"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"method": {"name": "rolora", "rank": 2}}, id="other tensors every round"),
        pytest.param({"basis": {"kind": "core", "samples": 30, "refresh": 2}}, id="a noised basis, renewed"),
        pytest.param({"server": {"codec": "int8", "min_clients": 3}}, id="a lossy codec"),
    ],
)
def test_what_else_a_recipe_may_ask_for(config: dict[str, Any], changes: dict[str, Any]) -> None:
    found = audit(load_config(set_all(config, **changes)), canaries=64)
    assert not found["broken"]
    assert found["epsilon_ledger"] == pytest.approx(found["epsilon"], rel=1e-6)


# --- the command ---


def test_the_command(config: dict[str, Any], cli: Callable[..., Said], tmp_path: Path) -> None:
    """One client, fewer rounds; a run of the same name is left as it is."""
    run = federate(load_config(config)).folder
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    toml = write_toml(tmp_path / "my.toml", config)
    said = cli("audit", toml, "--client", "site 2", "--rounds", "2", "--canaries", "200")
    assert said.code == 0
    assert "tiny, site 2: 6 noised sums of 2 rounds" in said.out
    assert "95% confidence" in said.out and "nothing is seen to be broken" in said.out
    found = json.loads((run.parent / "tiny-audit" / "audit.json").read_text())
    assert found["epsilon"] < 1 and found["config"]["name"] == "tiny"
    assert (run.parent / "tiny-audit" / "privacy" / "site 2.jsonl").exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    again = cli("audit", toml)
    assert again.code == 1 and "tiny-audit is there already" in again.err

    of_the_run = cli("audit", run, "--set", "name=same", "--client", "site 2", "--rounds", "2", "--canaries", "200")
    assert of_the_run.code == 0, of_the_run.err
    same = json.loads((run.parent / "same-audit" / "audit.json").read_text())
    assert same["config"] == {**found["config"], "name": "same"}


def test_the_command_fails_where_something_is_broken(
    config: dict[str, Any], cli: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_noise(monkeypatch)
    said = cli("audit", write_toml(tmp_path / "my.toml", config), "--json")
    assert said.code == 2 and "the audit failed" in said.err
    assert json.loads(said.out)["broken"]


@pytest.mark.parametrize(
    ("changes", "options", "wanted"),
    [
        ({"privacy": {}}, {}, "an audit needs 'example'"),
        ({}, {"canaries": 31}, "--canaries 31: at least 32"),
        ({}, {"client": "site 3"}, "there is no client 'site 3'; did you mean"),
        ({}, {"rounds": 4}, "takes part in 3, so from 1 to 3"),
    ],
)
def test_what_an_audit_refuses(
    config: dict[str, Any], changes: dict[str, Any], options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(UserError, match=wanted):
        audit(load_config(set_all(config, **changes)), **options)
    assert not (Path(config["out"]) / "tiny-audit").exists()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
