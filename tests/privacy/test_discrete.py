"""The discrete Gaussian has the probabilities that it states, and shares of it add up."""

from __future__ import annotations

import numpy as np
import pytest

from fedsb.privacy.discrete import discrete_gaussian
from fedsb.privacy.noise import SecretNoise, SeededNoise


@pytest.mark.parametrize("sigma", [10.0, 10.7, 37.3])
def test_each_number_is_as_likely_as_stated(sigma: float) -> None:
    """Chi-squared over all numbers within four sigma, at five standard deviations."""
    count = 400_000
    drawn = discrete_gaussian(SeededNoise(0, f"{sigma}"), sigma, count)
    assert drawn.shape == (count,) and drawn.dtype == np.int64
    z = np.arange(-int(4 * sigma), int(4 * sigma) + 1)
    everything = np.arange(-int(20 * sigma), int(20 * sigma) + 1)
    p = (
        np.exp(-(z.astype(float) ** 2) / (2 * sigma**2))
        / np.exp(-(everything.astype(float) ** 2) / (2 * sigma**2)).sum()
    )
    seen = np.array([(drawn == value).sum() for value in z])
    chi2, freedom = float(((seen - count * p) ** 2 / (count * p)).sum()), len(z) - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("sigma", [1e3, 1e7, 2.0**38])
def test_moments_at_the_sizes_of_a_ring(sigma: float) -> None:
    whole = discrete_gaussian(SecretNoise(), sigma, 200_000)
    drawn = whole / sigma
    assert abs(drawn.mean()) < 6 / np.sqrt(200_000)
    assert abs(drawn.std() - 1) < 6 / np.sqrt(2 * 200_000)
    assert abs((drawn**4).mean() - 3) < 6 * np.sqrt(96 / 200_000)
    assert abs((whole % 2).mean() - 0.5) < 6 * 0.5 / np.sqrt(200_000)  # as many odd ones as even ones


@pytest.mark.parametrize("sigma", [0.0, 9.9, -20.0, np.nan, np.inf, 2.0**41])
def test_sizes_whose_shares_do_not_add_up_are_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="discrete noise of"):
        discrete_gaussian(SecretNoise(), sigma, 3)


def test_none_is_none() -> None:
    assert discrete_gaussian(SecretNoise(), 10.0, 0).shape == (0,)
