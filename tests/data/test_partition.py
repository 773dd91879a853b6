"""Every row goes to one client, as the kind says, and the faults are named."""

from collections import Counter

import pytest

from fedsb.data.partition import Partition, Shard, split_rows
from fedsb.utils.errors import UserError


def split(kind, n_rows, *, clients=4, seed=0, labels=None, column=None, alpha=0.5, sizes=None, min_rows=1):
    return split_rows(
        kind,
        n_rows,
        clients=clients,
        seed=seed,
        values=column if kind == "column" else labels,
        alpha=alpha,
        sizes=sizes,
        min_rows=min_rows,
    )


LABELS = [i % 3 for i in range(300)]


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size"])
def test_each_row_has_one_client_and_the_seed_decides(kind):
    made = split(kind, 300, labels=LABELS)
    assert sorted(row for shard in made.shards for row in shard.rows) == list(range(300))
    assert all(shard.rows == sorted(shard.rows) for shard in made.shards)
    assert [shard.name for shard in made.shards] == ["client-00", "client-01", "client-02", "client-03"]
    assert made == split(kind, 300, labels=LABELS)
    assert made != split(kind, 300, labels=LABELS, seed=1)
    assert made.dropped == {}


def counts(made):
    return [len(shard.rows) for shard in made.shards]


def test_sizes():
    assert counts(split("iid", 10, clients=4)) == [3, 3, 2, 2]
    assert counts(split("iid", 3, clients=3)) == [1, 1, 1]
    assert counts(split("size", 20)) == [2, 4, 6, 8]  # 1 : 2 : 3 : 4
    assert counts(split("size", 10, clients=3, sizes=[1, 1, 3])) == [2, 2, 6]
    assert counts(split("size", 11, clients=3, sizes=[1, 1, 3])) == [2, 2, 7]  # 2.2, 2.2, 6.6
    assert split("iid", 200, clients=101).shards[7].name == "client-007"


def test_a_small_alpha_gathers_labels_and_a_large_one_spreads_them():
    def most_of_a_label(alpha):
        made = split("dirichlet", 300, labels=LABELS, alpha=alpha)
        held = [Counter(LABELS[row] for row in shard.rows) for shard in made.shards]
        return max(count[label] for count in held for label in range(3))

    assert most_of_a_label(1000) < 32  # 25 each is even
    assert most_of_a_label(0.1) > 60
    assert counts(split("dirichlet", 300, labels=LABELS, alpha=1e-8, clients=2))[0] in (100, 200)


def test_dirichlet_draws_until_every_client_has_enough():
    first = min(counts(split("dirichlet", 300, labels=LABELS, alpha=0.3)))
    made = split("dirichlet", 300, labels=LABELS, alpha=0.3, min_rows=first + 1)
    assert min(counts(made)) > first
    with pytest.raises(UserError, match=r"Raise clients\.dirichlet_alpha, set fewer clients or lower"):
        split("dirichlet", 300, labels=LABELS, alpha=0.1, min_rows=75)


def test_natural_clients_keep_their_order_and_small_ones_are_told():
    made = split("column", 6, column=["b", "a", "b", "c", "a", "b"], min_rows=2)
    assert made == Partition(shards=[Shard(name="b", rows=[0, 2, 5]), Shard(name="a", rows=[1, 4])], dropped={"c": 1})
    assert [shard.name for shard in split("column", 3, column=[10, 2, 10]).shards] == ["10", "2"]


FAULTS = {
    "unknown": ({"kind": "dirichelt"}, "did you mean 'dirichlet'"),
    "too many": ({"kind": "iid", "clients": 11}, "11 clients for 10 rows"),
    "none": ({"kind": "iid", "clients": 0}, "clients = 0"),
    "min rows": ({"kind": "iid", "min_rows": 3}, "client-02 has 2 of 10 rows, fewer than 3"),
    "no row": ({"kind": "size", "clients": 2, "sizes": [1, 1000]}, "client-00 has 0 of 10 rows"),
    "size zero": ({"kind": "size", "clients": 2, "sizes": [0, 1]}, "Every size must be a number above 0"),
    "sizes": ({"kind": "size", "clients": 3, "sizes": [1, 1]}, "2 sizes for 3 clients"),
    "alpha": ({"kind": "dirichlet", "alpha": 0.0, "labels": LABELS[:10]}, "alpha = 0.0"),
    "labels": ({"kind": "dirichlet"}, "'dirichlet' needs labels"),
    "few labels": ({"kind": "dirichlet", "labels": [1]}, "1 values of labels for 10 rows"),
    "column": ({"kind": "column"}, "'column' needs a column"),
    "null": ({"kind": "column", "column": ["a", None] * 5}, "Row 2 has null"),
    "all small": (
        {"kind": "column", "column": ["a", "b"] * 5, "min_rows": 6},
        "No client has 6 rows; the largest has",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_split_that_cannot_be_is_refused(fault):
    wanted, message = FAULTS[fault]
    with pytest.raises(UserError) as raised:
        split(wanted["kind"], 10, **{name: value for name, value in wanted.items() if name != "kind"})
    assert message in str(raised.value)
