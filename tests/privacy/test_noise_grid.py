"""The grid of shared noise: rounded rows are bounded and unbiased, and the sum's noise is as planned and accounted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.discrete import discrete_gaussian
from fedsb.privacy.grid import AGAIN, EXACT, NARROWEST, NoiseGrid
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.plan import PrivacyPlan, SharedNoise
from fedsb.utils.errors import ConfigError, UserError


def plan(clients: int = 3, honest: int = 3, **changes: Any) -> PrivacyPlan:
    facts = {"clip": 0.5, "delta": 1e-5, "batch": 96, "rows": 1000, "steps": 1, "rounds": 40, "sigma": 1.5, **changes}
    shared = SharedNoise(clients=clients, honest=honest, rows=3 * facts["rows"])
    return PrivacyPlan(unit="example", shared=shared, **facts)


def rows_of(size: int, count: int = 2000, *, clip: float = 0.5) -> torch.Tensor:
    """Rows at the clip: dense ones, and ones with a single large value."""
    draw = torch.Generator().manual_seed(size)
    dense = torch.randn(count, size, generator=draw)
    dense[count // 2 :] *= torch.rand(count - count // 2, size, generator=draw) ** 8
    return dense * (clip / dense.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("size", [1, 5, 100, 9000])
def test_no_rounded_row_is_longer_than_the_grids_clip(size: int) -> None:
    grid = NoiseGrid.of(plan(), size)
    rounded = grid.round_rows(rows_of(size), torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.round())
    lengths = rounded.double().norm(dim=1) * grid.gamma
    assert float(lengths.max()) <= grid.clip * (1 + 1e-12) == 0.505 * (1 + 1e-12)
    assert ((rounded * grid.gamma - rows_of(size)).abs() <= grid.gamma * 1.001).all()


def test_rounding_has_no_bias_and_seldom_repeats() -> None:
    size, rows = 400, rows_of(400, 1).repeat(20_000, 1)
    grid = NoiseGrid.of(plan(), size)
    once = (rows / grid.gamma + torch.rand(rows.shape, generator=torch.Generator().manual_seed(1))).floor()
    assert float((once.double().norm(dim=1) * grid.gamma > grid.clip).double().mean()) <= AGAIN
    mean = grid.round_rows(rows, torch.Generator().manual_seed(2)).double().mean(0) * grid.gamma
    assert float((mean - rows[0]).abs().max()) < 5 * grid.gamma * 0.5 / math.sqrt(20_000)


def test_a_row_that_is_too_long_is_rounded_again() -> None:
    """Without the condition the grid would be far too coarse for the clip: every second row is longer."""
    grid = NoiseGrid(gamma=0.02, clip=math.sqrt(0.25 + 0.02**2 * 400 / 6), sigma=20, bits=16)
    rows = rows_of(400)
    assert float((rows / 0.02 + torch.rand(rows.shape)).floor().norm(dim=1).max()) * 0.02 > grid.clip
    assert float(grid.round_rows(rows, torch.Generator().manual_seed(0)).double().norm(dim=1).max()) * 0.02 <= grid.clip


def test_bits_follow_from_rows_noise_and_clients() -> None:
    bits = {b: NoiseGrid.of(plan(batch=b), 8500).bits for b in (1, 96, 768)}
    assert bits == {1: 15, 96: 18, 768: 20}
    assert NoiseGrid.of(plan(sigma=200.0), 8500).bits == 21
    assert NoiseGrid.of(plan(clients=50, honest=45, sigma=200.0), 8500).bits == 21
    assert NoiseGrid.of(plan(batch=1, sigma=0.0), 1).bits == NARROWEST


def test_sums_that_fit_into_no_ring_are_refused() -> None:
    with pytest.raises(UserError, match=r"do not fit into 32 bits\. Lower the rank or the batch"):
        NoiseGrid.of(plan(batch=3000), 10**13)
    with pytest.raises(UserError, match=r"would be .* steps of the grid; it must be 10 or more"):
        NoiseGrid.of(plan(sigma=0.01), 4)


def test_a_row_of_the_widest_ring_is_exact_in_float32() -> None:
    """What is rounded in float32 and added as whole numbers must not lose a bit."""
    grid = NoiseGrid.of(plan(), 10**7)
    assert grid.clip / grid.gamma < EXACT / 256


# --- the noise of the sum ---


@pytest.mark.parametrize(("clients", "honest"), [(3, 3), (3, 2), (8, 7)])
def test_the_noise_of_the_sum_is_as_planned_for_the_honest_and_larger_for_all(clients: int, honest: int) -> None:
    size, draws = 500, 400  # 200,000 values
    grid = NoiseGrid.of(plan(clients, honest), size)
    sources = [SeededNoise(0, str(k)) for k in range(clients)]
    shares = np.stack([discrete_gaussian(source, grid.sigma, size * draws) for source in sources]) * grid.gamma
    planned = 1.5 * grid.clip
    for count, wanted in ((honest, planned), (clients, planned * math.sqrt(clients / honest))):
        found = shares[:count].sum(0)
        z = found / wanted
        deviation = math.sqrt(2 / z.size)  # of a variance of 1
        assert abs(float(np.mean(z**2)) - 1) < 5 * deviation
        assert abs(float(np.mean(z))) < 5 / math.sqrt(z.size)
        assert abs(float(np.mean(z**4)) - 3) < 5 * math.sqrt(96 / z.size)
    assert abs(float(np.corrcoef(shares[0], shares[1])[0, 1])) < 5 / math.sqrt(shares.shape[1])


def test_shares_add_up_to_a_discrete_gaussian() -> None:
    """The sum of h discrete Gaussians is one, but for a term of this size (Theorem 1 of the paper)."""
    for clients, honest in ((3, 3), (50, 45)):
        grid = NoiseGrid.of(plan(clients, honest, sigma=0.4), 5000)
        worst = 10 * (honest - 1) * math.exp(-2 * math.pi**2 * grid.sigma**2 / 2)
        assert worst < 1e-300


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_the_discrete_gaussian_has_the_epsilon_of_the_continuous_one(sigma: float) -> None:
    """Over whole numbers delta(epsilon) differs by less than 1e-5 of itself: less than the accountant rounds up."""
    grid = NoiseGrid.of(plan(sigma=sigma), 5000)
    shift = math.ceil(grid.clip / grid.gamma)  # a row along one axis: the coarsest privacy losses
    s = sigma * shift
    z = np.arange(-40 * int(s), 40 * int(s))
    for target in (0.5, 1.0, 3.0):
        p, q = (np.exp(-((z - mean) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi)) for mean in (0, shift))
        discrete = float(np.maximum(p - math.exp(target) * q, 0).sum())
        a = shift / (2 * s)
        exact = norm.cdf(a - target / (2 * a)) - math.exp(target) * norm.cdf(-a - target / (2 * a))
        if exact > 1e-12:
            assert discrete == pytest.approx(exact, rel=1e-5)


# --- plans ---


def test_a_plan_with_shared_noise_draws_from_all_rows_and_has_two_epsilons() -> None:
    shared = plan().calibrate(3.0)
    local = PrivacyPlan(unit="example", clip=0.5, delta=1e-5, batch=96, rows=3000, steps=1, rounds=40)
    assert shared.q == 96 / 3000
    assert shared.sigma == local.calibrate(3.0).sigma  # as all rows in one place
    assert shared.own_sigma == shared.sigma / math.sqrt(3)
    assert shared.epsilon() <= 3.0 < shared.own_epsilon()
    (release,) = shared.releases()
    assert release.sigma_alone == shared.own_sigma and release.q == shared.q
    assert shared.own_epsilon() == epsilon([Release(q=shared.q, sigma=shared.own_sigma, count=40)], 1e-5)
    assert plan(honest=1).own_epsilon() == plan(honest=1).epsilon()


def test_a_plan_with_several_steps_of_shared_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match="With shared noise a round is one step: the influence of a row"):
        plan(steps=2)
