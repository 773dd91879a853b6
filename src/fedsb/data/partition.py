"""Which client holds which rows of a table: iid, by label skew, by a column, or by size.

Every row goes to exactly one client (`column` may drop small clients, and says how many rows each had). The draws
are keyed by (seed, "partition"), so a split is a function of the seed and of the table alone.

`dirichlet` draws, for each label, the clients' shares of its rows from Dir(alpha, ..., alpha): Yurochkin et al.,
"Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, arXiv:1905.12022. It is the finite-table
form of Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, arXiv:1909.06335, who draw each client's shares of the labels. Small alpha: a label lies with
few clients. Large alpha: iid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsb.utils.errors import UserError, did_you_mean
from fedsb.utils.rng import keyed_generator

KINDS = ("iid", "dirichlet", "column", "size")
MAX_REDRAWS = 200  # of a Dirichlet split that leaves a client under min_rows


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one client holds."""

    name: str
    rows: list[int]  # ascending positions in the table


@dataclass(frozen=True, kw_only=True)
class Partition:
    """All clients, in order, and the natural clients left out because they hold too few rows."""

    shards: list[Shard]
    dropped: dict[str, int]  # client's name -> its rows


def split_rows(
    kind: str,
    n_rows: int,
    *,
    clients: int,  # not read by `column`, where the values are the clients
    seed: int,
    labels: Sequence[Any] | None,  # (n_rows,) for `dirichlet`
    column: Sequence[Any] | None,  # (n_rows,) for `column`
    alpha: float,
    sizes: Sequence[float] | None,  # (clients,) relative sizes for `size`; None is 1, 2, ..., clients
    min_rows: int,
) -> Partition:
    """Splits `n_rows` rows over clients.

    Raises UserError: an unknown kind, more clients than rows, a client with fewer than max(1, min_rows) rows, alpha
    or a size that is not above 0, labels or a column that are missing or hold nothing in some row.
    """
    if kind not in KINDS:
        raise UserError(f"there is no partition {kind!r}: {did_you_mean(kind, KINDS)}")
    floor = max(1, min_rows)
    if kind == "column":
        return _by_column(_given(column, n_rows, kind), floor)
    if clients < 1:
        raise UserError(f"clients = {clients}: there must be at least 1")
    if clients > n_rows:
        raise UserError(f"{clients} clients for {n_rows} rows: a client needs a row; take {n_rows} clients or fewer")
    if kind == "dirichlet":
        held = _by_label(_given(labels, n_rows, kind), clients, alpha, seed, floor)
    else:
        counts = _counts(n_rows, np.ones(clients) if kind == "iid" else _relative_sizes(sizes, clients))
        held = np.split(keyed_generator(seed, "partition").permutation(n_rows), np.cumsum(counts)[:-1])
    named = zip(client_names(clients), held, strict=True)
    shards = [Shard(name=name, rows=sorted(rows.tolist())) for name, rows in named]
    for shard in shards:
        if len(shard.rows) < floor:
            raise UserError(
                f"{shard.name} holds {len(shard.rows)} of {n_rows} rows, fewer than {floor}: take fewer clients, "
                "lower min_rows or give it a larger size"
            )
    return Partition(shards=shards, dropped={})


def client_names(clients: int) -> list[str]:
    """Of clients that no column names: client-00, client-01, ..."""
    width = max(2, len(str(clients - 1)))
    return [f"client-{k:0{width}}" for k in range(clients)]


def _given(values: Sequence[Any] | None, n_rows: int, kind: str) -> Sequence[Any]:
    what = "labels" if kind == "dirichlet" else "a column"
    if values is None:
        raise UserError(f"the partition {kind!r} needs {what}: name the column that holds them")
    if len(values) != n_rows:
        raise UserError(f"{len(values)} values of {what} for {n_rows} rows: give one a row")
    for position, value in enumerate(values):
        if value is None:
            raise UserError(f"row {position + 1} holds null where the partition {kind!r} needs {what}: fill it in")
    return values


def _relative_sizes(sizes: Sequence[float] | None, clients: int) -> NDArray[np.float64]:
    if sizes is None:
        return np.arange(1.0, clients + 1)
    if len(sizes) != clients:
        raise UserError(f"{len(sizes)} sizes for {clients} clients: give one a client")
    if not all(np.isfinite(size) and size > 0 for size in sizes):
        raise UserError(f"sizes = {list(sizes)}: every size must be a number above 0")
    return np.asarray(sizes, dtype=np.float64)


def _counts(n_rows: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """(clients,) whole counts that sum to n_rows, by largest remainder; the first client wins a tie."""
    exact = n_rows * shares / shares.sum()
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    most_short = np.argsort(counts - exact, kind="stable")[: n_rows - counts.sum()]
    counts[most_short] += 1
    return counts


def _by_label(labels: Sequence[Any], clients: int, alpha: float, seed: int, floor: int) -> list[NDArray[np.int64]]:
    if not 0 < alpha < np.inf:
        raise UserError(f"alpha = {alpha}: the Dirichlet split needs a number above 0 (0.1 skewed, 100 nearly iid)")
    by_label: dict[Any, list[int]] = {}
    for position, label in enumerate(labels):
        by_label.setdefault(label, []).append(position)
    rng = keyed_generator(seed, "partition")
    for _ in range(MAX_REDRAWS):
        parts: list[list[NDArray[np.int64]]] = []  # [label][client]
        for positions in by_label.values():
            counts = _counts(len(positions), rng.dirichlet(np.full(clients, alpha)))
            parts.append(np.split(rng.permutation(positions), np.cumsum(counts)[:-1]))
        held = [np.concatenate(of_client) for of_client in zip(*parts, strict=True)]
        if min(map(len, held)) >= floor:
            return held
    raise UserError(
        f"{MAX_REDRAWS} Dirichlet splits of {len(labels)} rows over {clients} clients with alpha = {alpha} all left a "
        f"client with fewer than {floor} rows: raise alpha, take fewer clients or lower min_rows"
    )


def _by_column(column: Sequence[Any], floor: int) -> Partition:
    """One client a value, named by its text, in order of first appearance."""
    held: dict[str, list[int]] = {}
    for position, value in enumerate(column):
        held.setdefault(str(value), []).append(position)
    kept = [Shard(name=name, rows=rows) for name, rows in held.items() if len(rows) >= floor]
    if not kept:
        most = max(map(len, held.values()), default=0)
        raise UserError(f"no client holds {floor} rows, the largest {most}: lower min_rows or choose another column")
    return Partition(shards=kept, dropped={name: len(rows) for name, rows in held.items() if len(rows) < floor})
