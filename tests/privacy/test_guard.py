"""The mechanism: a row's gradient is cut to the clip whatever its scale, and nothing is drawn that was not charged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import set_all
from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.privacy import accounting
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.ledger import Ledger, merged, read_ledger
from fedsb.privacy.mechanism import ROUNDING, Cap, DPMechanism, PrivacyBudgetExceededError, UnsafeReleaseError
from fedsb.privacy.noise import SeededNoise
from fedsb.privacy.plan import BasisNoise, PrivacyPlan, SharedNoise
from fedsb.reporting.run_directory import read_result, read_rows
from fedsb.runs.run import Silent, federate
from fedsb.training import per_example
from fedsb.training.per_example import add_clipped
from fedsb.utils.errors import RunError
from fedsb.utils.tensors import row_norms

LAYOUT = Layout((("a", (4,)),))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield


def guarded(folder: Path, caps: tuple[Cap, ...] = (), **changes: Any) -> DPMechanism:
    settings = {"clip": 0.5, "delta": 1e-5, "batch": 8, "rows": 32, "steps": 3, "rounds": 2, "sigma": 1.0, **changes}
    ledger = Ledger.create(folder / "a.jsonl", run="x", client="a", unit="example")
    plan = PrivacyPlan(unit="example", **settings)
    return DPMechanism(plan=plan, ledger=ledger, noise=SeededNoise(0, "a"), caps=caps)


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
    found = row_norms(torch.full((1, 10_000_000), 1e-3))
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
    for total, rows in (torch.full((4,), 0.51), 2), (torch.tensor([1e-24, 0, 0, 0]), 0):
        with pytest.raises(
            UnsafeReleaseError, match=f"the sum of {rows} clipped gradients is longer than {rows} x 0.5"
        ):
            mechanism.mean(total, rows, LAYOUT)
    mechanism.charge_basis(0)
    with pytest.raises(UnsafeReleaseError, match="Nothing was released"):
        mechanism.basis_sum(torch.full((4,), math.nan), 2, LAYOUT)


def test_a_share_of_a_sum_longer_than_its_rows_allow_is_not_released(tmp_path: Path) -> None:
    mechanism = guarded(tmp_path, steps=1, rounds=4, shared=SharedNoise(clients=4, honest=2, rows=128))
    grid = NoiseGrid.of(mechanism.plan, 4)
    most = int(grid.clip / grid.gamma)  # steps of the grid
    mechanism.charge(1)
    mechanism.share(torch.tensor([2 * most, 0, 0, 0]), 2, LAYOUT, grid)
    for total, rows in ([2 * most + most // 10, 0, 0, 0], 2), ([0, 1, 0, 0], 0):
        mechanism.charge(2)
        with pytest.raises(UnsafeReleaseError, match=f"the sum of {rows} clipped gradients is longer than {rows} x"):
            mechanism.share(torch.tensor(total), rows, LAYOUT, grid)


def test_a_private_run_whose_clip_does_nothing_ends(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_example, "row_norms", lambda gradients: torch.zeros(len(gradients)))
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


def test_a_charge_that_did_not_reach_the_disk_allows_no_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RunError("the disk is full")

    mechanism = guarded(tmp_path, basis=BasisNoise(clip=0.5, sigma=1.0))
    monkeypatch.setattr(Ledger, "charge", full)
    for charge in (mechanism.charge, mechanism.charge_basis):
        with pytest.raises(RunError, match="the disk is full"):
            charge(1)
    for draw in (mechanism.draw, lambda: mechanism.basis_sum(torch.zeros(4), 0, LAYOUT)):
        with pytest.raises(UnsafeReleaseError, match="the ledger has no line for"):
            draw()


# --- the budget ---


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry per composition of releases from now on."""
    made: list[object] = []
    composed = accounting._composed
    monkeypatch.setattr(accounting, "_composed", lambda *args: made.append(args) or composed(*args))
    accounting._pld.cache_clear()
    return made


def test_a_charge_that_the_plan_covers_composes_nothing(tmp_path: Path, compositions: list[object]) -> None:
    """Five clients with different plans, and a new basis before round 3."""
    for rows in (32, 40, 48, 56, 64):
        (folder := tmp_path / str(rows)).mkdir()
        mechanism = guarded(folder, rows=rows, rounds=4, basis=BasisNoise(clip=0.5, sigma=9.0, every=2))
        mechanism.charge_basis(0)
        for round in (1, 2, 3, 4):
            if round == 3:
                mechanism.charge_basis(round)
            mechanism.charge(round)
    assert compositions == []
    with pytest.raises(PrivacyBudgetExceededError, match="round 4 would raise epsilon"):
        mechanism.charge(4)
    assert compositions


def test_a_cap_composes_the_plan_once(tmp_path: Path, compositions: list[object]) -> None:
    mechanism = guarded(tmp_path, rounds=4, caps=(Cap(epsilon=50.0, delta=1e-6, before=(Release(sigma=2.0),)),))
    mechanism.charge(1)
    once = len(compositions)
    accounting._pld.cache_clear()
    for round in (2, 3, 4):
        mechanism.charge(round)
    assert 0 < len(compositions) == once


class Counting(Silent):
    """Counts after each round the compositions so far."""

    def __init__(self, compositions: list[object]) -> None:
        self.compositions, self.counts = compositions, list[int]()

    def round(self, row: Any, rounds: int) -> None:
        self.counts.append(len(self.compositions))


def test_the_rounds_of_a_private_run_compose_nothing(tiny_config: dict[str, Any], compositions: list[object]) -> None:
    """Their rows state epsilon: exactly where the statement does, in between that of the next such round."""
    privacy = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 0.5}
    display = Counting(compositions)
    done = federate(load_config(set_all(tiny_config, privacy=privacy, rounds=7)), display)
    assert set(display.counts) == {len(compositions)}
    ledgers = [read_ledger(path) for path in (done.folder / "privacy").glob("*.jsonl")]
    exact = [max(epsilon(merged(entries[:round]), 1e-3) for entries in ledgers) for round in (1, 2, 5, 7)]
    stated = [row["epsilon"] for row in read_rows(done.folder / "rounds.jsonl")]
    assert stated == [exact[i] for i in (0, 1, 2, 2, 2, 3, 3)]
    result = read_result(done.folder)
    assert result is not None and result["epsilon"] == exact[-1]


def may_charge(mechanism: DPMechanism, release: Release) -> bool:
    """The rule of a charge, with a composition each time."""
    after, plan, cap = [*mechanism.ledger.releases(), release], mechanism.plan, next(iter(mechanism.caps), None)
    if epsilon(after, plan.delta) > plan.epsilon() * (1 + ROUNDING):
        return False
    return cap is None or cap.total(after) <= cap.epsilon * (1 + ROUNDING)


EARLIER = (Release(sigma=1.5, q=0.25, count=20),)
RARE = Release(sigma=0.05, q=2e-6)  # costs nothing at the plan's delta, and much at a smaller one


@pytest.mark.parametrize("basis", [None, BasisNoise(clip=0.5, sigma=4.0), BasisNoise(clip=0.5, sigma=1.0, every=2)])
@pytest.mark.parametrize(
    ("share", "before"), [(None, ()), (1.01, ()), (1.01, EARLIER), (0.9, ()), (0.9, EARLIER)], ids=str
)
@pytest.mark.parametrize("other", [None, RARE, Release(sigma=0.9, q=0.25, count=2)], ids=str)
def test_a_charge_is_refused_as_if_each_composed_all_releases(
    tmp_path: Path, basis: BasisNoise | None, share: float | None, before: tuple[Release, ...], other: Release | None
) -> None:
    """With a repeated basis, repeated rounds until the end, a line that is not in the plan, and a cap that is `share`
    of what all runs together would spend."""
    mechanism = guarded(tmp_path, rounds=3, basis=basis)
    if share is not None:
        total = epsilon([*before, *mechanism.plan.releases()], 1e-7)
        mechanism = replace(mechanism, caps=(Cap(epsilon=share * total, delta=1e-7, before=before),))
    plan, ledger = mechanism.plan, mechanism.ledger
    training = Release(q=plan.q, sigma=plan.sigma, count=plan.steps)
    charges = [(training, mechanism.charge)] * 5
    if basis is not None:
        made = Release(q=basis.q, sigma=basis.sigma, what="basis")
        charges = [(made, mechanism.charge_basis), *charges[:2], (made, mechanism.charge_basis), *charges[2:]]
    if other is not None:
        ledger.charge(other, round=0, clip=0.5)
    allowed = []
    for number, (release, charge) in enumerate(charges):
        allowed.append(may_charge(mechanism, release))
        if allowed[-1]:
            charge(number)
        else:
            with pytest.raises(PrivacyBudgetExceededError, match="would raise epsilon"):
                charge(number)
    assert not all(allowed)
    assert len(read_ledger(ledger.path)) == sum(allowed) + (other is not None)


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


def test_noise_is_added_in_float64(tmp_path: Path) -> None:
    """A float32 sum of float32 noise would be rounded twice."""
    total = torch.linspace(-1, 1, 100_000)
    exact = total.double() + 0.7 * torch.from_numpy(SeededNoise(0, "a").normal(100_000))
    assert torch.equal(guarded(tmp_path).add_noise(total, 0.7), exact.float())
