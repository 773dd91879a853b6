"""The privacy cost of noised sums: epsilon at a delta, and the noise that a target epsilon needs.

A release adds N(0, (sigma clip)^2) to a sum whose terms have an L2 norm of at most clip, over rows drawn by Poisson
sampling: each row independently, with probability q. Releases compose by their privacy loss distributions (PLD:
Koskela, Jaelkoe, Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020, arXiv 1906.03049),
discretised so that epsilon is never below the true value (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the
Dots", PETS 2022, arXiv 2207.04380). Renyi DP (Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled
Gaussian Mechanism", arXiv 1908.10530) is the cross-check; its epsilon is a tenth to a fifth higher. Both come from
dp-accounting, and so does the calibration. There is no central-limit approximation, because it reports up to a quarter
too little.

Two data sets are neighbours if the place of one row (or client) is empty in one of them: it adds 0 to every sum. The
number of places is public and the same for both, because splits, sampling rates and divisors depend on it. Such
neighbours have the privacy losses of dp-accounting's add-or-remove relation at a fixed q. For neighbours that differ in
the content of one row the sensitivity is 2 clip: halve sigma in the accounting.

Limits: a delta below 1e-14 per release is refused, because the float64 transforms err by up to 5e-17 per release.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fedsb.utils.errors import RunError, UserError, did_you_mean
from fedsb.utils.extras import needs_extra
from fedsb.utils.files import cache_folder, write_atomic

Accountant = Literal["pld", "rdp"]
RELATION = "zero out one: its place is left empty, and how many there are is public"
Spent = tuple[tuple[float, float, int], ...]  # (q, sigma, count), each (q, sigma) once

CACHE = "FEDSB_CALIBRATION_CACHE"  # environment: "on" (the default) or "off"
TOLERANCE = 5e-4  # of a calibrated sigma, relative: with this much less noise the target would be exceeded
NO_NOISE = 0.02  # a sigma below it counts as no noise: one release of a row has an epsilon of 1000 or more
LARGEST_SIGMA = 1e6
HUGE = 1e5  # above this epsilon, the value of Renyi DP is precise enough
ABSOLUTE, RELATIVE = 2e-3, 2e-4  # of epsilon: an interval is fine enough if halving it changes less
ORDERS = (1.75, 2.25, 2.5, 2.75, 3.5, 4.5, *range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
FEW_ORDERS = (1.75, 2.5, 4, 8, 16, 64, 1024)  # for the order of magnitude of epsilon


@dataclass(frozen=True, kw_only=True)
class Release:
    """One noised sum, or `count` identical ones. sigma is the noise multiplier: the noise's std over the clip."""

    sigma: float
    q: float = 1.0  # Poisson sampling rate; 1: every row, the plain Gaussian mechanism
    count: int = 1
    what: str = "training"
    own_sigma: float | None = None  # of the client's own share, where other clients add the rest of the noise

    @property
    def sigma_alone(self) -> float:
        """The noise multiplier for those who know all of the noise but the client's own share."""
        return self.sigma if self.own_sigma is None else self.own_sigma

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise UserError(f"The sampling rate q = {self.q} of a release is invalid. It must be in (0, 1].")
        if not 0 <= self.sigma < math.inf:
            raise UserError(
                f"The noise multiplier sigma = {self.sigma} of a release is invalid. It must be finite and at least 0."
            )
        if self.count < 1:
            raise UserError(f"{self.count} releases are not a valid count. Leave out what was not released.")


def epsilon(releases: Iterable[Release], delta: float, accountant: Accountant = "pld", *, alone: bool = False) -> float:
    """Returns epsilon of all releases together, zeroing out one row: 0 if there are none, inf without noise.

    `alone`: if all others collude, so that only a client's own share of a shared noise counts.

    With "pld" this is an upper bound, at most about 0.002 (or 0.02 %, if more) above the true value: the interval of
    privacy losses is halved until that changes epsilon by less. A thousand releases take 0.1 s on one core, ten
    thousand up to 0.9 s. With "rdp" it is a looser upper bound.

    Raises UserError if delta is not in (0, 1) or too small for float64, if the accountant is unknown, and if
    dp-accounting is not installed.
    """
    check_delta(delta)
    spent = _merged(releases, alone=alone)
    if accountant not in ("pld", "rdp"):
        raise UserError(f"There is no accountant {accountant!r}; {did_you_mean(accountant, ('pld', 'rdp'))}")
    if not spent:
        return 0.0
    if any(sigma < NO_NOISE for _, sigma, _ in spent):
        return math.inf
    return _pld(spent, delta) if accountant == "pld" else _rdp(spent, delta)


def covered(spent: Sequence[Release], planned: Sequence[Release]) -> bool:
    """Returns whether `planned` contains each release of `spent`, with the same q and noise, at least as often.

    If so, epsilon of `spent` is at most that of `planned`, at every delta, because leaving out releases is
    post-processing. It need not be computed. The same is true of the clients' own shares of the noise.
    """
    for alone in (False, True):
        most = {(q, sigma): count for q, sigma, count in _merged(planned, alone=alone)}
        if any(count > most.get((q, sigma), 0) for q, sigma, count in _merged(spent, alone=alone)):
            return False
    return True


def check_delta(delta: float) -> None:
    """Raises UserError unless delta is a probability between 0 and 1."""
    if not 0 < delta < 1:
        raise UserError(f"delta = {delta} must be a probability in (0, 1), far below one over the number of rows.")


def calibrate(target: float, delta: float, releases_of: Callable[[float], Sequence[Release]]) -> float:
    """Returns the smallest sigma, to 0.05 %, with epsilon(releases_of(sigma), delta) <= target.

    The result is always on the safe side. A thousand releases take about a second on one core, a hundred thousand 6 s.
    The result is kept in the user's cache folder (`$XDG_CACHE_HOME/fedsb/calibrations`, else `~/.cache/...`) and
    verified when it is read there. The environment variable FEDSB_CALIBRATION_CACHE=off turns this off.

    Raises UserError if the target is not in (0, inf) or no noise reaches it, and as `epsilon` does.

    Args:
        releases_of: the releases at a sigma. The sigma of each must be proportional to the argument or independent of
            it.
    """
    check_delta(delta)
    if not 0 < target < math.inf:
        raise UserError(f"A target of epsilon = {target} is invalid. Take a positive number, such as 1 to 10.")

    def spent(sigma: float) -> float:
        return epsilon(releases_of(sigma), delta)

    # Two points identify releases whose sigmas are proportional to the argument or fixed.
    known = {str(sigma): _merged(releases_of(sigma)) for sigma in (1.0, 2.0)}
    arguments = {"target": target, "delta": delta, "tolerance": TOLERANCE, "releases": known}
    kept = _recall(arguments)
    if kept is not None and spent(kept) <= target:
        return kept
    sigma = _smallest(target, spent)
    _remember(arguments, sigma)
    return sigma


def _smallest(target: float, spent: Callable[[float], float]) -> float:
    """Brackets sigma between two powers of 2, then lets dp-accounting search there. `spent` falls as sigma grows."""
    low = high = 1.0
    while (at_high := spent(high)) > target:
        if high > LARGEST_SIGMA:
            raise UserError(
                f"epsilon = {target} cannot be reached. With noise of {high:.0f} times the clip it is still "
                f"{at_high:.3g}, spent by releases whose noise is fixed. Raise epsilon or the basis's noise."
            )
        low, high = high, 2 * high
    while low == high or spent(low) <= target:
        if low <= NO_NOISE:
            return NO_NOISE
        low, high = max(low / 2, NO_NOISE), low
    dp = _dp_accounting()
    bracket = dp.ExplicitBracketInterval(math.log(low), math.log(high))

    class Spent:
        """`spent` as an accountant. An event is the logarithm of sigma, so that the tolerance is relative."""

        ledger = dp.NoOpDpEvent()

        def compose(self, log_sigma: float) -> Spent:
            self.epsilon = min(spent(math.exp(log_sigma)), 1e3 * target)  # finite: the search interpolates
            return self

        def get_epsilon(self, delta: float) -> float:
            return self.epsilon

    found = dp.calibrate_dp_mechanism(Spent, float, target, 0.0, bracket, tol=TOLERANCE)
    return math.exp(found)


def _merged(releases: Iterable[Release], *, alone: bool = False) -> Spent:
    """Returns (q, sigma, count) of each kind of release. Order and names do not matter to epsilon."""
    counts: Counter[tuple[float, float]] = Counter()
    for release in releases:
        counts[float(release.q), float(release.sigma_alone if alone else release.sigma)] += release.count
    return tuple((q, sigma, count) for (q, sigma), count in sorted(counts.items()))


@lru_cache(maxsize=4096)
def _pld(spent: Spent, delta: float) -> float:
    dp = _dp_accounting()
    count = sum(row[2] for row in spent)
    if delta < 1e-14 * count:
        raise UserError(
            f"delta = {delta} is below what float64 resolves for {count} releases, {1e-14 * count:.0e}. Raise delta."
        )
    resolved = delta - 2e-16 * count  # four times the largest observed error of the transforms

    def at(interval: float) -> float:
        relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
        return _composed(dp.pld.PLDAccountant(relation, value_discretization_interval=interval), spent, resolved)

    rough = max(_rdp(spent, delta, FEW_ORDERS), 0.1)  # the magnitude of epsilon sets the first interval
    if rough > HUGE:
        return _rdp(spent, delta)
    interval = min(1e-3 * rough, max(0.1 / math.sqrt(count), 1e-4 * rough))
    value = math.inf
    for _ in range(16):
        finer = min(value, at(interval))
        if value - finer <= max(ABSOLUTE, RELATIVE * finer):
            return finer
        value, interval = finer, interval / 2
    return value  # still an upper bound


def _rdp(spent: Spent, delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    dp = _dp_accounting()
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    return _composed(dp.rdp.RdpAccountant(orders=orders, neighboring_relation=relation), spent, delta)


def _composed(accountant: Any, spent: Spent, delta: float) -> float:
    dp, logger = _dp_accounting(), logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # orders of Renyi DP that do not converge are left out: a looser bound
    try:
        for q, sigma, count in spent:
            gaussian = dp.GaussianDpEvent(sigma)
            accountant.compose(gaussian if q == 1 else dp.PoissonSampledDpEvent(q, gaussian), count)
        return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(level)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise needs_extra("dp_accounting") from error
    return dp_accounting


def _cache_file(text: str) -> Path:
    """Returns the file of a calibration. Raises RuntimeError if the user has no home folder."""
    return cache_folder() / "calibrations" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _cached() -> bool:
    """Returns whether calibrations are kept. Raises UserError for a setting other than "on" and "off"."""
    asked = os.environ.get(CACHE, "on").lower()
    if asked not in ("on", "off"):
        raise UserError(f"{CACHE}={asked} is invalid. Set this environment variable to on or off.")
    return asked == "on"


def _recall(arguments: dict[str, Any]) -> float | None:
    """Returns the sigma that was kept for the same arguments; None if there is no valid one."""
    if not _cached():
        return None
    text = json.dumps(arguments)
    with suppress(OSError, RuntimeError, ValueError):
        kept = json.loads(_cache_file(text).read_text())
        if isinstance(kept, dict) and kept.get("arguments") == json.loads(text):
            sigma = kept.get("sigma")
            if isinstance(sigma, float) and NO_NOISE <= sigma <= 2 * LARGEST_SIGMA:
                return sigma
    return None


def _remember(arguments: dict[str, Any], sigma: float) -> None:
    if not _cached():
        return
    text = json.dumps(arguments)
    with suppress(OSError, RuntimeError, RunError):
        write_atomic(_cache_file(text), json.dumps({"arguments": arguments, "sigma": sigma}).encode())
