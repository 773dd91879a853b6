"""The cohorts of all rounds, a function of (seed, round), so that they are known before the first round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.utils.rng import keyed_generator


def sample(names: Sequence[str], round: int, config: Config) -> list[str]:
    """Returns the clients of a round, in the order of `names`: all, or a draw keyed by (seed, round)."""
    wanted = config.server.clients_per_round
    if wanted is None or wanted >= len(names):
        return list(names)
    chosen = keyed_generator(config.seed, "cohort", round).permutation(len(names))[:wanted]
    return [names[i] for i in sorted(chosen)]


def participation(names: Iterable[str], config: Config) -> dict[str, int]:
    """Returns the number of rounds in which each client takes part."""
    names = list(names)
    counts = Counter(name for round in range(config.rounds) for name in sample(names, round, config))
    return {name: counts[name] for name in names}


def refreshes(config: Config, method: Method) -> list[int]:
    """Returns the rounds, counted from 0, before which the basis is refreshed."""
    every = config.basis.refresh if method.adapter == "core" else None
    return list(range(every, config.rounds, every)) if every else []


def whole_broadcasts(names: Sequence[str], config: Config, method: Method, odd: Collection[str]) -> list[int]:
    """Returns how many broadcasts of each round a lossy codec leaves whole (protocol/compressor.py).

    These are all but the broadcasts to clients that were in the previous round with the same basis. `odd` contains the
    clients whose rank differs from the method's.
    """
    cohorts = [set(sample(names, round, config)) for round in range(config.rounds)]
    up_to_date = [set[str](), *(cohort - set(odd) for cohort in cohorts)]
    for round in refreshes(config, method):
        up_to_date[round] = set()
    return [len(cohort - before) for cohort, before in zip(cohorts, up_to_date, strict=False)]
