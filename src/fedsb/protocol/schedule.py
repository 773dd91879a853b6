"""Who takes part in which round, known before the first: a function of (seed, round)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.utils.rng import keyed_generator


def sample(names: Sequence[str], round: int, config: Config) -> list[str]:
    """The clients of a round, in the order of `names`: all, or a draw keyed by (seed, round)."""
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
    """The rounds, counted from 0, before which the basis is made anew."""
    every = config.basis.refresh if method.adapter == "core" else None
    return list(range(every, config.rounds, every)) if every else []


def whole_broadcasts(names: Sequence[str], config: Config, method: Method, odd: Collection[str]) -> list[int]:
    """For each round, how many broadcasts a lossy codec leaves whole (link.py): all but those to clients that were in
    the round before, under the same basis; `odd` are the clients whose rank is not the method's."""
    cohorts = [set(sample(names, round, config)) for round in range(config.rounds)]
    up_to_date = [set[str](), *(cohort - set(odd) for cohort in cohorts)]
    for round in refreshes(config, method):
        up_to_date[round] = set()
    return [len(cohort - before) for cohort, before in zip(cohorts, up_to_date, strict=False)]
