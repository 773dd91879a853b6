"""The discrete Gaussian: noise on integers, which secure aggregation can sum from shares.

    P(Z = z) ~ exp(-z^2 / (2 sigma^2)),   z an integer

Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, arXiv 2004.00010: their
Algorithm 3 for many values at once. Clients' shares add up to such noise except for a term of
exp(-2 pi^2 sigma^2 / 2) (Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning
with Secure Aggregation", ICML 2021, arXiv 2102.06387, Theorem 1), which is below 1e-300 for every sigma of 10 or more.

Limits: the ledger accounts for the continuous Gaussian of the same sigma. Both satisfy the same concentrated
differential privacy (Theorem 4 of Canonne et al.), so the bound by Renyi DP is valid for this noise. The PLD figure is
that of the continuous noise; the discrete one's probabilities differ by up to a share of 1 / sigma, with sigma in
steps. Acceptance is decided in float64, so that probabilities are right to about 1e-15, not to the last bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsb.privacy.noise import Noise

LEAST = 10.0  # the smallest sigma, in steps, at which shares add up


def discrete_gaussian(noise: Noise, sigma: float, count: int) -> NDArray[np.int64]:  # (count,)
    """Returns `count` values of discrete Gaussian noise. Raises ValueError if sigma is below 10 or above 2^40."""
    if not LEAST <= sigma <= 2.0**40:
        raise ValueError(f"discrete noise of {sigma:g} steps is out of range. Sigma must be from {LEAST:g} to 2^40.")
    found = np.empty(0, np.int64)
    while len(found) < count:
        found = np.concatenate([found, _candidates(noise, sigma, 3 * (count - len(found)) + 16)])
    return found[:count]


def _candidates(noise: Noise, sigma: float, tries: int) -> NDArray[np.int64]:
    """Returns the accepted values of `tries` tries: discrete Laplace of scale t, thinned to the Gaussian."""
    t = np.floor(sigma) + 1
    u, keep_u, v, sign, keep = noise.uniform(5 * tries).reshape(5, tries)
    low, high = np.floor(u * t), np.floor(-np.log1p(-v))  # |y| = low + t high; P(high >= k) = exp(-k)
    size, negative = low + t * high, sign < 0.5
    accepted = (keep_u < np.exp(-low / t)) & ~(negative & (size == 0))
    accepted &= keep < np.exp(-np.square(size - sigma**2 / t) / (2 * sigma**2))
    whole: NDArray[np.int64] = np.where(negative, -size, size)[accepted].astype(np.int64)
    return whole
