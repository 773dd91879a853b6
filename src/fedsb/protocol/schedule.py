"""The cohorts of all rounds, a function of (seed, round), so that they are known before the first round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Broadcasts:
    """The broadcasts of a run that a lossy codec may leave in float32 (compressor.py).

    Args:
        sampled: whether some of the clients take part in a round.
        steps_ahead: whether a core starts with a first step that only the server knows.
        other_rank: in each round, the clients whose rank differs from the method's.
        late: in each round, those clients and the ones that missed the round before, or its basis; in the first, all.
    """

    sampled: bool = False
    steps_ahead: bool = False
    other_rank: Sequence[int] = ()
    late: Sequence[int] = ()

    def derived(self, method: Method, round: int) -> bool:
        """Returns whether clients compute the round's start themselves, so that its broadcast has no values."""
        return round == 0 and not (self.steps_ahead and method.adapter == "core")

    def in_float32(self, method: Method, round: int) -> int:
        """Returns how many of a round's broadcasts have all values in float32, with a lossy codec or a part."""
        if self.derived(method, round):
            return 0
        if method.spec.starts_afresh(sampled=self.sampled):
            return self.other_rank[round] if self.other_rank else 0
        return self.late[round] if self.late else 0


def broadcasts(names: Sequence[str], config: Config, method: Method, other_rank: Collection[str]) -> Broadcasts:
    """Returns the broadcasts of a run; `other_rank` are the clients whose rank differs from the method's."""
    cohorts, odd = [set(sample(names, round, config)) for round in range(config.rounds)], set(other_rank)
    up_to_date = [set[str](), *(cohort - odd for cohort in cohorts)]
    for round in refreshes(config, method):
        up_to_date[round] = set()
    return Broadcasts(
        sampled=config.server.clients_per_round is not None,
        steps_ahead=config.basis.steps_ahead,
        other_rank=[len(cohort & odd) for cohort in cohorts],
        late=[len(cohort - before) for cohort, before in zip(cohorts, up_to_date, strict=False)],
    )
