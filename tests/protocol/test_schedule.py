"""Which clients take part, which receive a whole broadcast, and what that costs with a codec."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.flora import FLoRA
from fedsb.protocol.prices import PricedRun, price
from fedsb.protocol.schedule import sample, whole_broadcasts

NAMES = ["a", "b", "c", "d", "e"]


def config(clients_per_round: int, rounds: int = 6, seed: int = 0) -> Config:
    server = {"clients_per_round": clients_per_round, "min_clients": 1}
    return load_config({"server": server, "rounds": rounds, "seed": seed}).config


def test_a_sample_is_a_function_of_seed_and_round() -> None:
    drawn = [sample(NAMES, round, config(2)) for round in range(20)]
    assert drawn == [sample(NAMES, round, config(2)) for round in range(20)]
    assert all(len(names) == 2 and names == sorted(names) for names in drawn)
    assert {name for names in drawn for name in names} == set(NAMES)
    assert drawn != [sample(NAMES, round, config(2, seed=1)) for round in range(20)]
    assert sample(NAMES, 3, config(5)) == sample(NAMES, 3, config(9)) == NAMES


def test_all_clients_receive_one_whole_broadcast_where_all_take_part() -> None:
    assert whole_broadcasts(NAMES, config(5), FedSB(rank=2), []) == [5, 0, 0, 0, 0, 0]
    assert whole_broadcasts(NAMES, config(5), FedSB(rank=2), ["b", "d"]) == [
        5,
        2,
        2,
        2,
        2,
        2,
    ]  # a different rank: in every round


def test_a_client_that_missed_a_round_receives_a_whole_broadcast() -> None:
    cohorts = [set(sample(NAMES, round, config(3))) for round in range(6)]
    wanted = [3] + [len(now - before) for before, now in pairwise(cohorts)]
    assert whole_broadcasts(NAMES, config(3), FedSB(rank=2), []) == wanted
    assert 0 < sum(wanted[1:]) < 15


def test_price_by_hand() -> None:
    """2 layers of 3 x 3 and a head of 110: 128 values, which in int4 are 64 bytes and two scales of 2, in float32 512.

    4 clients, 2 rounds: 8 updates of 68; 5 broadcasts of 512 and 3 of 68.
    """
    shapes = {"x": (20, 10), "y": (10, 20)}
    got = price(FedSB(rank=3), PricedRun(shapes=shapes, head=110, clients=4, rounds=2, codec="int4", whole=[4, 1]))
    assert got.up_bytes == 8 * 68
    assert got.down_bytes == 5 * 512 + 3 * 68
    assert got.total_bytes_without_head == pytest.approx(got.total_bytes * 18 / 128, rel=0.03)  # 68 x 110 / 128: 58


def test_a_method_that_changes_the_base_is_priced_in_float32_on_the_way_down() -> None:
    shapes = {"x": (40, 60)}
    coded, plain = (
        price(FLoRA(rank=2), PricedRun(shapes=shapes, head=7, clients=3, rounds=4, codec=codec, whole=[3, 0, 0, 0]))
        for codec in ("int8", "float32")
    )
    assert coded.down_bytes == plain.down_bytes
    assert coded.up_bytes == 12 * (207 + 4 * 2) < plain.up_bytes == 12 * 207 * 4
