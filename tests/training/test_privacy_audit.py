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
from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.privacy import policy as setup
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.plan import PrivacyPlan
from fedsb.privacy.release_checks import ReleaseChecks, failed, limit
from fedsb.runs.audit import audit
from fedsb.runs.run import federate
from fedsb.training import per_example
from fedsb.training import privacy_audit as module
from fedsb.training.privacy_audit import SHARES, Canaries, audited, best_bound, ceiling, lower_bound, p_value
from fedsb.utils.errors import UserError

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
    assert lower_bound(0.01, canaries=100, guesses=100, correct=60) == 0  # m delta = 1: as good as no policy


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


def guarded(tmp_path: Path, noise: Any, **changes: Any) -> DPMechanism:
    settings = {"clip": 0.5, "delta": 1e-5, "batch": 8, "rows": 32, "steps": 1, "rounds": 4, "sigma": 1.0, **changes}
    ledger = Ledger.create(tmp_path / "one.jsonl", run="test", client="one", unit="example")
    return DPMechanism(plan=PrivacyPlan(unit="example", **settings), ledger=ledger, noise=noise)


def test_canaries_are_drawn_and_clipped_like_rows(tmp_path: Path) -> None:
    class Quiet(SeededNoise):
        def normal(self, shape: Any) -> Any:
            return np.zeros(shape)

    mechanism = guarded(tmp_path, Quiet(0))
    canaries = Canaries(1000, mechanism.noise, 7)
    inside = canaries.inside
    assert 430 < len(inside) < 570
    mechanism = audited(mechanism, canaries, Quiet(1))
    mechanism.charge(1)
    rows = mechanism.draw()
    assert all(0 <= row < 32 for row in rows)
    assert 0.15 < len(canaries.drawn) / len(inside) < 0.35  # q = 1/4

    canaries.drawn = [3]
    layout, total = Layout((("a", (100,)), ("b", (40, 5)))), torch.randn(300)
    planted = 8 * mechanism.mean(total, 100, layout) - total
    assert float(planted.norm()) == pytest.approx(0.5, rel=1e-4)  # ten clips long before
    scores = canaries.scores()
    assert scores.argmax() == inside[3]
    assert scores.max() == pytest.approx(0.5, rel=1e-4)


def test_directions_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    both, one, seen = Layout((("a", (30,)), ("b", (4, 5)))), Layout((("a", (30,)),)), torch.randn(50)
    each = []
    for chunk in (1, 1 << 22):
        monkeypatch.setattr(module, "CHUNK", chunk)
        canaries = Canaries(40, SeededNoise(0), 7)
        canaries.record(seen, both)
        canaries.record(seen[:30], one)  # a round that trains less
        each.append(canaries.scores())
    assert np.allclose(*each, atol=1e-5)


# --- whole runs, and broken ones ---


@pytest.fixture
def config(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Epsilon 1; some 3000 trained values."""
    monkeypatch.setattr(setup, "noise_for", lambda client: SeededNoise(0, client))
    privacy = {"unit": "example", "epsilon": 1.0, "clip_norm": 0.5}
    return set_all(tiny_config, method={"name": "fed-sb", "rank": 16}, privacy=privacy)


LOUD = {"unit": "example", "noise_multiplier": 0.5, "clip_norm": 0.5}  # epsilon 17, and canaries that are heard


def test_whole_code_passes(config: dict[str, Any]) -> None:
    found = audit(load_config(config))
    assert not found["broken"]
    assert found["epsilon_audited"] < found["epsilon"] == found["epsilon_ledger"] <= 1.0
    assert (found["steps"], found["canaries"]) == (9, 1000)
    assert found["epsilon_most"] == ceiling(1000, found["delta"], found["q"], 9) < ceiling(1000, found["delta"])
    tests = found["tests"]
    assert tests.pop("divisor")["tests"] == 0  # of shared noise
    assert set(tests) == {"size", "mean", "shape", "tensors", "steps", "draws", "clip", "again"}
    assert all(each["tests"] > 0 and abs(each["worst"]) < each["limit"] < 7 for each in tests.values())


def test_whole_code_passes_where_canaries_are_heard(config: dict[str, Any]) -> None:
    found = audit(load_config(set_all(config, privacy=LOUD)))
    assert not found["broken"] and "The canaries could not show a problem" in found["says"]
    assert 1.0 < found["epsilon_audited"] < found["epsilon_most"] < found["epsilon"]


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPMechanism, "add_noise", lambda self, total, std: total)


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_example, "row_norms", lambda gradients: torch.zeros(len(gradients)))


def thin_noise(share: float) -> Callable[[pytest.MonkeyPatch], None]:
    whole = DPMechanism.add_noise
    return lambda monkeypatch: monkeypatch.setattr(
        DPMechanism, "add_noise", lambda self, total, std: whole(self, total, std * share)
    )


def shared(by: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Noise that all layers of one shape, or all steps, have in common."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        kept: dict[Any, torch.Tensor] = {}

        def mean(self: DPMechanism, total: torch.Tensor, rows: int, layout: Layout) -> torch.Tensor:
            self._take("training")
            if by == "layers":
                kept.clear()
            made = {}
            for key, x in layout.views(total).items():
                place = tuple(x.shape) if by == "layers" else key
                if place not in kept:
                    kept[place] = self.add_noise(torch.zeros_like(x), self.plan.noise_std)
                made[key] = (x + kept[place]) / self.plan.batch
            return layout.flatten(made)

        monkeypatch.setattr(DPMechanism, "mean", mean)

    return install


CORE, HEAD = 16 * 16, [3, 3 * 32]  # values of a core, and of the head's bias and weight, the last of a vector


def head_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = DPMechanism.mean

    def partly(self: DPMechanism, total: torch.Tensor, rows: int, layout: Layout) -> torch.Tensor:
        made = mean(self, total, rows, layout)
        made[-sum(HEAD) :] = total[-sum(HEAD) :] / self.plan.batch
        return made

    monkeypatch.setattr(DPMechanism, "mean", partly)


def head_outside_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = per_example.row_norms
    monkeypatch.setattr(per_example, "row_norms", lambda gradients: norms(gradients[:, : -sum(HEAD)]))
    monkeypatch.setattr("fedsb.privacy.mechanism.refuse_long", lambda *_: None)


def each_tensor_clipped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = per_example.add_clipped

    def alone(sums: torch.Tensor, gradients: torch.Tensor, owner_b: torch.Tensor, clip: float, *rounding: Any) -> None:
        sizes = [CORE] * ((gradients.shape[1] - sum(HEAD)) // CORE) + HEAD
        for own, g in zip(sums.split(sizes, 1), gradients.split(sizes, 1), strict=True):
            whole(own, g, owner_b, clip, *rounding)

    monkeypatch.setattr(per_example, "add_clipped", alone)
    monkeypatch.setattr(module, "add_clipped", alone)
    monkeypatch.setattr("fedsb.privacy.mechanism.refuse_long", lambda *_: None)


def drawn_at(times: float) -> Callable[[pytest.MonkeyPatch], None]:
    draw = lambda self: self.noise.poisson_sample(self.rows, min(1.0, times * self.plan.q))  # noqa: E731
    return lambda monkeypatch: monkeypatch.setattr(DPMechanism, "draw", draw)


def one_draw_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []

    def draw(self: DPMechanism) -> list[int]:
        kept[:] = kept or [self.noise.poisson_sample(self.rows, self.plan.q)]
        return kept[0]

    monkeypatch.setattr(DPMechanism, "draw", draw)


def uniform_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the planned size, and between two ends."""
    flat = lambda self, shape: (self.uniform(math.prod(shape)).reshape(shape) - 0.5) * 12**0.5  # noqa: E731
    monkeypatch.setattr(SeededNoise, "normal", flat)


MUTANTS = {
    "no noise": (no_noise, "the noise does not have the planned size"),
    "a tenth of the noise": (thin_noise(1 / 10), "the noise does not have the planned size"),
    "a quarter of the noise": (thin_noise(1 / 4), "the noise does not have the planned size"),
    "half the noise": (thin_noise(1 / 2), "the noise does not have the planned size"),
    "the noise is divided by the batch too": (thin_noise(1 / 8), "the noise does not have the planned size"),
    "noise that layers share": (shared("layers"), "two tensors have the same noise"),
    "noise that steps share": (shared("steps"), "several steps have the same noise"),
    "the head without noise": (head_without_noise, "the noise does not have the planned size (classifier"),
    "uniform noise": (uniform_noise, "the noise is not normal"),
    "no clipping": (no_clipping, "a clipped gradient has a norm above the clip norm"),
    "the head outside the norm": (head_outside_the_norm, "a norm above the clip norm (classifier"),
    "each tensor clipped alone": (each_tensor_clipped_alone, "the clip norm (all tensors together"),
    "twice the rows": (drawn_at(2.0), "rows are not sampled as planned (rows drawn"),
    "half the rows": (drawn_at(0.5), "rows are not sampled as planned (rows drawn"),
    "one draw for all steps": (one_draw_for_all, "rows are not sampled as planned (rows drawn again"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_code_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    install, words = MUTANTS[mutant]
    install(monkeypatch)
    found = audit(load_config(set_all(config, train={"local_steps": 3, "batch_size": 8, "lr": 0.02})), canaries=256)
    assert found["broken"] and "Publish no result" in found["says"]
    assert words in found["says"]


@pytest.mark.parametrize("mutant", ["no noise", "half the noise"])
def test_broken_code_is_caught_where_canaries_cannot_show_it(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    """Epsilon 17 is more than any number of canaries shows."""
    MUTANTS[mutant][0](monkeypatch)
    found = audit(load_config(set_all(config, privacy=LOUD)), canaries=256)
    assert found["epsilon_most"] < found["epsilon"] and found["broken"]
    assert MUTANTS[mutant][1] in found["says"]


@pytest.mark.parametrize("mutant", ["no noise", "a tenth of the noise"])
def test_canaries_alone_catch_it_too(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    MUTANTS[mutant][0](monkeypatch)
    found = audit(load_config(set_all(config, train={"local_steps": 3, "batch_size": 8, "lr": 0.02})))
    assert found["epsilon_ledger"] == found["epsilon"] <= 1.0 < found["epsilon_audited"]


def test_noise_of_a_basis_is_tested(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DPMechanism.basis_sum
    monkeypatch.setattr(DPMechanism, "basis_sum", lambda self, total, *args: (whole(self, total, *args), total)[1])
    found = audit(load_config(set_all(config, basis={"kind": "core", "samples": 30})), canaries=64)
    assert found["broken"] and "the noise does not have the planned size (basis, " in found["says"]


def test_a_round_that_is_not_charged_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    charge = DPMechanism.charge
    monkeypatch.setattr(DPMechanism, "charge", lambda self, round: charge(self, round) if round != 2 else None)
    found = audit(load_config(config), canaries=64)
    assert 0 < found["epsilon_ledger"] < found["epsilon"]
    assert found["broken"] and "the ledger has no line for a training sum" in found["says"]


def test_a_ledger_that_lacks_a_round_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    charge = Ledger.charge
    monkeypatch.setattr(
        Ledger,
        "charge",
        lambda self, release, round, clip: charge(self, release, round=round, clip=clip) if round != 2 else None,
    )
    found = audit(load_config(config), canaries=64)
    assert 0 < found["epsilon_ledger"] < found["epsilon"]
    assert found["broken"] and "the ledger lacks releases" in found["says"]


def test_a_basis_that_is_not_in_the_ledger_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPMechanism, "charge_basis", lambda self, round: self.noise.poisson_sample(self.plan.rows, 0.5))
    found = audit(load_config(set_all(config, basis={"kind": "core", "samples": 30})), canaries=64)
    assert found["broken"] and "the ledger has no line for a basis sum" in found["says"]


def test_the_tests_of_a_release_hardly_ever_accuse_whole_code() -> None:
    """Over 300 audits of small tensors, with rare draws and with steps that train other tensors."""
    draw = np.random.default_rng(0)
    worst = 0.0
    for _ in range(300):
        checks = ReleaseChecks(0.05)
        for step in range(6):
            checks.record_draw(np.flatnonzero(draw.random(400) < 0.05).tolist(), 400)
            keys = {"bias": (3,), "a": (6, 6), "b": (6, 6), "c": (6, 6)} if step % 2 else {"bias": (3,), "d": (50, 4)}
            noise = {key: torch.from_numpy(2.0 * draw.standard_normal(shape)) for key, shape in keys.items()}
            checks.record_noise(noise, 2.0)
        scores = checks.scores(1e-3)
        assert failed(scores) == []
        assert {score.kind for score in scores} == {"size", "mean", "shape", "tensors", "steps", "draws"}
        worst = max(worst, *(abs(score.score) for score in scores))
    assert worst < limit(len(scores)) < 6


def shifted(z: torch.Tensor) -> list[torch.Tensor]:
    return list(z + 0.1)


def repeated_every_other_step(z: torch.Tensor) -> list[torch.Tensor]:
    return [z[0], z[1], z[0], z[1]]


def repeated_once(z: torch.Tensor) -> list[torch.Tensor]:
    """The sum of the steps has the planned size, because the third step takes a part of the repetition back."""
    return [z[0], z[0], -0.5 * z[0] + 0.75**0.5 * z[1]]


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [
        (shifted, "mean", "all noise"),
        (repeated_every_other_step, "steps", "a, summed"),
        (repeated_once, "steps", "a, one after another"),
    ],
)
def test_what_only_one_test_of_a_release_finds(
    fault: Callable[[torch.Tensor], list[torch.Tensor]], kind: str, what: str
) -> None:
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 5000)))
    checks = ReleaseChecks(0.05)
    for step in fault(z):
        checks.record_noise({"a": step}, 1.0)
    scores = checks.scores(1e-3)
    found = [score for score in scores if abs(score.score) > limit(len(scores))]
    assert [(score.kind, score.what) for score in found] == [(kind, what)]
    assert failed(scores) == found


@pytest.mark.parametrize(("drawn", "is_fault"), [(10, True), (40, False), (90, True)])
def test_the_rows_of_one_step_are_counted(drawn: int, is_fault: bool) -> None:
    checks = ReleaseChecks(0.1)
    checks.record_draw(range(drawn), 400)
    assert [score.what for score in failed(checks.scores(1e-3))] == ["rows drawn"] * is_fault


def test_canaries_that_no_step_draws_show_nothing() -> None:
    """With q = 1 % and ten steps a tenth of those in are seen, and the others look like those out."""
    assert ceiling(1000, 1e-5, 1.0, 1) == ceiling(1000, 1e-5)
    seldom, often = ceiling(1000, 1e-5, 0.01, 10), ceiling(1000, 1e-5, 0.2, 10)
    assert 0 == ceiling(1000, 1e-5, 0.001, 10) < seldom < often < ceiling(1000, 1e-5)
    draw = np.random.default_rng(0)
    found = []
    for _ in range(20):
        inside = draw.random(1000) < 0.5
        seen = inside & (draw.random(1000) < 1 - 0.99**10)
        found.append(best_bound(seen + 1e-3 * draw.random(1000), inside, 1e-5).epsilon)
    assert np.mean(found) == pytest.approx(seldom, abs=0.5)


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
    assert "tiny, site 2: 6 noised sums in 2 rounds" in said.out
    assert "95% confidence" in said.out and "no problem was found" in said.out
    found = json.loads((run.parent / "tiny-audit" / "audit.json").read_text())
    assert found["epsilon"] < 1 and found["config"]["name"] == "tiny"
    assert (run.parent / "tiny-audit" / "privacy" / "site 2.jsonl").exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    again = cli("audit", toml)
    assert again.code == 1 and "tiny-audit already exists" in again.err

    of_the_run = cli("audit", run, "--set", "name=same", "--client", "site 2", "--rounds", "2", "--canaries", "200")
    assert of_the_run.code == 0, of_the_run.err
    same = json.loads((run.parent / "same-audit" / "audit.json").read_text())
    for facts in (same, found):
        del facts["config"]["model"]["template_date"], facts["config"]["model"]["dtype"]  # decided when the run starts
    assert same["config"] == {**found["config"], "name": "same"}


def test_the_command_fails_where_something_is_broken(
    config: dict[str, Any], cli: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_noise(monkeypatch)
    said = cli("audit", write_toml(tmp_path / "my.toml", config), "--json")
    assert said.code == 2 and "The audit failed" in said.err
    assert json.loads(said.out)["broken"]


@pytest.mark.parametrize(
    ("changes", "options", "wanted"),
    [
        ({"privacy": {}}, {}, "cannot be audited. Canaries are rows"),
        ({}, {"canaries": 31}, "--canaries 31 is too small. Use at least 32"),
        ({}, {"client": "site 3"}, "This run has no client 'site 3'; did you mean"),
        ({}, {"rounds": 4}, "takes part in 3 rounds"),
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
