"""The part of the values that is sent in a round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.protocol.part import Part, part_size
from fedsb.protocol.requirements import refuse_what_facts_forbid
from fedsb.utils.errors import ConfigError, UserError

LAYOUT = Layout((("a.R", (1, 5, 7)), ("b.rank", (1,)), ("c.R", (3, 11)), ("d", ())))
EXACT = {35, 69}  # b.rank and d
OTHERS = set(range(70)) - EXACT


def places(fraction: float, round: int, seed: int = 0) -> list[int]:
    return Part(seed=seed, round=round, fraction=fraction).places(LAYOUT).tolist()


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3, 0.25, 0.01])
def test_every_value_is_sent_in_each_period_and_single_values_in_every_round(fraction: float) -> None:
    period = math.ceil(1 / fraction)
    for cycle in range(2):
        sent = [places(fraction, cycle * period + i) for i in range(period)]
        assert all(each[:2] == sorted(EXACT) for each in sent)
        assert all(each[2:] == sorted(set(each[2:])) for each in sent)  # in order, and none twice
        assert {i for each in sent for i in each[2:]} == OTHERS
        assert {len(each) for each in sent} == {part_size(68, fraction) + 2}


def test_it_is_a_function_of_the_seed_the_round_and_the_layout() -> None:
    assert places(0.25, 3) == places(0.25, 3)
    others = [places(0.25, 2), places(0.25, 7), places(0.25, 3, seed=1)]
    assert all(other != places(0.25, 3) for other in others)


def test_a_method_that_alternates_sends_everything_in_the_end() -> None:
    """Its layout exists in every second round only."""
    sent = {i for round in range(0, 60, 2) for i in places(0.5, round)}
    assert sent == set(range(70))


def test_no_values_and_single_values_alone() -> None:
    part = Part(seed=0, round=0, fraction=0.5)
    assert part.places(Layout(())).tolist() == []
    assert part.places(Layout((("s", (1,)),))).tolist() == [0]
    assert (part.size(0), part.size(3), part.size(3, 2)) == (0, 2, 4)


def test_the_places_cannot_be_changed_by_their_reader() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Part(seed=0, round=0, fraction=0.5).places(LAYOUT)[0] = 1
    assert np.all(np.diff(Part(seed=0, round=0, fraction=1.0).places(LAYOUT)[2:]) > 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": {"name": "flora"}}, "the values of flora mean something else in each round"),
        ({"method": {"name": "flexlora"}}, "the values of flexlora mean something else in each round"),
        (
            {"method": {"name": "flora-na"}},
            "the values of flora-na mean something else in each round, or are not avera",
        ),
        ({"method": {"name": "fed-sb"}, "basis": {"kind": "random", "refresh": 2}}, "would be lost with a new basis"),
        ({"privacy": {"unit": "client", "noise_multiplier": 1.0}}, "which the clip does not bound then"),
        (
            {
                "privacy": {"unit": "example", "epsilon": 8.0},
                "server": {"secure_aggregation": True},
                "train": {"local_steps": 1},
            },
            "which the clip does not bound then",
        ),
    ],
)
def test_a_part_is_refused_where_the_rest_cannot_be_sent_later(settings: dict[str, Any], said: str) -> None:
    settings["server"] = {"fraction": 0.5, "weighting": "uniform", **settings.get("server", {})}
    config = load_config(settings).config
    with pytest.raises(UserError, match=rf"server\.fraction = 0\.5: .*{said}.* Set it to 1\."):
        refuse_what_facts_forbid(config, config.method)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, math.nan])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"server\.fraction"):
        load_config({"server": {"fraction": fraction}})


def test_the_old_name_is_understood() -> None:
    loaded = load_config({"server": {"secagg_fraction": 0.5}})
    assert loaded.config.server.fraction == 0.5
