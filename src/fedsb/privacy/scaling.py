"""Scale-then-privatize: rows are clipped, and get noise, in coordinates in which Adam's steps have similar sizes.

    r = sqrt(v) / mean sqrt(v)                      per value, rounded to 2^(k/8), k an integer in -128..127; 1 if v = 0
    s = c / (r + 1)                                 c such that sum(s^2 r^2) = sum(r^2)
    g = (sum_i clip_C(s g_i) + noise) / s           then divided by the batch

v is Adam's second moment of the gradients released so far. A value with large gradients gets a smaller part of the
clipped length, and more noise, as its steps are divided by sqrt(v) anyway. A clipped sum changes by at most C with one
row in any coordinates, and s is made of what was released, so epsilon stays the same. c keeps the length of a gradient,
and with it the meaning of `privacy.clip_norm`.

With local noise v is the client's own. With shared noise it is the server's, which sends k in one byte per value; it
and the clients compute s from these bytes. A value with v = 0 has not been trained yet.

(Ganesh, McMahan, Thakurta, "On Design Principles for Private Adaptive Optimizers", 2025, arXiv 2507.01129.) Shapes: P
trained values of a client.
"""

from __future__ import annotations

import torch
from torch import Tensor

EIGHTHS, MIDDLE = 8, 128


def gradient_scales(v: Tensor) -> Tensor:  # (..., P) -> (..., P) float32
    """Returns s. Only the ratios of the second moments count; where all of them are 0, s is 1."""
    squares = _squares(_codes(v))
    scales = 1 / (squares.sqrt() + 1)
    length = (squares.sum(-1, keepdim=True) / (scales.square() * squares).sum(-1, keepdim=True)).sqrt()
    return scales * length


def pack_moments(v: Tensor) -> bytes:  # (P,)
    """Returns k + 128 of each value."""
    return bytes(_codes(v).numpy())


def unpack_moments(data: bytes) -> Tensor:  # (P,) float32
    """Returns r^2, second moments up to a factor. Every byte stands for a positive one."""
    return _squares(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _codes(v: Tensor) -> Tensor:
    root = (v if v.device.type == "mps" else v.double()).sqrt()  # mps has no float64
    known = root > 0
    mean = root.sum(-1, keepdim=True) / known.sum(-1, keepdim=True)
    ratio = torch.where(known, root / mean, 1.0)
    return (ratio.log2() * EIGHTHS).round().add(MIDDLE).clamp(0, 255).to(torch.uint8)


def _squares(codes: Tensor) -> Tensor:
    return torch.exp2((codes.float() - MIDDLE) * (2 / EIGHTHS))
