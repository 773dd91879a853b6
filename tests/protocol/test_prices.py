"""Prices by hand, and MiniLM's known numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsb.adapters.adapted import AdaptedModel
from fedsb.config.training import BasisConfig
from fedsb.methods.base import Method
from fedsb.methods.central import Central
from fedsb.methods.fed_sb import FedSB
from fedsb.methods.fedex_lora import FedExLoRA
from fedsb.methods.fedit import FedIT
from fedsb.methods.ffa_lora import FFALoRA
from fedsb.methods.flora import FLoRA
from fedsb.methods.local import Local
from fedsb.models.layers import find_targets
from fedsb.protocol.prices import PricedBasis, PricedRun, price, price_list
from fedsb.reporting.prices import bytes_line
from fedsb.training.basis import basis_values
from fedsb.utils.formatting import GLUE

TOY = {"up": (20, 10), "down": (10, 20)}  # m + n = 30 in both, m n = 200


@pytest.fixture(scope="module")
def minilm() -> AdaptedModel:
    """all-MiniLM-L6's shapes as a classifier of TREC's six classes, without weights."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=6
    )
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    return AdaptedModel(model, kind="core", targets=find_targets(model, head=["classifier"]), head=["classifier"])


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        (FedSB(rank=3), 18, 18),  # 2 layers x 3^2
        (FedSB(rank=3, blocks=2), 36, 36),
        (FedIT(rank=2), 120, 120),  # 2 layers x 2 x 30
        (FFALoRA(rank=2), 60, 60),  # 2 x 20 + 2 x 10
        (FLoRA(rank=1), 60, 240),  # every one of 4 clients' factors comes down
        (FLoRA(rank=2), 120, 400),  # which is dearer than the matrix
        (FedExLoRA(rank=1), 60, 60 + 2 * 3 * 30),  # the residual's rank is 3
        (FedExLoRA(rank=4), 240, 240 + 2 * 200),  # its factors, 360, would be dearer than the matrix
        (Local(rank=3), 0, 0),
        (Central(rank=3), 0, 0),
    ],
)
def test_traffic_of_a_toy_with_four_clients(method: Method, up: int, down: int) -> None:
    traffic = method.traffic(TOY, head=7, clients=4)
    assert (traffic.up, traffic.down) == (up, down)
    assert traffic.head == (0 if isinstance(method, (Local, Central)) else 7)


def test_price_of_a_run_by_hand() -> None:
    """4 clients x 5 rounds, 18 core and 7 head values each way; a basis of 150 values at 6 sites; 4 bytes a value."""
    run, basis = PricedRun(shapes=TOY, head=7, clients=4, rounds=5), PricedBasis(up=100, down=50, clients=6)
    got = price(FedSB(rank=3), run, basis, this_run=True)
    assert got.one_off_bytes == 6 * 150 * 4
    assert got.up_bytes == got.down_bytes == 20 * 25 * 4
    assert got.total_bytes == 3600 + 2 * 2000
    assert got.total_bytes_without_head == 3600 + 2 * 20 * 18 * 4
    assert got.this_run


def test_a_price_in_a_codec_also_states_the_bytes_in_float32() -> None:
    basis = PricedBasis(up=100, down=50, clients=6)
    run = PricedRun(shapes=TOY, head=7, clients=4, rounds=5)
    plain = price(FedIT(rank=2), run, basis)
    coded = price(FedIT(rank=2), replace(run, codec="int2", fraction=0.5), basis)
    assert coded.float32_bytes == plain.float32_bytes == plain.total_bytes > 10 * coded.total_bytes
    label = {"label": "fedit (rank 4)", "this_run": False}
    own = {"label": "fed-sb (rank 2)", "this_run": True, "total_bytes": 7, "float32_bytes": 70}
    line = bytes_line([own, {**label, "total_bytes": 2000, "float32_bytes": 3000}]).replace(GLUE, " ")
    assert line.endswith("7 B by all clients in all rounds; FedIT would send 2.00 kB (3.00 kB in float32) at rank 4")
    older = bytes_line([own, {**label, "total_bytes": 2000}]).replace(GLUE, " ")
    assert older.endswith("; FedIT would send 2.00 kB at rank 4")


def test_price_list_has_this_run_first_and_the_others_cheapest_first() -> None:
    prices = price_list(FedSB(rank=8), PricedRun(shapes=TOY, head=0, clients=2, rounds=1), PricedBasis(clients=2))
    assert prices[0].this_run and prices[0].label == "fed-sb (rank 8)"
    others = prices[1:]
    assert [p.total_bytes for p in others] == sorted(p.total_bytes for p in others)
    labels = [p.label for p in others]
    assert "fed-sb (rank 8)" not in labels  # not twice
    assert {"fed-sb (rank 32)", "fedit (rank 4)", "fedit (rank 1)", "flora (rank 4)", "ffa-lora (rank 1)"} <= set(
        labels
    )
    assert not any(label.startswith(("local", "central")) for label in labels)
    assert not any(p.this_run for p in others)


@pytest.mark.parametrize(
    ("method", "values"),
    [(FedSB(rank=32), 36_864), (FedSB(rank=8), 2_304), (FedIT(rank=4), 165_888), (FedIT(rank=1), 41_472)],
)
def test_minilms_known_numbers(minilm: AdaptedModel, method: Method, values: int) -> None:
    """6 x (4 x (384 + 384) + 2 x (384 + 1536)) = 41,472; 36 x 32^2 = 36,864; the head is 384 x 6 + 6."""
    head = sum(t.numel() for t in minilm.head_tensors().values())
    assert (len(minilm.shapes), head) == (36, 2_310)
    traffic = method.traffic(minilm.shapes, head=head, clients=8)
    assert (traffic.up, traffic.down, traffic.head) == (values, values, 2_310)


@pytest.mark.parametrize(
    ("basis", "up", "down"),
    [
        ({"kind": "random"}, 0, 0),
        ({"kind": "weights"}, 0, 0),
        ({"kind": "update"}, 0, 2 * 2 * 30),  # r (m + n) a layer
        ({"kind": "update-pooled"}, 0, 120),
        ({"kind": "core"}, 2 * 25, 2 * 2 * 5 * 2),  # k = half of min(m, n) = 5, below 8 r
        ({"kind": "core", "outer_rank": 7}, 2 * 49, 2 * 2 * 7 * 2),
        ({"kind": "core", "outer_rank": 99}, 2 * 100, 2 * 2 * 10 * 2),  # at most min(m, n)
        ({"kind": "core", "outer_rank": 1}, 2 * 4, 2 * 2 * 2 * 2),  # at least r
    ],
)
def test_values_of_a_basis(basis: dict[str, Any], up: int, down: int) -> None:
    settings = BasisConfig(**basis)
    assert basis_values(settings, FedSB(rank=2), TOY) == {"up": up, "down": down}
    assert basis_values(settings, FedIT(rank=2), TOY) == {"up": 0, "down": 0}


def test_core_takes_4_r_where_the_layer_is_large() -> None:
    assert basis_values(BasisConfig(kind="core"), FedSB(rank=2), {"x": (100, 90)}) == {"up": 64, "down": 2 * 8 * 2}
