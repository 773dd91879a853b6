"""Which clients take part, which receive a broadcast in float32, and what that costs with a codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedit import FedIT
from fedsb.methods.flexlora import FlexLoRA
from fedsb.methods.flora import FLoRA
from fedsb.methods.rolora import RoLoRA
from fedsb.protocol.prices import PricedRun, price
from fedsb.protocol.schedule import Broadcasts, broadcasts, sample

NAMES = ["a", "b", "c", "d", "e"]


def config(clients_per_round: int | None, rounds: int = 6, seed: int = 0) -> Config:
    server = {"clients_per_round": clients_per_round, "min_clients": 1}
    return load_config({"server": server, "rounds": rounds, "seed": seed}).config


def test_a_sample_is_a_function_of_seed_and_round() -> None:
    drawn = [sample(NAMES, round, config(2)) for round in range(20)]
    assert drawn == [sample(NAMES, round, config(2)) for round in range(20)]
    assert all(len(names) == 2 and names == sorted(names) for names in drawn)
    assert {name for names in drawn for name in names} == set(NAMES)
    assert drawn != [sample(NAMES, round, config(2, seed=1)) for round in range(20)]
    assert sample(NAMES, 3, config(5)) == sample(NAMES, 3, config(9)) == NAMES


def in_float32(config: Config, method: Method, other_rank: Sequence[str] = ()) -> list[int]:
    found = broadcasts(NAMES, config, method, other_rank)
    return [found.in_float32(method, round) for round in range(config.rounds)]


def test_where_all_take_part_only_clients_of_another_rank_receive_float32() -> None:
    assert in_float32(config(None), FedSB(rank=2)) == [0] * 6
    assert in_float32(config(None), FedSB(rank=2), ["b", "d"]) == [0, 2, 2, 2, 2, 2]  # all compute the start
    assert in_float32(config(None), FedIT(rank=2)) == [0] * 6


@pytest.mark.parametrize("method", [RoLoRA(rank=2), FlexLoRA(rank=2)])
def test_a_client_that_missed_a_round_receives_float32(method: Method) -> None:
    cohorts = [set(sample(NAMES, round, config(3))) for round in range(6)]
    wanted = [0] + [len(now - before) for before, now in pairwise(cohorts)]
    assert in_float32(config(3), method) == wanted
    assert 0 < sum(wanted[1:]) < 15


def test_all_receive_a_start_that_only_the_server_knows() -> None:
    steps_ahead = load_config({"rounds": 3, "basis": {"kind": "core", "R0": "step"}}).config
    clients = len(NAMES)
    assert in_float32(steps_ahead, FedSB(rank=2)) == [clients, 0, 0]
    assert in_float32(steps_ahead, FedIT(rank=2)) == [0, 0, 0]  # it has no basis


def test_a_sample_of_clients_receives_the_tensors_in_the_codec() -> None:
    """Where the method takes a mean in fixed coordinates: then no client keeps what it has received."""
    assert in_float32(config(3), FedSB(rank=2)) == in_float32(config(3), FedIT(rank=2)) == [0] * 6
    got = in_float32(config(3), FedSB(rank=2), ["b"])
    assert got == [int(round > 0 and "b" in sample(NAMES, round, config(3))) for round in range(6)]


def test_price_by_hand() -> None:
    """2 layers of 3 x 3 and a head of 110: 128 values, which in int4 are 64 bytes and two scales of 2, in float32 512.

    4 clients, 2 rounds: 8 updates of 68; no values in the first broadcasts, because clients compute the start; later
    3 of 68, and one of 512 to a client that missed the first round. With a quarter of the values it is 32 of 128, 16
    bytes and one scale. A first step that only the server knows is sent in float32.
    """
    shapes = {"x": (20, 10), "y": (10, 20)}
    run = PricedRun(shapes=shapes, head=110, clients=4, rounds=2, codec="int4", broadcasts=Broadcasts(late=[4, 1]))
    got = price(FedSB(rank=3), run)
    assert (got.up_bytes, got.down_bytes) == (8 * 68, 3 * 68 + 512)
    assert got.total_bytes_without_head == 11 * (68 - 58) + 512 * 18 // 128  # 68 x 110 / 128: 58
    part = price(FedSB(rank=3), replace(run, fraction=0.25))
    assert (part.up_bytes, part.down_bytes) == (8 * 18, 3 * 18 + 512)
    ahead = price(FedSB(rank=3), replace(run, broadcasts=Broadcasts(late=[4, 1], steps_ahead=True)))
    assert ahead.down_bytes == 3 * 68 + 5 * 512
    sampled = price(FedSB(rank=3), replace(run, codec="int2", broadcasts=Broadcasts(sampled=True, late=[4, 4])))
    assert (sampled.up_bytes, sampled.down_bytes) == (8 * (32 + 2 + 4), 4 * 68)  # int4 is the coarsest without feedback


def test_a_method_that_changes_the_base_is_priced_in_float32() -> None:
    shapes = {"x": (40, 60)}
    coded, plain = (
        price(FLoRA(rank=2), PricedRun(shapes=shapes, head=7, clients=3, rounds=4, codec=codec))
        for codec in ("int8", "float32")
    )
    assert coded == plain
    assert plain.up_bytes == 12 * 207 * 4
