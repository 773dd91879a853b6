"""The mechanism: a row's gradient is cut to the clip whatever its scale, and nothing is drawn that was not charged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import set_all
from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.privacy.ledger import Ledger, read_ledger
from fedsb.privacy.mechanism import DPMechanism, UnsafeReleaseError
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.plan import BasisNoise, PrivacyPlan
from fedsb.runs.run import federate
from fedsb.training import per_example
from fedsb.training.per_example import add_clipped, norms
from fedsb.utils.errors import RunError

LAYOUT = Layout((("a", (4,)),))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield


def guarded(folder: Path, **changes: Any) -> DPMechanism:
    settings = {"clip": 0.5, "delta": 1e-5, "batch": 8, "rows": 32, "steps": 3, "rounds": 2, "sigma": 1.0, **changes}
    ledger = Ledger.create(folder / "a.jsonl", run="x", client="a", unit="example")
    return DPMechanism(plan=PrivacyPlan(unit="example", **settings), ledger=ledger, noise=SeededNoise(0, "a"))


# --- the clip ---


@pytest.mark.parametrize(
    ("clip", "scale"),
    [(1e-27, scale) for scale in (1e-30, 1e-24, 1e-20)]
    + [(clip, scale) for clip in (1e-9, 1.0) for scale in (1e-24, 1e-8, 1.0, 1e12)],
)
def test_no_row_enters_a_sum_longer_than_the_clip(scale: float, clip: float) -> None:
    """The squares of small entries are 0 in float32: a norm in float32 would be 0, and the row would not be clipped."""
    sums = torch.zeros(1, 30_007)
    add_clipped(sums, torch.full((2, 30_007), scale), torch.tensor([0, 0]), clip)
    length = float(sums.double().norm())
    wanted = 2 * min(clip, scale * math.sqrt(30_007))  # both rows point the same way
    assert length == pytest.approx(wanted, rel=1e-5, abs=0)


def test_the_norm_of_ten_million_values_is_exact() -> None:
    """A float32 sum of squares is too small by a tenth of a percent, and the clipped row too long by as much."""
    found = norms(torch.full((1, 10_000_000), 1e-3))
    assert float(found) == pytest.approx(1e-3 * math.sqrt(10_000_000), rel=1e-6)


def test_the_product_of_the_clip_is_in_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 or TF32, as model.float32_matmul_precision may ask, a clipped row could be longer than the clip."""
    used: list[str] = []
    product = torch.Tensor.__matmul__

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        used.append(torch.get_float32_matmul_precision())
        return product(a, b)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
        add_clipped(torch.zeros(1, 4), torch.ones(2, 4), torch.tensor([0, 0]), 1.0)
        assert set(used) == {"highest"} and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_sum_longer_than_its_rows_allow_is_not_released(tmp_path: Path) -> None:
    mechanism = guarded(tmp_path, basis=BasisNoise(clip=0.5, sigma=1.0))
    mechanism.charge(1)
    mechanism.mean(torch.full((4,), 0.5), 2, LAYOUT)  # exactly 2 x 0.5
    for total, rows in (torch.full((4,), 0.51), 2), (torch.tensor([1e-20, 0, 0, 0]), 0):
        with pytest.raises(
            UnsafeReleaseError, match=f"the sum of {rows} clipped gradients is longer than {rows} x 0.5"
        ):
            mechanism.mean(total, rows, LAYOUT)
    mechanism.charge_basis(0)
    with pytest.raises(UnsafeReleaseError, match="Nothing was released"):
        mechanism.basis_sum(torch.full((4,), math.nan), 2, LAYOUT)


def test_a_private_run_whose_clip_does_nothing_ends(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_example, "norms", lambda gradients: torch.zeros(len(gradients)))
    privacy = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 1e-3}
    with pytest.raises(UnsafeReleaseError, match="its noise would not cover it"):
        federate(load_config(set_all(tiny_config, privacy=privacy)))


# --- the ledger comes first ---


def test_what_is_not_charged_is_neither_drawn_nor_released(tmp_path: Path) -> None:
    mechanism = guarded(tmp_path, basis=BasisNoise(clip=0.5, sigma=1.0))
    zeros = torch.zeros(4)
    makes: list[Callable[[], object]] = [
        mechanism.draw,
        lambda: mechanism.mean(zeros, 0, LAYOUT),
        lambda: mechanism.noised_update(zeros),
        lambda: mechanism.basis_sum(zeros, 0, LAYOUT),
    ]
    for make in makes:
        with pytest.raises(RunError, match="the ledger has no line for"):
            make()
    mechanism.charge(1)
    for _ in range(3):  # steps
        mechanism.draw()
        mechanism.mean(zeros, 0, LAYOUT)
    with pytest.raises(RunError, match="the ledger has no line for"):
        mechanism.mean(zeros, 0, LAYOUT)
    with pytest.raises(RunError, match="the ledger has no line for"):
        mechanism.basis_sum(zeros, 0, LAYOUT)
    mechanism.charge_basis(1)
    mechanism.basis_sum(zeros, 0, LAYOUT)
    with pytest.raises(RunError, match="the ledger has no line for"):
        mechanism.basis_sum(zeros, 0, LAYOUT)


# --- the noise ---


def test_noise_has_the_bits_of_float32(tmp_path: Path) -> None:
    """Noise in half precision has some 2000 values in each octave: the sum beneath it could be read off."""
    noise = guarded(tmp_path).add_noise(torch.zeros(100_000), 1.0)
    assert noise.dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        assert float((noise.to(dtype).float() == noise).float().mean()) < 0.01
    low = noise.numpy().view(np.uint32) & 0xFFF  # the last 12 of 24 bits: all values alike
    counts = np.bincount(low, minlength=4096)
    assert counts.min() > 0 and counts.max() < 80  # 24 each
    assert len(read_ledger(tmp_path / "a.jsonl")) == 0
