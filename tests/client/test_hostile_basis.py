"""A coordinator that asks for a basis again, or sends one that is not orthonormal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsb.adapters.basis import basis_hash
from fedsb.client import policy
from fedsb.client.checks import refuse_basis
from fedsb.protocol.messages import (
    BasisGradient,
    GetShared,
    Refresh,
    SetBasis,
    SetShared,
)
from fedsb.protocol.payload import Payload, pack, unpack
from fedsb.utils.errors import RefusalError
from support.hostile import EXAMPLE, RUN, Hostile, Settings


def test_a_basis_requested_again_and_again_is_the_same_and_charged_once(settings: Settings, tmp_path: Path) -> None:
    """The mean of many noised sums of the same rows would have little noise left."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, {"basis": {"kind": "core", "samples": 6, "share_samples": 0}}))
    first = world.ask("a", BasisGradient, round=0)
    world.restart("a")
    for _ in range(3):
        assert world.ask("a", BasisGradient, round=0) == first
    assert world.ledgers("a") == [0]


@pytest.mark.parametrize("changes", [{}, EXAMPLE], ids=["plain", "private"])
def test_a_basis_gradient_is_made_once_for_each_basis_of_the_run(
    changes: dict[str, Any], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator could else have gradients of the same rows for many weights of its choice."""
    monkeypatch.setattr(policy, "refuse_what_needs_one_place", lambda *_: None)  # which refuses basis.refresh
    world = Hostile(tmp_path)
    basis = {"kind": "core", "samples": 6, "refresh": 2, "share_samples": 0}
    world.open(settings(changes, {"basis": basis, "rounds": 3}))
    first = world.ask("a", BasisGradient, round=0)
    trainer, inner = world.client("a").trainer, {}
    for key, S in unpack(first.payload).tensors.items():
        inner |= {key[:-1] + "P": torch.eye(len(S))[:, :4], key[:-1] + "Q": torch.eye(len(S))[:4]}
    payload = pack(Payload.of(inner, kind="basis-down", run=RUN, round=0))
    for round in (1, 3, 10**9):
        with pytest.raises(RefusalError, match="No new basis is made before round"):
            world.ask("a", BasisGradient, round=round)
        with pytest.raises(RefusalError, match="No new basis is made before round"):
            world.ask("a", SetBasis, payload, round=round)
    with pytest.raises(RefusalError, match="The broadcast does not belong to this run"):
        world.ask("a", SetBasis, first.payload, round=0)
    world.ask("a", SetBasis, payload, round=0)
    tensors = {f"{layer}.R": torch.ones(1, 4, 4) for layer in trainer.shapes} | trainer.head
    refreshes = [
        pack(Payload.of({key: x * scale for key, x in tensors.items()}, kind="broadcast", run=RUN, round=2))
        for scale in (0.1, 0.2)
    ]
    world.ask("a", Refresh, refreshes[0])
    second = world.ask("a", BasisGradient, round=2)
    assert second != first
    world.ask("a", Refresh, refreshes[1])
    assert world.ask("a", BasisGradient, round=2) == second
    assert world.ask("a", BasisGradient, round=0).parts == first.parts
    assert world.ledgers("a") == ([0, 3] if changes else [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x * 2e-22, "is not orthonormal"),
        (lambda x: x * 3, "is not orthonormal"),
        (lambda x: x[:, 1:], "do not fit layer"),
        (lambda x: x * np.nan, "NaN, infinite or above"),
    ],
)
def test_a_basis_of_another_scale_is_refused(
    change: Callable[[Any], Any], words: str, settings: Settings, tmp_path: Path
) -> None:
    """It would scale every row's gradient, down to where a clip in float32 does nothing."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    shared = world.state().shared
    changed = Payload.of({key: change(x) for key, x in shared.items()}, kind="broadcast", run=RUN, round=0)
    with pytest.raises(RefusalError, match=words):
        world.ask("a", SetShared, pack(changed))
    whole = pack(Payload.of(shared, kind="broadcast", run=RUN, round=0))
    assert world.ask("a", SetShared, whole).shared == basis_hash(shared)


@pytest.mark.parametrize("scale", [2e-22, 1e5, float("nan")])
def test_a_core_basis_has_no_scale(scale: float, settings: Settings, tmp_path: Path) -> None:
    """The coordinator chooses directions within the outer basis, and the site orthonormalises them."""
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE, {"basis": {"kind": "core", "samples": 6, "share_samples": 0}}))
    inner = {}
    for key, S in unpack(world.ask("a", BasisGradient, round=0).payload).tensors.items():
        inner |= {key[:-1] + "P": scale * torch.eye(len(S))[:, :4], key[:-1] + "Q": scale * torch.eye(len(S))[:4]}
    payload = pack(Payload.of(inner, kind="basis-down", run=RUN, round=0))
    if scale == scale:
        world.ask("a", SetBasis, payload, round=0)
        client = world.client("a")
        refuse_basis(client.start_view().shared, client.trainer.shapes)
    else:
        with pytest.raises(RefusalError, match="NaN, infinite or above"):
            world.ask("a", SetBasis, payload, round=0)


def test_a_basis_is_sent_only_to_a_coordinator_without_the_base_model(settings: Settings, tmp_path: Path) -> None:
    world = Hostile(tmp_path)
    world.open(settings(EXAMPLE))
    with pytest.raises(RefusalError, match="derives the basis itself"):
        world.ask("a", GetShared)
