"""Validation: each kind of bad update is dropped with its client's name and reason; the good ones pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsb.adapters.layout import Layout
from fedsb.protocol.payload import Payload, pack
from fedsb.server.validation import UpdateRules, UpdateSpec, validate_updates
from fedsb.utils.errors import RunError

START = {"x.R": torch.full((2, 3), 5.0), "head.bias": torch.zeros(2)}


def spec_of(reference: dict[str, Tensor], metadata: frozenset[str] = frozenset()) -> UpdateSpec:
    layout = Layout.of(reference)
    model = layout.mask(frozenset(reference) - metadata)
    return UpdateSpec(layout=layout, reference=layout.flatten(reference).numpy(), model=model.numpy())


RULES = UpdateRules(run="run", round=4, basis="basis", expected=spec_of(START))


def update(
    client: str, change: float = 1.0, tensors: dict[str, Tensor] | None = None, **claims: Any
) -> tuple[str, bytes]:
    good = {**START, "x.R": START["x.R"] + change}
    payload = Payload.of(good if tensors is None else tensors, kind="update", run="run", round=4)
    return client, pack(dataclasses.replace(payload, **{"client": client, "samples": 10, "basis": "basis", **claims}))


def with_value(value: float) -> dict[str, Tensor]:
    tensors = {"x.R": torch.full((2, 3), 6.0), "head.bias": torch.zeros(2)}
    tensors["x.R"][1, 2] = value
    return tensors


def test_good_updates_pass_with_their_samples() -> None:
    updates, dropped = validate_updates([update("a", samples=3), update("b", samples=9)], RULES)
    assert not dropped
    assert [(u.client, u.weight) for u in updates] == [("a", 3.0), ("b", 9.0)]
    assert updates[0].tensors["x.R"].tolist() == [[6.0] * 3] * 2


def test_uniform_weights() -> None:
    rules = dataclasses.replace(RULES, weighting="uniform")
    updates, _ = validate_updates([update("a", samples=3), update("b", samples=9)], rules)
    assert [u.weight for u in updates] == [1.0, 1.0]


BAD = [
    pytest.param(
        update("bad", tensors=with_value(np.nan)), "'x.R' contains 1 values that are NaN or infinite", id="nan"
    ),
    pytest.param(
        update("bad", tensors=with_value(np.inf)), "'x.R' contains 1 values that are NaN or infinite", id="inf"
    ),
    pytest.param(
        update("bad", tensors={"x.R": torch.zeros(3, 2), "head.bias": torch.zeros(2)}),
        "'x.R' has shape (3, 2), expected (2, 3)",
        id="shape",
    ),
    pytest.param(
        update("bad", tensors={"y.R": torch.zeros(2, 3), "head.bias": torch.zeros(2)}),
        "wrong keys: missing 'x.R'; unknown 'y.R'",
        id="key",
    ),
    pytest.param(update("bad", tensors={}), "wrong keys: missing 'head.bias', 'x.R'", id="no tensors"),
    pytest.param(update("bad", run="other"), "its run is 'other', this round's is 'run'", id="foreign run"),
    pytest.param(update("bad", round=3), "its round is 4, this round's is 5", id="round"),
    pytest.param(update("bad", basis="of another seed"), "its basis is 'of another seed'", id="basis"),
    pytest.param(update("bad", kind="basis-up"), "its kind is 'basis-up'", id="kind"),
    pytest.param(("bad", update("a")[1]), "its client is 'a', this round's is 'bad'", id="another's name"),
    pytest.param(update("bad", samples=0), "claims 0 samples", id="no samples"),
    pytest.param(update("bad", samples=10**400), "samples, allowed are 1 to 1,000,000,000", id="absurd samples"),
    pytest.param(update("bad", samples=-5), "claims -5 samples", id="negative samples"),
    pytest.param(
        update("bad", change=1000.0),
        "its change has norm 2.45e+03 after 1 steps, 2.45e+03 per step. That is over 30 times",
        id="norm",
    ),
    pytest.param(("bad", update("bad")[1][:-1]), "Not a payload of fedsb", id="torn"),
    pytest.param(("bad", b""), "Not a payload of fedsb", id="nothing"),
]


@pytest.mark.parametrize(("reply", "said"), BAD)
def test_a_bad_update_is_dropped_with_its_reason(reply: tuple[str, bytes], said: str) -> None:
    updates, (dropped,) = validate_updates([update("a"), reply, update("b")], RULES)
    assert [u.client for u in updates] == ["a", "b"]
    assert dropped.client == "bad"
    assert said in dropped.reason


def test_a_second_update_of_a_client_is_dropped() -> None:
    updates, (dropped,) = validate_updates([update("a", samples=1), update("b"), update("a", samples=99)], RULES)
    assert [(u.client, u.weight) for u in updates] == [("a", 1.0), ("b", 10.0)]
    assert (dropped.client, dropped.reason) == ("a", "sent a second update in this round")


def test_all_bad_updates_of_a_round_at_once() -> None:
    bad = [(f"bad {i}", param.values[0][1]) for i, param in enumerate(BAD)]  # some now state another name too
    updates, dropped = validate_updates([update("a"), *bad, update("b")], RULES)
    assert [u.client for u in updates] == ["a", "b"]
    assert [d.client for d in dropped] == [name for name, _ in bad]


def test_too_few_good_updates_end_the_round() -> None:
    rules = dataclasses.replace(RULES, min_clients=2)
    with pytest.raises(RunError) as caught:
        validate_updates([update("a"), update("bad", samples=0)], rules)
    assert str(caught.value) == (
        "Round 5 has 1 good updates, but server.min_clients = 2 "
        "(bad: claims 0 samples, allowed are 1 to 1,000,000,000). The checkpoint of the last finished round is kept."
    )
    with pytest.raises(RunError, match="no client replied"):
        validate_updates([], rules)
    assert len(validate_updates([update("a"), update("b"), update("bad", samples=0)], rules)[0]) == 2


def test_an_outlier_counts_against_min_clients() -> None:
    with pytest.raises(RunError, match="far: its change has norm"):
        validate_updates(
            [update("a"), update("b"), update("far", change=1000)], dataclasses.replace(RULES, min_clients=3)
        )


def test_the_norm_is_that_of_the_change_and_not_of_the_tensor() -> None:
    """Values near 5 with changes near 0.001: 100 times that is an outlier although it hardly moves the tensor."""
    replies = [update("a", 0.001), update("b", 0.001), update("far", 0.1)]
    _, (dropped,) = validate_updates(replies, RULES)
    assert dropped.client == "far"
    updates, none = validate_updates(replies, dataclasses.replace(RULES, max_norm_ratio=float("inf")))
    assert len(updates) == 3 and not none


def test_clients_that_did_not_move_do_not_make_the_others_outliers() -> None:
    updates, dropped = validate_updates([update("a", 0), update("b", 0), update("c", 1)], RULES)
    assert len(updates) == 3 and not dropped


def test_one_client_alone_is_never_an_outlier() -> None:
    assert len(validate_updates([update("a", 1e6)], RULES)[0]) == 1


def test_metadata_are_not_part_of_the_norm() -> None:
    """A client whose rank falls by 15 has not changed its model by 15; and others' falling ranks hide no outlier."""
    expected = spec_of({**START, "rank": torch.tensor([30.0])}, metadata=frozenset({"rank"}))
    good = {**START, "x.R": START["x.R"] + 0.1}
    bad = {**good, "x.R": good["x.R"] + 90, "rank": torch.tensor([15.0])}
    sent = [
        update(name, tensors={**good, "rank": torch.tensor([rank])})
        for name, rank in zip("abc", (15.0, 30.0, 15.0), strict=True)
    ]
    rules = dataclasses.replace(RULES, expected=expected)
    updates, dropped = validate_updates([*sent, update("d", tensors=bad)], rules)
    assert [u.client for u in updates] == ["a", "b", "c"]
    assert "over 30 times" in dropped[0].reason


def test_a_client_of_another_rank_is_measured_by_its_own_shapes() -> None:
    smaller = spec_of({"x.R": torch.full((1, 1), 5.0), "head.bias": torch.zeros(2)})
    mixed = dataclasses.replace(RULES, at_rank={"b": smaller})
    tensors = {"x.R": torch.full((1, 1), 6.0), "head.bias": torch.zeros(2)}
    updates, dropped = validate_updates(
        [update("a"), update("b", tensors=tensors), update("c", tensors=tensors)], mixed
    )
    assert [u.client for u in updates] == ["a", "b"]
    assert "'x.R' has shape (1, 1), expected (2, 3)" in dropped[0].reason


def test_a_change_is_judged_per_step() -> None:
    """A client with a hundred times the rows takes a hundred times the steps, and moves a hundred times as far."""
    replies = [update("small", 1.0, samples=7), update("other", 1.0, samples=7), update("large", 100.0, samples=700)]
    rules = dataclasses.replace(RULES, steps={"small": 1, "other": 1, "large": 100})
    assert not validate_updates(replies, rules)[1]
    (dropped,) = validate_updates(replies, dataclasses.replace(RULES, steps={"small": 1, "other": 1, "large": 2}))[1]
    assert dropped.client == "large" and "after 2 steps" in dropped.reason


def test_a_client_must_state_its_own_number_of_rows() -> None:
    rules = dataclasses.replace(RULES, rows={"a": 10, "b": 10})
    updates, (dropped,) = validate_updates([update("a"), update("b", samples=999_999)], rules)
    assert [u.client for u in updates] == ["a"]
    assert dropped.reason == "claims 999999 samples, but it has 10 training rows in this run"
