"""The audit of shared noise: it passes whole code, and sees a share that is too small, public, or left out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from conftest import set_all
from fedsb.adapters.layout import Layout
from fedsb.config.load import load_config
from fedsb.privacy import policy as setup
from fedsb.privacy.discrete import discrete_gaussian
from fedsb.privacy.grid import NoiseGrid
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.noise import SeededNoise
from fedsb.runs.audit import audit
from fedsb.server.server import Server

Install = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def config(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, Any]:
    """Epsilon 1; some 3000 trained values, three clients, three rounds of one step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbers = count()
    monkeypatch.setattr(setup, "noise_for", lambda client: SeededNoise(next(numbers), client))
    return set_all(
        tiny_config,
        method={"name": "fed-sb", "rank": 16},
        train={"local_steps": 1, "batch_size": 8, "lr": 0.02},
        server={"secure_aggregation": True},
        privacy={"unit": "example", "epsilon": 1.0, "clip_norm": 0.5},
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_whole_code_passes(scaled: bool, config: dict[str, Any]) -> None:
    config["privacy"]["scale_then_privatize"] = scaled
    found = audit(load_config(config))
    assert not found["broken"], found["says"]
    assert found["epsilon_audited"] < found["epsilon"] == found["epsilon_ledger"]
    assert found["epsilon"] > 1.0  # that of the client's own share alone, which is what the canaries can show
    assert all(each["tests"] > 0 for each in found["tests"].values())


def share(change: Callable[..., torch.Tensor]) -> Install:
    """A mechanism whose share is `change` of (mechanism, whole share, sum without noise, grid)."""
    whole = DPMechanism.share

    def changed(self: DPMechanism, total: torch.Tensor, rows: int, layout: Layout, grid: NoiseGrid) -> torch.Tensor:
        return change(self, whole(self, total, rows, layout, grid), total.cpu(), grid)

    return lambda monkeypatch: monkeypatch.setattr(DPMechanism, "share", changed)


def third(own: DPMechanism, whole: torch.Tensor, total: torch.Tensor, grid: NoiseGrid) -> torch.Tensor:
    return total + ((whole - total) / 3).round().long()


def public(own: DPMechanism, whole: torch.Tensor, total: torch.Tensor, grid: NoiseGrid) -> torch.Tensor:
    seeded = SeededNoise(0, own.ledger.client, len(own.ledger.releases()))
    return total + torch.from_numpy(discrete_gaussian(seeded, grid.sigma, len(total)))


def without(name: str) -> Callable[..., torch.Tensor]:
    return lambda own, whole, total, grid: total if own.ledger.client == name else whole


def same_for_all(own: DPMechanism, whole: torch.Tensor, total: torch.Tensor, grid: NoiseGrid) -> torch.Tensor:
    return total + torch.from_numpy(discrete_gaussian(SeededNoise(len(own.ledger.releases())), grid.sigma, len(total)))


def actual_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw, whole = DPMechanism.draw, Server.mean_gradient

    def counted(self: DPMechanism) -> list[int]:
        rows = draw(self)
        drawn.append(len(rows))
        return rows

    def mean(self: Server, q: float, total: Any, clients: Any) -> torch.Tensor:
        return whole(self, q, total, clients) * (q * sum(self.rows.values()) / max(sum(drawn[-3:]), 1))

    monkeypatch.setattr(DPMechanism, "draw", counted)
    monkeypatch.setattr(Server, "mean_gradient", mean)


def not_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that become longer by their rounding, on a grid as coarse as a clip."""
    of = NoiseGrid.of

    def coarse(plan: Any, size: int) -> NoiseGrid:
        grid = of(plan, size)
        return NoiseGrid(gamma=plan.clip / 4, clip=grid.clip, sigma=grid.sigma, bits=32)

    rounded = lambda self, g, generator: (g / self.gamma + torch.rand(g.shape, generator=generator)).floor()  # noqa: E731
    monkeypatch.setattr(NoiseGrid, "of", coarse)
    monkeypatch.setattr(NoiseGrid, "round_rows", rounded)
    monkeypatch.setattr("fedsb.privacy.mechanism.refuse_long", lambda *_: None)


MUTANTS: dict[str, tuple[Install, str]] = {
    "a share scaled by one over the clients": (share(third), "the noise does not have the planned size"),
    "a share from the public seed": (share(public), "a second source makes the same noise"),
    "one share for all clients": (share(same_for_all), "two tensors have the same noise"),
    "the audited client skips its noise": (share(without("site 0")), "the noise does not have the planned size"),
    "another client skips its noise": (share(without("site 2")), "(the share of site 2"),
    "the divisor of the actual batch": (actual_batch, "was not divided by its expected batch"),
    "rows longer than the clip": (not_rounded_again, "a clipped gradient has a norm above the clip norm"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_code_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    install, words = MUTANTS[mutant]
    install(monkeypatch)
    found = audit(load_config(config), client="site 0", canaries=256)
    assert found["broken"] and words in found["says"], found["says"]


def test_a_step_without_a_line_in_the_ledger_is_caught(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    charge = DPMechanism.charge
    monkeypatch.setattr(DPMechanism, "charge", lambda self, round: charge(self, round) if round != 2 else None)
    found = audit(load_config(config), client="site 0", canaries=64)
    assert found["broken"] and "the ledger has no line for a training sum" in found["says"]


def test_noise_that_every_run_repeats_is_caught_without_shared_noise_too(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeded(self: DPMechanism, total: torch.Tensor, std: float) -> torch.Tensor:
        return total + std * torch.from_numpy(SeededNoise(0, len(self.ledger.releases())).normal(len(total))).float()

    monkeypatch.setattr(DPMechanism, "add_noise", seeded)
    found = audit(load_config(set_all(config, server={}, train={"local_steps": 1, "batch_size": 8})), canaries=64)
    assert found["broken"] and "a second source makes the same noise" in found["says"]
