"""The epsilon that the private runs of a comparison spend together. They train on the same rows, so it composes.

The ledgers of every run stay in the comparison's folder, even if the run did not finish:

    ledgers/<cell>-<attempt>/cell/privacy/<client>.jsonl
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedsb.comparison.contenders import Contender
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.ledger import merged, read_ledger
from fedsb.privacy.plan import DELTA
from fedsb.utils.formatting import delta_text, epsilon_text

Json = dict[str, Any]
Run = dict[str, tuple[Release, ...]]  # client -> what it released


def planned_epsilon(contenders: Sequence[Contender], cells: int) -> str | None:
    """Returns a line on the epsilon that the private runs can spend together; None if none is private.

    `cells` is the number of cells per contender. The epsilons are added; the epsilon of the ledgers is smaller.
    """
    private = [contender.config.privacy for contender in contenders if contender.config.privacy.on]
    if not private:
        return None
    runs = cells * len(private)
    if any(privacy.epsilon is None for privacy in private):
        total = "the sum of the epsilons in `fedsb check`"
    else:
        total = f"epsilon {epsilon_text(cells * sum(privacy.epsilon or 0.0 for privacy in private))}"
    return (
        f"privacy: {runs} private runs on the same rows spend at most {total} together, at {runs} times the delta. "
        "Choosing among them by scores on private rows is not covered"
    )


def epsilon_together(folder: Path, contenders: Sequence[Contender]) -> Json | None:
    """Returns the epsilon of all ledgers in the folder together; None if there are none.

    If the clients are the same in all runs (clients.partition = "column"), the releases of each client compose, and the
    largest epsilon counts. Otherwise a row can belong to any client of a run, so the largest sampling rate, the least
    noise and the most steps of a run's clients count together.
    """
    runs = [run for path in sorted((folder / "ledgers").glob("*")) if (run := _run(path))]
    if not runs:
        return None
    fixed = all(contender.config.clients.partition == "column" for contender in contenders)
    rows = list(_by_client(runs) if fixed else [[release for run in runs for release in _worst(run)]])
    delta = _delta(contenders)
    spent = max(epsilon(releases, delta) for releases in rows)
    alone = max(epsilon(releases, delta, alone=True) for releases in rows)
    also = f" ({epsilon_text(alone)} by each client's own share of noise)" if alone > spent else ""
    units = sorted({contender.config.privacy.unit for contender in contenders if contender.config.privacy.on})
    return {
        "runs": len(runs),
        "units": units,
        "epsilon": spent,
        "delta": delta,
        "says": f"All {len(runs)} private runs together spent epsilon {epsilon_text(spent)} at delta "
        f"{delta_text(delta)}, according to their ledgers in ledgers/{also}. This bounds what several of them, or a "
        f"choice among them, reveal about one {' or '.join(units)}.",
    }


def _run(folder: Path) -> Run:
    paths = sorted((folder / "cell" / "privacy").glob("*.jsonl"))
    return {
        json.loads(path.read_text().split("\n", 1)[0])["client"]: releases
        for path in paths
        if (releases := merged(read_ledger(path)))
    }


def _by_client(runs: Sequence[Run]) -> Iterator[list[Release]]:
    """Yields the releases of each client. A run that pools rows, or whose server adds noise, has one ledger."""
    for client in {client for run in runs for client in run}:
        yield [
            release
            for run in runs
            for release in (run.get(client) or (next(iter(run.values())) if len(run) == 1 else ()))
        ]


def _worst(run: Run) -> Iterator[Release]:
    """Yields releases that spend at least as much as those of any client."""
    by_what: dict[str, list[tuple[Release, ...]]] = defaultdict(list)
    for releases in run.values():
        for what in {release.what for release in releases}:
            by_what[what].append(tuple(release for release in releases if release.what == what))
    for what, clients in by_what.items():
        each = [release for releases in clients for release in releases]
        yield Release(
            what=what,
            q=max(release.q for release in each),
            sigma=min(release.sigma for release in each),
            own_sigma=min(release.sigma_alone for release in each),
            count=max(sum(release.count for release in releases) for releases in clients),
        )


def _delta(contenders: Sequence[Contender]) -> float:
    """Returns the smallest delta of the contenders. A smaller delta makes epsilon larger."""
    given = [contender.config.privacy.delta for contender in contenders if contender.config.privacy.on]
    return min([delta for delta in given if isinstance(delta, float)], default=DELTA)
