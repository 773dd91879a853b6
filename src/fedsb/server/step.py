"""One optimiser step of the whole federation, at the server: the clients' gradients add up to that of one client.

    g = sum_k S_k / (s q sum_k n_k)         over the clients in the sum; S_k as in privacy/grid.py, noise included
    x <- x - lr optimizer(g)                train.optimizer, with moments that live as long as the run

q sum_k n_k is the expected number of drawn rows, which is public. With scale-then-privatize s has a factor for each
value (privacy/scaling.py), which the clients compute from the same second moments; else it is 1. The step and its
moments use only what was released, so they cost no epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.adapters.layout import Layout
from fedsb.client.round import ClientRound
from fedsb.privacy.scaling import gradient_scales, pack_moments, unpack_moments
from fedsb.training.buffers import ClientBuffers
from fedsb.training.local import LocalTraining
from fedsb.training.optimizer import StepSizes, step_rows
from fedsb.utils.tensors import Tensors


@dataclass(frozen=True)
class FederatedStep:
    """The optimiser of a run in which a round is one step; `heads` are the tensors that use train.head_lr."""

    local: LocalTraining
    heads: frozenset[str]

    def second_moments(self, shared: ClientRound, moments: Tensors) -> bytes:
        """Returns the second moments of the trained tensors, as clients receive them."""
        zeros = {key: torch.zeros_like(x) for key, x in shared.trained.items()}
        return pack_moments(Layout.of(zeros).flatten({key: moments.get(f"v.{key}", x) for key, x in zeros.items()}))

    def take(self, shared: ClientRound, gradient: Tensor, moments: Tensors) -> tuple[Tensors, Tensors]:
        """Returns (what a client would send after this step, the new moments).

        Args:
            gradient: (P,) the noised mean, in the order of the trained tensors' layout.
            moments: "m.<key>", "v.<key>" and "steps", as an earlier step has returned them; {} before the first.
        """
        layout, done = Layout.of(shared.trained), int(moments.get("steps", torch.zeros(())))
        buffers = ClientBuffers(layout, 1, torch.device("cpu"))
        buffers.read([shared.trained], [moments])
        if shared.second_moments is not None:  # by which the clients have scaled their gradients
            gradient = gradient / gradient_scales(unpack_moments(shared.second_moments))
        buffers.gradients[0].copy_(gradient)
        factor = self.local.lr_factor(shared.round, 0, 1)
        step_rows(self.local, buffers, 1, StepSizes.of(self.local, buffers, self.heads, [[factor]], [done]), 0)
        ((trained, after),) = buffers.write(1)
        received = shared.start({})
        sent, _ = shared.method.upload(received, {**received, **trained}, shared.round)
        if shared.method.spec.rotates_basis:  # the next round's coordinates are others
            after = {}
        return sent, {**after, "steps": torch.tensor(float(done + 1))}
