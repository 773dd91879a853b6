"""Partitions of a table over clients: iid, by label skew, by a column, or by size.

Every row goes to exactly one client (`column` may drop small clients, and reports the rows of each). The draws are
keyed by (seed, "partition"), so a partition is a function of the seed and the table alone.

`dirichlet` draws, for each label, the clients' shares of its rows from Dir(alpha, ..., alpha): Yurochkin et al.,
"Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, arXiv:1905.12022. It is the finite-table form
of Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
arXiv:1909.06335, who draw each client's shares of the labels. With a small alpha, each label is at few clients. A large
alpha is close to iid.
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
MAX_REDRAWS = 200  # of a Dirichlet partition that leaves a client below min_rows


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The rows of one client."""

    name: str
    rows: list[int]  # ascending positions in the table


@dataclass(frozen=True, kw_only=True)
class Partition:
    """All clients in order, and the natural clients that are left out because they have too few rows."""

    shards: list[Shard]
    dropped: dict[str, int]  # name of a client -> its number of rows


def split_rows(
    kind: str,
    n_rows: int,
    *,
    clients: int,  # ignored by `column`, whose values are the clients
    seed: int,
    values: Sequence[Any] | None,  # (n_rows,): the labels for `dirichlet`, the clients for `column`
    alpha: float,
    sizes: Sequence[float] | None,  # (clients,) relative sizes for `size`; None: 1, 2, ..., clients
    min_rows: int,
) -> Partition:
    """Splits `n_rows` rows over clients.

    Raises UserError for an unknown kind, more clients than rows, a client with fewer than max(1, min_rows) rows, an
    alpha or a size that is not above 0, and for labels or a column that are missing or have an empty value.
    """
    if kind not in KINDS:
        raise UserError(f"clients.partition = {kind!r} is not known: {did_you_mean(kind, KINDS)}.")
    floor = max(1, min_rows)
    if kind == "column":
        return _by_column(_require(values, n_rows, kind), floor)
    if clients < 1:
        raise UserError(f"clients = {clients} is too few. Set clients.count to at least 1.")
    if clients > n_rows:
        raise UserError(
            f"{clients} clients for {n_rows} rows are too many, because a client needs a row. Set clients.count to "
            f"{n_rows} or fewer."
        )
    if kind == "dirichlet":
        parts = _by_label(_require(values, n_rows, kind), clients, alpha, seed, floor)
    else:
        counts = _counts(n_rows, np.ones(clients) if kind == "iid" else _relative_sizes(sizes, clients))
        parts = np.split(keyed_generator(seed, "partition").permutation(n_rows), np.cumsum(counts)[:-1])
    named = zip(client_names(clients), parts, strict=True)
    shards = [Shard(name=name, rows=sorted(rows.tolist())) for name, rows in named]
    for shard in shards:
        if len(shard.rows) < floor:
            raise UserError(
                f"{shard.name} has {len(shard.rows)} of {n_rows} rows, fewer than {floor}. Set fewer clients, a lower "
                "clients.min_rows or a larger size for this client."
            )
    return Partition(shards=shards, dropped={})


def client_names(clients: int) -> list[str]:
    """Returns names for clients that no column names: client-00, client-01, ..."""
    width = max(2, len(str(clients - 1)))
    return [f"client-{k:0{width}}" for k in range(clients)]


def _require(values: Sequence[Any] | None, n_rows: int, kind: str) -> Sequence[Any]:
    """Returns the values. Raises UserError if they are missing or incomplete."""
    what = "labels" if kind == "dirichlet" else "a column"
    if values is None:
        raise UserError(f"The partition {kind!r} needs {what}. Name the column that contains them.")
    if len(values) != n_rows:
        raise UserError(f"{len(values)} values of {what} for {n_rows} rows do not match. Give one per row.")
    for position, value in enumerate(values):
        if value is None:
            raise UserError(f"Row {position + 1} has null where the partition {kind!r} needs {what}. Fill it in.")
    return values


def _relative_sizes(sizes: Sequence[float] | None, clients: int) -> NDArray[np.float64]:
    """Returns one relative size per client. Raises UserError for invalid sizes."""
    if sizes is None:
        return np.arange(1.0, clients + 1)
    if len(sizes) != clients:
        raise UserError(f"{len(sizes)} sizes for {clients} clients do not match. Give one per client in clients.sizes.")
    if not all(np.isfinite(size) and size > 0 for size in sizes):
        raise UserError(f"clients.sizes = {list(sizes)} is invalid. Every size must be a number above 0.")
    return np.asarray(sizes, dtype=np.float64)


def _counts(n_rows: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns (clients,) integer counts that sum to n_rows, by largest remainder. The first client wins a tie."""
    exact = n_rows * shares / shares.sum()
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    most_short = np.argsort(counts - exact, kind="stable")[: n_rows - counts.sum()]
    counts[most_short] += 1
    return counts


def _by_label(labels: Sequence[Any], clients: int, alpha: float, seed: int, floor: int) -> list[NDArray[np.int64]]:
    """Returns the rows of each client by a Dirichlet partition. Raises UserError if no draw fits."""
    if not 0 < alpha < np.inf:
        raise UserError(
            f"clients.dirichlet_alpha = {alpha} is invalid. It must be above 0 (0.1 is skewed, 100 nearly iid)."
        )
    by_label: dict[Any, list[int]] = {}
    for position, label in enumerate(labels):
        by_label.setdefault(label, []).append(position)
    rng = keyed_generator(seed, "partition")
    for _ in range(MAX_REDRAWS):
        parts: list[list[NDArray[np.int64]]] = []  # [label][client]
        for positions in by_label.values():
            counts = _counts(len(positions), rng.dirichlet(np.full(clients, alpha)))
            parts.append(np.split(rng.permutation(positions), np.cumsum(counts)[:-1]))
        rows = [np.concatenate(of_client) for of_client in zip(*parts, strict=True)]
        if min(map(len, rows)) >= floor:
            return rows
    raise UserError(
        f"{MAX_REDRAWS} Dirichlet partitions of {len(labels)} rows over {clients} clients with alpha = {alpha} all "
        f"left a client with fewer than {floor} rows. Raise clients.dirichlet_alpha, set fewer clients or lower "
        "clients.min_rows."
    )


def _by_column(column: Sequence[Any], floor: int) -> Partition:
    """Returns one client per value, named by its text, in order of first appearance."""
    rows_of: dict[str, list[int]] = {}
    for position, value in enumerate(column):
        rows_of.setdefault(str(value), []).append(position)
    kept = [Shard(name=name, rows=rows) for name, rows in rows_of.items() if len(rows) >= floor]
    if not kept:
        most = max(map(len, rows_of.values()), default=0)
        raise UserError(
            f"No client has {floor} rows; the largest has {most}. Lower clients.min_rows or choose a different column."
        )
    return Partition(shards=kept, dropped={name: len(rows) for name, rows in rows_of.items() if len(rows) < floor})
