"""Per-example gradients from one backward pass: every example trains a copy of its client's adapter.

The leading axis of the adapters, which separates clients in joint training, separates examples here: a core is loaded
as (b, h, r, r), one copy per row of the batch. The batched product that gives the gradient of a client's R,
s sum_t (B' g_t)(A x_t)', then gives one gradient per example. There are no hooks and no second backward, only autograd,
so everything that trains (activation checkpointing, causal models, two-factor adapters, the head) works here too.

    g_i = dL_i / d(all trained tensors)      L_i is the mean loss of example i alone
    sum = sum_i g_i min(1, C / ||g_i||)      the norm is over all trained tensors together: L2 sensitivity C;
                                             0 for a row whose norm is NaN or above LONGEST

Norms are computed in float64. In float32 the squares of entries below 1e-23 are 0, so that a row could pass unclipped,
and a sum over 1e7 values is a tenth of a percent too small. The product of the clip is computed in full float32,
whatever `model.float32_matmul_precision` is.

(Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133.) Shapes: K clients, b rows, P
trained values of one client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.layout import Layout
from fedsb.data.tasks.base import Example, Task, ids
from fedsb.models.load import matmul_precision
from fedsb.training.scoring import forward
from fedsb.utils.tensors import Tensors, row_norms, to_device

Rounding = Callable[[Tensor], Tensor]  # (b, P) clipped gradients -> whole numbers
LONGEST = 1e19  # a gradient with a larger norm counts as 0; up to here, C over the norm is a normal float32


@dataclass(frozen=True)
class RowGradients:
    """Gradients of single rows, in a matrix that is allocated once."""

    adapted: AdaptedModel
    task: Task
    layout: Layout  # of the trained tensors
    gradients: Tensor  # (rows of one forward, P)

    @classmethod
    def allocate(cls, adapted: AdaptedModel, task: Task, layout: Layout, rows: int) -> RowGradients:
        """Returns buffers for `rows` rows in one forward; one where the model cannot route rows."""
        rows = 1 if adapted.routing.one_by_one else rows
        return cls(adapted, task, layout, torch.zeros(rows, layout.size, device=adapted.device))

    def clipped_sums(
        self,
        values: Tensor,  # (K, P) the clients' trained tensors
        frozen: Tensors,  # all other tensors: a core's A and B as they are, else (K, ...)
        rows: Sequence[Sequence[Example]],  # of each client; may be empty
        clip: float,
        rounding: Rounding | None = None,
        scales: Tensor | None = None,  # (K, P), or (1, P) for all: gradients are multiplied before the clip
    ) -> tuple[Tensor, Tensor]:
        """Returns ((K, P) the sums of clipped gradients, (K,) the mean losses). No noise is added here.

        The sums do not depend on how the rows are cut into forwards. A client without rows gets zeros. With `rounding`
        each clipped row is rounded to whole numbers, and the sums are int64.
        """
        sums = torch.zeros_like(values, dtype=None if rounding is None else torch.int64)
        losses = torch.zeros(len(rows), device=values.device)
        flat = [(k, example) for k, own in enumerate(rows) for example in own]
        flat.sort(key=lambda row: len(ids(row[1], "input_ids")))  # forwards pad to their longest row
        for start in range(0, len(flat), len(self.gradients)):
            part = flat[start : start + len(self.gradients)]
            owners = [k for k, _ in part]
            owner_b = to_device(torch.tensor(owners), values.device)
            loss_b = self._backward(values, frozen, owner_b, [row for _, row in part])
            gradients = self.gradients[: len(part)]
            if scales is not None and len(scales) == 1:
                gradients.mul_(scales)
            elif scales is not None:
                for gradient, k in zip(gradients, owners, strict=True):
                    gradient.mul_(scales[k])
            add_clipped(sums, gradients, owner_b, clip, rounding)
            losses.index_add_(
                0, owner_b, loss_b / to_device(torch.tensor([len(rows[k]) for k in owners]), values.device)
            )
        return sums, losses

    def _backward(self, values: Tensor, frozen: Tensors, owner_b: Tensor, rows: list[Example]) -> Tensor:
        """Fills the gradients of the rows' own mean losses. Returns those losses, (b,)."""
        b, adapted = len(rows), self.adapted
        copies = values.expand(b, -1) if len(values) == 1 else values[owner_b]  # one client's are in memory once
        others = {
            key: x if adapted.is_shared(key) or len(x) == 1 else x[owner_b.to(x.device)] for key, x in frozen.items()
        }
        gradients = self.gradients[:b].zero_()
        adapted.load({**others, **self.layout.views(copies)}, gradients=self.layout.views(gradients))
        adapted.routing.rows = b if b > 1 else None
        try:
            logits, batch = forward(adapted.model, self.task, rows)
            loss_b, weight_b = self.task.losses(logits, batch)
            loss_b = loss_b / weight_b.clamp(min=1)
            loss_b.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            adapted.routing.rows = None
        return loss_b.detach().float()


def add_clipped(
    sums: Tensor, gradients: Tensor, owner_b: Tensor, clip: float, rounding: Rounding | None = None
) -> None:
    """Adds each row's gradient (b, P), clipped, to its client's sum (K, P), in place. May change `gradients`."""
    norm_b = row_norms(gradients)
    usable_b = norm_b <= LONGEST  # False for NaN
    gradients.masked_fill_(~usable_b.unsqueeze(1), 0.0)  # such a row counts as 0: NaN would show through any noise
    factor_b = torch.where(usable_b, (clip / norm_b).clamp(max=1.0), 0.0)  # a gradient of 0 stays 0
    if rounding is not None:
        rounded = rounding(gradients.mul_(factor_b.float().unsqueeze(1)))
        sums.index_add_(0, owner_b, rounded.to(sums.dtype))
        return
    weight_Kb = torch.zeros(len(sums), len(owner_b), device=owner_b.device)
    weight_Kb[owner_b, torch.arange(len(owner_b), device=owner_b.device)] = factor_b.float()
    with matmul_precision("highest"):
        sums += weight_Kb @ gradients
