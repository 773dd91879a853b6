"""The factors by which scale-then-privatize multiplies the values of a gradient."""

from __future__ import annotations

import pytest
import torch

from fedsb.privacy.scaling import gradient_scales, pack_moments, unpack_moments

DRAW = torch.Generator().manual_seed(0)
MOMENTS = {
    "alike": torch.full((7,), 3e-9),
    "normal": torch.randn(5000, generator=DRAW).square(),
    "of many sizes": torch.exp(8 * torch.randn(5000, generator=DRAW)),
    "some are 0": torch.cat([torch.zeros(40), torch.rand(60, generator=DRAW)]),
    "one": torch.tensor([1e-20]),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_the_scales_against_their_definition(name: str) -> None:
    v = MOMENTS[name].double()
    root = v.sqrt() / v[v > 0].sqrt().mean()
    root[v == 0] = 1.0  # not trained yet
    scales = 1 / (root + 1)
    scales *= (root.square().sum() / (scales * root).square().sum()).sqrt()
    found = gradient_scales(v.float())
    assert torch.allclose(found.double(), scales, rtol=0.1)  # roots are rounded to 4.5 %, and c with them
    assert float((found * root).norm()) == pytest.approx(float(root.norm()), rel=0.1)


def test_without_moments_nothing_is_scaled() -> None:
    assert torch.equal(gradient_scales(torch.zeros(2, 5)), torch.ones(2, 5))


@pytest.mark.parametrize("name", MOMENTS)
def test_a_byte_per_value_gives_the_same_scales(name: str) -> None:
    """Also in another unit, and together with other clients."""
    v = MOMENTS[name]
    data = pack_moments(v)
    assert len(data) == len(v)
    received = unpack_moments(data)
    assert torch.equal(gradient_scales(received), gradient_scales(v))
    assert pack_moments(received) == data
    both = gradient_scales(torch.stack([v, v.flip(0)]))
    assert torch.allclose(both[0], gradient_scales(v)) and torch.allclose(both[1], gradient_scales(v).flip(0))


def test_every_message_gives_positive_finite_scales() -> None:
    """Whatever a coordinator sends, so that no gradient is lost or becomes infinite."""
    for data in (bytes(range(256)), bytes(50), b"\xff" * 50, b"\x00" * 5000 + b"\xff"):
        scales = gradient_scales(unpack_moments(data))
        assert scales.isfinite().all() and (scales > 0).all()
