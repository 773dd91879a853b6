"""The discrete Gaussian: noise on whole numbers, which a secure sum can carry in shares.

    P(Z = z) ~ exp(-z^2 / (2 sigma^2)),   z a whole number

Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, arXiv 2004.00010: their
Algorithm 3 for many values at once. Clients' shares add up to such noise but for a term of exp(-2 pi^2 sigma^2 / 2)
(Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
ICML 2021, arXiv 2102.06387, Theorem 1), which is below 1e-300 for each sigma from 10 on.

Limits: the ledger books the continuous Gaussian of the same sigma. Both satisfy the same concentrated differential
privacy (Theorem 4 of Canonne et al.), so the bound by Renyi DP holds for this noise as it stands. The PLD figure is
that of the continuous noise; the discrete one's probabilities differ by up to a share of 1 / sigma, sigma in steps.
What is accepted is decided in float64, so that probabilities are right to some 1e-15, not to the last bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsb.privacy.noise import Noise

LEAST = 10.0  # sigma, in steps, from which on shares add up


def discrete_gaussian(noise: Noise, sigma: float, count: int) -> NDArray[np.int64]:  # (count,)
    """Raises ValueError where sigma is below 10 or above 2^40."""
    if not LEAST <= sigma <= 2.0**40:
        raise ValueError(f"discrete noise of {sigma:g} steps: it takes {LEAST:g} to 2^40")
    found = np.empty(0, np.int64)
    while len(found) < count:
        found = np.concatenate([found, _candidates(noise, sigma, 3 * (count - len(found)) + 16)])
    return found[:count]


def _candidates(noise: Noise, sigma: float, tries: int) -> NDArray[np.int64]:
    """Those of so many tries that are accepted: discrete Laplace of scale t, thinned to the Gaussian below it."""
    t = np.floor(sigma) + 1
    u, keep_u, v, sign, keep = noise.uniform(5 * tries).reshape(5, tries)
    low, high = np.floor(u * t), np.floor(-np.log1p(-v))  # |y| = low + t high; P(high >= k) = exp(-k)
    size, negative = low + t * high, sign < 0.5
    accepted = (keep_u < np.exp(-low / t)) & ~(negative & (size == 0))
    accepted &= keep < np.exp(-np.square(size - sigma**2 / t) / (2 * sigma**2))
    whole: NDArray[np.int64] = np.where(negative, -size, size)[accepted].astype(np.int64)
    return whole
