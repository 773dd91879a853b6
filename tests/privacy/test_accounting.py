"""Epsilon against closed forms, simulation and known points; calibration; the cache of calibrations.

The settings of the known points are N = 5000, batch 64, 782 steps, delta 1e-5.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsb.privacy import accounting
from fedsb.privacy.accounting import TOLERANCE, Release, calibrate, covered, epsilon
from fedsb.utils.errors import UserError

DELTA = 1e-5
# target, sigma, and that sigma's epsilon by dp-accounting's PLD accountant at a fixed interval of 1e-4
KNOWN = [
    (1.0, 1.561, 0.99895),
    (3.0, 0.861, 2.99471),
    (5.0, 0.713, 4.99498),
    (7.5, 0.623, 7.45048),
    (10.0, 0.567, 9.94853),
]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def steps(sigma: float, q: float = 64 / 5000, count: int = 782) -> list[Release]:
    return [Release(sigma=sigma, q=q, count=count)]


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def gaussian_delta(sigma: float, at: float) -> float:
    """Balle and Wang, ICML 2018 (arXiv 1805.06530), theorem 8: the plain Gaussian mechanism, exactly."""
    return normal_cdf(0.5 / sigma - at * sigma) - math.exp(at) * normal_cdf(-0.5 / sigma - at * sigma)


def sampled_delta(q: float, sigma: float, at: float) -> float:
    """One Poisson-sampled Gaussian, exactly: max over both directions of sup_S P(S) - e^eps Q(S).

    With one row more the output is (1 - q) N(0, s^2) + q N(1, s^2), else N(0, s^2); S is where P / Q is above e^eps.
    """
    out, inside = (math.exp(at) - (1 - q)) / q, (math.exp(-at) - (1 - q)) / q
    threshold = 0.5 + sigma**2 * math.log(out)
    tail, shifted = normal_cdf(-threshold / sigma), normal_cdf(-(threshold - 1) / sigma)
    remove = (1 - q - math.exp(at)) * tail + q * shifted
    if inside <= 0:
        return remove
    threshold = 0.5 + sigma**2 * math.log(inside)
    low, shifted = normal_cdf(threshold / sigma), normal_cdf((threshold - 1) / sigma)
    return max(remove, low - math.exp(at) * ((1 - q) * low + q * shifted))


def solve(delta_of_epsilon: object, delta: float) -> float:
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of_epsilon(middle) > delta else (low, middle)  # type: ignore[operator]
    return high


@pytest.mark.parametrize(("target", "sigma", "reference"), KNOWN)
def test_known_points(target: float, sigma: float, reference: float) -> None:
    assert 0 <= epsilon(steps(sigma), DELTA) - reference < 0.003
    assert 1.05 < epsilon(steps(sigma), DELTA, "rdp") / reference < 1.2


@pytest.mark.parametrize(("target", "sigma"), [(known[0], known[1]) for known in KNOWN])
def test_calibration_finds_the_known_sigmas(target: float, sigma: float) -> None:
    found = calibrate(target, DELTA, steps)
    assert abs(found - sigma) < 0.0015
    assert epsilon(steps(found), DELTA) <= target < epsilon(steps(found * (1 - 2 * TOLERANCE)), DELTA)


@pytest.mark.parametrize(("sigma", "count"), [(0.3, 1), (1.0, 1), (5.0, 1), (5.0, 10), (40.0, 400), (0.5, 7)])
def test_without_sampling_it_is_the_gaussian_mechanism(sigma: float, count: int) -> None:
    true = solve(lambda at: gaussian_delta(sigma / math.sqrt(count), at), DELTA)
    found = epsilon([Release(sigma=sigma, count=count)], DELTA)
    assert -1e-9 <= found - true < max(0.003, 3e-4 * true)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.5), (0.1, 1.0), (0.5, 0.7), (0.9, 2.0), (0.001, 0.4)])
def test_one_sampled_release(q: float, sigma: float) -> None:
    true = solve(lambda at: sampled_delta(q, sigma, at), DELTA)
    found = epsilon([Release(sigma=sigma, q=q)], DELTA)
    assert -1e-9 <= found - true < 0.003


def test_different_releases_compose() -> None:
    """Gaussians compose to one with 1 / sigma^2 = sum of count / sigma_i^2."""
    basis, training = Release(sigma=3.0, what="basis"), Release(sigma=8.0, count=20)
    together = 1 / math.sqrt(1 / 9 + 20 / 64)
    true = solve(lambda at: gaussian_delta(together, at), DELTA)
    assert 0 <= epsilon([basis, training], DELTA) - true < 0.003
    assert epsilon([training, basis], DELTA) == epsilon([basis, training], DELTA)


def test_composition_against_simulation() -> None:
    """delta = E[(1 - exp(eps - L))+] over the privacy loss L of 12 sampled steps and a basis, by simulation."""
    q, sigma, count, sigma0, delta = 0.2, 1.0, 12, 2.0, 1e-3
    found = epsilon([Release(q=q, sigma=sigma, count=count), Release(sigma=sigma0, what="basis")], delta)
    draw, size = np.random.default_rng(0), 400_000
    loss = np.zeros(size)
    for _ in range(count):
        x = draw.normal(size=size) * sigma + (draw.random(size) < q)
        loss += np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
    x = draw.normal(size=size) * sigma0 + 1
    loss += (2 * x - 1) / (2 * sigma0**2)
    terms = np.maximum(0, -np.expm1(np.minimum(found - loss, 0)))
    assert abs(terms.mean() - delta) < 4 * terms.std() / math.sqrt(size)


def test_only_q_sigma_and_total_count_matter() -> None:
    whole = epsilon(steps(0.9), DELTA)
    parts = [Release(sigma=0.9, q=64 / 5000, count=700, what="a"), Release(sigma=0.9, q=64 / 5000, count=82, what="b")]
    assert epsilon(parts, DELTA) == whole
    assert epsilon(iter(parts), DELTA) == whole


@pytest.mark.parametrize(
    ("spent", "is_covered"),
    [
        ([], True),
        (steps(0.9, 0.1, 5), True),
        ([*steps(0.9, 0.1, 2), *steps(0.9, 0.1, 3)], True),
        ([*steps(0.9, 0.1, 5), Release(sigma=4.0, what="training")], True),  # names do not matter
        (steps(0.9, 0.1, 6), False),
        ([*steps(0.9, 0.1, 3), *steps(0.9, 0.1, 3)], False),
        ([Release(sigma=4.0, count=2)], False),
        (steps(0.9, 0.1000001, 1), False),
        (steps(0.8999999, 0.1, 1), False),
        (steps(9.0, 0.01, 1), False),  # costs less than any of the plan, but is not in it
    ],
)
def test_releases_that_a_plan_covers(spent: list[Release], is_covered: bool) -> None:
    planned = [Release(sigma=4.0, what="basis"), *steps(0.9, 0.1, 5)]
    assert covered(iter(spent), iter(planned)) is is_covered
    assert not is_covered or epsilon(spent, DELTA) <= epsilon(planned, DELTA)
    assert covered(spent, []) is (not spent)


def test_a_plan_covers_a_share_of_the_noise_as_large_as_its_own() -> None:
    planned = [Release(sigma=2.0, own_sigma=1.2, count=3)]
    for own_sigma, count, is_covered in ((1.2, 3, True), (1.2, 4, False), (1.0, 1, False), (None, 1, False)):
        assert covered([Release(sigma=2.0, own_sigma=own_sigma, count=count)], planned) is is_covered


def test_it_grows_with_what_is_released_and_falls_with_noise_and_delta() -> None:
    base = {"sigma": 0.8, "q": 0.02, "count": 200}
    for key, values in {
        "sigma": (2.0, 1.2, 0.8, 0.5),
        "q": (0.005, 0.02, 0.1, 1.0),
        "count": (1, 50, 200, 800),
    }.items():
        found = [epsilon(steps(**{**base, key: value}), DELTA) for value in values]
        assert found == sorted(found) and len(set(found)) == len(values), (key, found)
    found = [epsilon(steps(**base), delta) for delta in (1e-3, 1e-5, 1e-7, 1e-9)]
    assert found == sorted(found) and len(set(found)) == 4


def test_nothing_released_and_nothing_hidden() -> None:
    assert epsilon([], DELTA) == 0.0
    for sigma in (0.0, 1e-300, 0.019):
        assert epsilon([*steps(1.0), Release(sigma=sigma)], DELTA) == math.inf
    assert 100 < epsilon([Release(sigma=0.05)], DELTA) < math.inf
    assert 1e6 < epsilon([Release(sigma=0.02, count=1_000_000)], DELTA) < math.inf


def test_next_to_nothing_released() -> None:
    """delta is above q here: publishing the drawn row as it is would do."""
    assert epsilon([Release(sigma=40.0, q=1e-4)], 2e-4) == 0
    assert epsilon([Release(sigma=1.0, q=1e-12, count=100)], DELTA) < 0.002


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_it_is_a_plain_number(accountant: accounting.Accountant) -> None:
    assert type(epsilon(steps(1.0), DELTA, accountant)) is float


def test_renyi_is_above() -> None:
    for q, sigma, count in itertools.product((0.001, 0.05, 1.0), (0.6, 2.0), (1, 1000)):
        assert epsilon(steps(sigma, q, count), DELTA) <= epsilon(steps(sigma, q, count), DELTA, "rdp"), (
            q,
            sigma,
            count,
        )


@pytest.mark.parametrize(
    ("sigma", "count", "delta"),
    [(14.824655115861043, 1000, 1.50015e-11), (98.52870184340962, 30_000, 3.0003e-10), (60.0, 10_000, 1.0001e-10)],
)
def test_small_deltas_stay_above_the_true_epsilon(sigma: float, count: int, delta: float) -> None:
    """The transforms err by up to 5e-17 a release, which must not come out as a smaller epsilon than the true one."""
    true = solve(lambda at: gaussian_delta(sigma / math.sqrt(count), at), delta)
    assert 0 < epsilon([Release(sigma=sigma, q=1 - 1e-12, count=count)], delta) - true < 0.01


def test_a_delta_that_float64_does_not_resolve() -> None:
    with pytest.raises(UserError, match="below what float64 resolves for 10000 releases, 1e-10"):
        epsilon(steps(60.0, 0.5, 10_000), 0.9e-10)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_that_is_none(delta: float) -> None:
    with pytest.raises(UserError, match=r"delta = .* in \(0, 1\)"):
        epsilon([], delta)
    with pytest.raises(UserError, match=r"delta = .* in \(0, 1\)"):
        calibrate(1.0, delta, steps)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_is_none(target: float) -> None:
    with pytest.raises(UserError, match="A target of epsilon"):
        calibrate(target, DELTA, steps)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"q": 0.0}, "sampling rate q = 0.0"),
        ({"q": 1.01}, "sampling rate q = 1.01"),
        ({"q": math.nan}, "sampling rate q = nan"),
        ({"sigma": -1.0}, "sigma = -1.0"),
        ({"sigma": math.inf}, "sigma = inf"),
        ({"sigma": math.nan}, "sigma = nan"),
        ({"count": 0}, "0 releases"),
    ],
)
def test_releases_that_are_none(values: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Release(**{"sigma": 1.0, **values})  # type: ignore[arg-type]


def test_an_unknown_accountant() -> None:
    with pytest.raises(UserError, match=r"no accountant 'prv'.* pld, rdp"):
        epsilon(steps(1.0), DELTA, "prv")  # type: ignore[arg-type]


def test_a_target_out_of_reach() -> None:
    basis = Release(sigma=1.8, what="basis")  # alone epsilon 2.2
    with pytest.raises(UserError, match=r"epsilon = 2.0 cannot be reached.*still 2\.\d+"):
        calibrate(2.0, DELTA, lambda sigma: [basis, *steps(sigma)])
    assert calibrate(3.0, DELTA, lambda sigma: [basis, *steps(sigma)]) > calibrate(3.0, DELTA, steps)


@pytest.mark.parametrize(("target", "q", "count"), [(0.05, 1.0, 1), (1.0, 1e-4, 2000), (40.0, 0.05, 30)])
def test_calibration_far_from_the_usual(target: float, q: float, count: int) -> None:
    sigma = calibrate(target, DELTA, lambda sigma: steps(sigma, q, count))
    assert epsilon(steps(sigma, q, count), DELTA) <= target < epsilon(steps(sigma / 1.002, q, count), DELTA)


def test_calibrations_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def gaussians(sigma: float) -> list[Release]:
        return [Release(sigma=sigma, count=3)]

    sigma = calibrate(2.0, DELTA, gaussians)
    (file,) = tmp_path.rglob("*.json")
    searches: list[float] = []
    search = accounting._smallest
    monkeypatch.setattr(accounting, "_smallest", lambda target, spent: searches.append(target) or search(target, spent))
    assert calibrate(2.0, DELTA, gaussians) == sigma
    assert searches == []

    for other in (
        lambda: calibrate(2.5, DELTA, gaussians),
        lambda: calibrate(2.0, 2e-5, gaussians),
        lambda: calibrate(2.0, DELTA, lambda s: [Release(sigma=s, count=4)]),
        lambda: calibrate(2.0, DELTA, lambda s: [Release(sigma=s, count=3, q=0.5)]),
        lambda: calibrate(2.0, DELTA, lambda s: [Release(sigma=1.1 * s, count=3)]),
    ):
        searches.clear()
        assert other() != sigma
        assert len(searches) == 1

    good = file.read_text()
    unsafe = json.dumps({**json.loads(good), "sigma": 0.9 * sigma})
    foreign = json.dumps({**json.loads(good), "arguments": {}})
    no_number = json.dumps({**json.loads(good), "sigma": "1"})
    for content in ("", "{", "[]", unsafe, foreign, no_number, good.replace(str(sigma), "NaN")):
        file.write_text(content)
        searches.clear()
        assert calibrate(2.0, DELTA, gaussians) == sigma
        assert searches == [2.0], content
        assert file.read_text() == good


def test_a_cache_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    assert calibrate(2.0, DELTA, lambda sigma: [Release(sigma=sigma)]) > 1

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert calibrate(2.0, DELTA, lambda sigma: [Release(sigma=sigma)]) > 1


def test_the_cache_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gaussians(sigma: float) -> list[Release]:
        return [Release(sigma=sigma)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sigma = calibrate(2.0, DELTA, gaussians)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "sigma": 2 * sigma}))  # enough, so it would be used
    assert calibrate(2.0, DELTA, gaussians) == 2 * sigma
    monkeypatch.setenv("FEDSB_CALIBRATION_CACHE", "off")
    assert calibrate(2.0, DELTA, gaussians) == sigma
    assert calibrate(2.5, DELTA, gaussians) < sigma
    assert list(tmp_path.rglob("*.json")) == [file]
    monkeypatch.setenv("FEDSB_CALIBRATION_CACHE", "0")
    with pytest.raises(UserError, match="FEDSB_CALIBRATION_CACHE=0 is invalid"):
        calibrate(2.0, DELTA, gaussians)


def test_the_cache_is_where_the_user_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, by the XDG specification
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    calibrate(2.0, DELTA, lambda sigma: [Release(sigma=sigma)])
    assert [file.parent for file in tmp_path.rglob("*.json")] == [tmp_path / ".cache" / "fedsb" / "calibrations"]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r'pip install "fedsb\[privacy\]"'):
        epsilon(steps(1.2345), DELTA)


def test_the_accountants_library_writes_nothing_to_the_terminal() -> None:
    """RDP leaves out an order that does not converge, and would warn of it in the middle of a run's own lines."""
    script = (
        "from fedsb.privacy.accounting import Release, epsilon\n"
        "print(epsilon([Release(q=0.266667, sigma=1.258019, count=9)], 1e-3, 'rdp') > 0)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("True\n", "")


def test_imports_are_lazy() -> None:
    code = (
        "import sys, fedsb.privacy.ledger, fedsb.privacy.noise, fedsb.privacy.plan;"
        "sys.exit(any(name in sys.modules for name in ('dp_accounting', 'scipy', 'cryptography', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.long
def test_over_a_grid() -> None:
    """RDP is above PLD everywhere, and PLD at most 0.002 (or 0.1 %) above what far finer intervals give."""
    import dp_accounting as dp

    grid = itertools.product((1e-4, 0.0128, 0.2, 1.0), (0.4, 0.7, 1.5, 6.0, 40.0), (1, 30, 800, 30_000), (1e-4, 1e-8))
    for case in grid:
        q, sigma, count, delta = case
        ours, renyi = (epsilon(steps(sigma, q, count), delta, accountant) for accountant in ("pld", "rdp"))
        assert ours <= max(renyi, 0.005), (case, ours, renyi)  # below, the intervals of PLD show
        if 0.02 < ours < 40:
            fine = dp.pld.PLDAccountant(value_discretization_interval=min(1e-4, 0.003 / math.sqrt(count)))
            reference = fine.compose(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(sigma)), count).get_epsilon(delta)
            # The finer one is itself above the true epsilon, by up to about 0.0005 where many steps sample little.
            assert -0.0005 < ours - reference < max(0.002, 1e-3 * ours), (case, ours, reference)
