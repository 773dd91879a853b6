"""Plans: what they release, what epsilon that is, how a budget is shared, and what is refused.

The figures are those of the known points: N = 5000, batch 64, 782 steps, delta 1e-5; here in 17 rounds of 46 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.plan import BasisNoise, PrivacyPlan, default_delta, signal_to_noise, worst_client
from fedsb.utils.errors import ConfigError, UserError

PLAN = PrivacyPlan(unit="example", clip=0.5, sigma=0.861, delta=1e-5, batch=64, rows=5000, steps=46, rounds=17)
CLIENTS = PrivacyPlan(unit="client", clip=2.0, sigma=5.0, delta=1e-5, batch=10, rows=40, steps=1, rounds=20)
BASIS = BasisNoise(clip=3.0, sigma=4.0)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_what_a_plan_releases() -> None:
    assert PLAN.q == 0.0128
    assert PLAN.noise_std == pytest.approx(0.4305)
    assert PLAN.releases() == (Release(q=0.0128, sigma=0.861, count=782),)
    assert PLAN.releases(rounds=3) == (Release(q=0.0128, sigma=0.861, count=138),)
    assert PLAN.releases(rounds=0) == ()
    assert PLAN.relation == "zero out one: its place is left empty, and how many there are is public"


def test_epsilon_is_known_beforehand() -> None:
    assert 2.994 < PLAN.epsilon() < 2.998
    assert 3.3 < PLAN.epsilon(accountant="rdp") < 3.6
    assert PLAN.epsilon(0) == 0
    assert PLAN.epsilon(5) == epsilon([Release(q=0.0128, sigma=0.861, count=230)], 1e-5)
    assert replace(PLAN, sigma=0.0).epsilon() == math.inf


def test_calibration_gives_a_new_plan() -> None:
    plan = PLAN.calibrate(5.0)
    assert plan == replace(PLAN, sigma=plan.sigma)
    assert abs(plan.sigma - 0.713) < 0.0015
    assert 4.99 < plan.epsilon() <= 5.0
    assert PLAN.sigma == 0.861
    with pytest.raises(FrozenInstanceError):
        plan.sigma = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(("every", "counts"), [(None, [1, 1, 1, 1, 1]), (3, [1, 1, 1, 2, 3]), (1, [1, 1, 3, 4, 7])])
def test_when_a_basis_is_made(every: int | None, counts: list[int]) -> None:
    """Before the first round, then before round `every`, 2 `every`, ... counted from 0."""
    basis = BasisNoise(clip=3.0, sigma=4.0, q=0.25, every=every)
    for rounds, count in zip((0, 1, 3, 4, 7), counts, strict=True):
        assert basis.release(rounds) == Release(sigma=4.0, q=0.25, count=count, what="basis")


def test_a_basis_is_composed_with_training() -> None:
    plan = replace(PLAN, basis=BASIS)
    basis = Release(sigma=4.0, what="basis")
    assert plan.releases(rounds=0) == (basis,)
    assert plan.releases() == (basis, *PLAN.releases())
    alone = epsilon([basis], 1e-5)
    assert max(alone, PLAN.epsilon()) < plan.epsilon() < alone + PLAN.epsilon()
    assert replace(PLAN, basis=replace(BASIS, sigma=0.0)).epsilon() == math.inf


def test_calibration_around_a_basis() -> None:
    plan = replace(PLAN, basis=BASIS).calibrate(3.0)
    assert plan.basis == BASIS
    assert plan.sigma > PLAN.calibrate(3.0).sigma
    assert 2.99 < plan.epsilon() <= 3.0
    with pytest.raises(UserError, match="made from private rows without noise"):
        replace(PLAN, basis=replace(BASIS, sigma=0.0)).calibrate(3.0)
    with pytest.raises(UserError, match="cannot be reached"):
        replace(PLAN, basis=replace(BASIS, sigma=1.0)).calibrate(3.0)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_share_of_the_budget(share: float) -> None:
    plan, why = replace(PLAN, basis=replace(BASIS, every=10)).share(3.0, share)
    assert plan.basis is not None
    alone = epsilon([Release(sigma=plan.basis.sigma, count=2)], 1e-5)
    assert 0.99 * share * 3 < alone <= share * 3
    assert 2.99 < plan.epsilon() <= 3.0
    assert (
        why
        == f"sigma {plan.basis.sigma:.3g} for the basis: alone it is epsilon {3 * share:.1f}, {share:.0%} of the target"
    )


def test_an_automatic_share() -> None:
    plan, why = replace(PLAN, basis=BasisNoise(clip=3.0)).share(3.0, "auto")
    free = PLAN.calibrate(3.0).sigma
    assert plan.basis is not None and plan.basis.clip == 3.0
    assert plan.sigma == pytest.approx(1.1 * free, rel=1e-12)
    assert 2.99 < plan.epsilon() <= 3.0
    assert replace(plan, basis=replace(plan.basis, sigma=0.99 * plan.basis.sigma)).epsilon() > 3.0
    assert f"rise by 10%, from {free:.3g} to {plan.sigma:.3g}" in why


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(UserError, match="It must be between 0 and 1"):
        replace(PLAN, basis=BASIS).share(3.0, share)
    with pytest.raises(UserError, match="nothing to share"):
        PLAN.share(3.0, "auto")


def test_clients_earn_no_amplification() -> None:
    """20 rounds of sigma 5 are one Gaussian of 5 / sqrt(20), whoever of the 40 is drawn."""
    from dp_accounting import get_epsilon_gaussian

    assert CLIENTS.q == 1.0
    assert CLIENTS.noise_std == 10.0
    assert CLIENTS.releases() == (Release(sigma=5.0, q=1.0, count=20),)
    assert 0 <= CLIENTS.epsilon() - get_epsilon_gaussian(5 / math.sqrt(20), 1e-5) < 0.003
    assert replace(CLIENTS, batch=1).epsilon() == CLIENTS.epsilon()


def test_each_site_plans_for_itself() -> None:
    """The same target asks more noise of a small site; with one sigma the smallest is the worst."""
    sites = {f"site-{rows}": replace(PLAN, rows=rows, rounds=4) for rows in (5000, 400, 1500)}
    spent = {name: plan.epsilon() for name, plan in sites.items()}
    assert worst_client(sites) == ("site-400", max(spent.values()))
    own = {name: plan.calibrate(4.0) for name, plan in sites.items()}
    assert own["site-400"].sigma > own["site-1500"].sigma > own["site-5000"].sigma
    assert 3.99 < worst_client(own)[1] <= 4.0


def test_the_worst_client_by_rounds_taken_part_in() -> None:
    sites = {"small": replace(PLAN, rows=4000), "large": PLAN}
    assert worst_client(sites, {"small": 2, "large": 17}) == ("large", PLAN.epsilon())
    assert worst_client(sites, {"small": 0, "large": 0})[1] == 0
    with pytest.raises(UserError, match="one unit and one delta"):
        worst_client({"a": PLAN, "b": replace(PLAN, delta=1e-6)})
    with pytest.raises(UserError, match="one unit and one delta"):
        worst_client({"a": PLAN, "b": CLIENTS})
    with pytest.raises(UserError, match="one unit and one delta"):
        worst_client({})


@pytest.mark.parametrize(
    ("unit", "rows", "delta"),
    [
        ("example", [100, 5000], 1e-5),
        ("example", [10_000], 1e-5),
        ("example", [100, 20_000, 7], 5e-6),
        ("client", [10, 1_000_000], 1e-5),
    ],
)
def test_the_default_delta(unit: Any, rows: list[int], delta: float) -> None:
    value, reason = default_delta(unit, iter(rows))
    assert value == pytest.approx(delta, rel=1e-12)
    assert (str(max(rows)) in reason) == (unit == "example")


def test_signal_to_noise() -> None:
    """64 rows of length clip against noise of 0.861 clip on each of 10,000 values: 64 / 86.1."""
    assert signal_to_noise(PLAN, 10_000) == pytest.approx(64 / 86.1)
    assert signal_to_noise(replace(PLAN, clip=7.0), 10_000) == signal_to_noise(PLAN, 10_000)
    assert signal_to_noise(replace(PLAN, sigma=0.0), 10_000) == math.inf
    with pytest.raises(UserError, match="0 trained values"):
        signal_to_noise(PLAN, 0)


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        (PLAN, {"unit": "user"}, "unit = 'user'"),
        (PLAN, {"clip": 0.0}, "clip = 0.0"),
        (PLAN, {"clip": -1.0}, "clip = -1.0"),
        (PLAN, {"clip": math.nan}, "clip = nan"),
        (PLAN, {"clip": math.inf}, "clip = inf is out of range"),
        (PLAN, {"clip": 1e-27}, "clip = 1e-27 is out of range. Set it to a value from 1e-09 to 1e[+]09"),
        (PLAN, {"basis": BasisNoise(clip=1e-27)}, "clip=1e-27"),
        (PLAN, {"sigma": -0.1}, "sigma = -0.1"),
        (PLAN, {"sigma": math.inf}, "sigma = inf"),
        (PLAN, {"sigma": math.nan}, "sigma = nan"),
        (PLAN, {"delta": 0.0}, r"delta = 0.0 is invalid. It must be a probability"),
        (PLAN, {"delta": 1.0}, r"delta = 1.0 is invalid. It must be a probability"),
        (PLAN, {"delta": math.nan}, "delta = nan is invalid. It must be a probability"),
        (
            PLAN,
            {"delta": 2e-4},
            r"delta = 0.0002 is too large for 5000 rows: .* at most a tenth of 1/5000, 2e-05",
        ),
        (CLIENTS, {"delta": 0.025}, "delta = 0.025 is too large for 40 clients"),
        (PLAN, {"batch": 5001}, "an expected batch of 5001 from 5000 rows"),
        (CLIENTS, {"batch": 41}, "an expected batch of 41 from 40 clients"),
        (PLAN, {"batch": 0}, "an expected batch of 0"),
        (PLAN, {"rows": 0}, "an expected batch of 64 from 0 rows"),
        (PLAN, {"steps": -1}, "steps = -1"),
        (CLIENTS, {"steps": 2}, "steps = 2 is invalid. With unit = 'client' a round has one noised sum"),
        (PLAN, {"rounds": -1}, "rounds = -1"),
        (PLAN, {"basis": BasisNoise(clip=0.0)}, "clip=0.0"),
        (PLAN, {"basis": BasisNoise(clip=math.inf)}, "clip=inf"),
        (PLAN, {"basis": BasisNoise(clip=1.0, sigma=-1.0)}, "sigma=-1.0"),
        (PLAN, {"basis": BasisNoise(clip=1.0, q=0.0)}, "q=0.0"),
        (PLAN, {"basis": BasisNoise(clip=1.0, every=0)}, "a new basis every 0 rounds"),
    ],
)
def test_nonsense_is_refused(plan: PrivacyPlan, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        replace(plan, **changes)
    assert len(caught.value.faults) == 1


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(PLAN, clip=0.0, batch=6000, delta=1e-3)
    assert len(caught.value.faults) == 3


def test_a_plain_run_is_a_plan_without_noise() -> None:
    plain = replace(PLAN, clip=math.inf, sigma=0.0)
    assert plain.noise_std == 0.0
    assert plain.epsilon() == math.inf


@pytest.mark.parametrize("target", [0.0, -3.0, math.nan, math.inf])
def test_a_target_that_is_none(target: float) -> None:
    with pytest.raises(UserError, match="A target of epsilon"):
        PLAN.calibrate(target)
