"""The grid on which clients add up clipped gradients and shares of one noise, exactly and in few bits.

    each row     q = floor(clip_C(g) / gamma + u),  u ~ U[0, 1)^P, drawn again until gamma ||q|| <= C'
    client k     S_k = sum of its rows' q + Z_k,    Z_k discrete Gaussian of variance (sigma C' / gamma)^2 / h
    sum          gamma sum_k S_k                    modulo a ring of `bits` bits

Rounding a row makes it longer, by chance. C' = (1 + 1 %) C bounds it without exception, because a row that is longer is
rounded again; gamma is the coarsest grid on which that happens to at most one row in 3,000:

    C'^2 >= C^2 + gamma^2 P / 4 + sqrt(2 ln(1 / beta)) gamma (C + gamma sqrt(P) / 2)     or     C' >= C + gamma sqrt(P)

(Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
ICML 2021, arXiv 2102.06387.) A row is rounded before the sum: two neighbouring sums then
differ by the row's q alone, whose length is at most C' / gamma. If the sum was rounded, they would differ by the
rounding of every value too.

The ring contains the largest sum that can be expected: all drawn rows of one sign, and eight standard deviations of the
noise. A value outside of it would wrap, and be wrong, but no less private.

Shapes: P values of a client, b rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.privacy.discrete import LEAST
from fedsb.privacy.plan import PrivacyPlan
from fedsb.secagg.fixed_point import FixedPoint
from fedsb.utils.errors import UserError
from fedsb.utils.tensors import row_norms, to_device

LONGER = 0.01  # a rounded row may be this much longer than the clip, and so much more noise is added
AGAIN = 1 / 3000  # the largest probability (beta) that a row has to be rounded again
TAIL = 8.0  # standard deviations of the noise that the ring has room for
EXACT = 1 << 24  # up to here float32 has all whole numbers
NARROWEST, WIDEST = 12, 32  # bits


@dataclass(frozen=True, kw_only=True)
class NoiseGrid:
    """The grid of a run's sums with shared noise. All clients and the server derive the same one."""

    gamma: float  # the distance between two values, in the unit of a gradient
    clip: float  # C', the largest length of a rounded row
    sigma: float  # standard deviation of a client's share of the noise, in steps of the grid
    bits: int  # of the ring

    @classmethod
    def of(cls, plan: PrivacyPlan, size: int) -> NoiseGrid:
        """Returns the grid for `size` trained values. Raises UserError if the sums fit into no ring."""
        assert plan.shared is not None
        root, s = math.sqrt(size), math.sqrt(2 * math.log(1 / AGAIN))
        a, b, c = size / 4 + s * root / 2, s, (1 + LONGER) ** 2 - 1
        gamma = plan.clip * max((math.sqrt(b * b + 4 * a * c) - b) / (2 * a), LONGER / root)
        gamma = float(f"{gamma:.6g}")  # the same on machines whose logarithms differ in their last bit
        clip = plan.clip * (1 + LONGER)
        rows = plan.batch + 6 * math.sqrt(plan.batch) + 6
        noise = plan.sigma * math.sqrt(plan.shared.clients / plan.shared.honest)
        bits = max(NARROWEST, 1 + math.ceil(math.log2((rows + TAIL * noise) * clip / gamma + 1)))
        sigma = plan.sigma * clip / gamma / math.sqrt(plan.shared.honest)
        if bits > WIDEST or clip / gamma > EXACT / 256:
            raise UserError(
                f"Sums of {plan.batch} rows with {size:,} trained values do not fit into {WIDEST} bits. Lower the rank "
                "or the batch, or set privacy.noise = 'local'."
            )
        if 0 < sigma < LEAST:
            raise UserError(
                f"A share of the noise would be {sigma:.3g} steps of the grid; it must be {LEAST:g} or more. Raise the "
                "noise (a smaller privacy.epsilon), or set privacy.noise = 'local'."
            )
        return cls(gamma=gamma, clip=clip, sigma=sigma, bits=bits)

    def ring(self, clients: int) -> FixedPoint:
        """Returns the ring in which this number of clients add up their shares."""
        return FixedPoint(clients=clients, clip=self.gamma * ((2 ** (self.bits - 1) - 1) // clients), bits=self.bits)

    def round_rows(self, gradients: Tensor, generator: torch.Generator) -> Tensor:  # (b, P)
        """Returns clipped gradients as whole numbers of steps, float32, none longer than C'.

        `generator`, on the CPU, need not be secret: the bound is true for every rounding.
        """
        scaled = gradients / self.gamma
        found, todo = torch.empty_like(scaled), torch.ones(len(scaled), dtype=torch.bool, device=scaled.device)
        while todo.any():
            part = scaled[todo]
            part = (part + to_device(torch.rand(part.shape, generator=generator), part.device)).floor_()
            found[todo] = part
            todo[todo.clone()] = row_norms(part) > self.clip / self.gamma
        return found
