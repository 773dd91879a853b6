"""The loss of next-token tasks: L = sum over targets of -log p(token | tokens before it), in nats.

Shapes: b examples, t tokens, v vocabulary, n targets in the batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from fedsb.data.tasks.base import NO_LOSS, Batch, Example, Scored, Task, ids, start_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LARGEST_EXPONENT = 700.0  # exp of more is no float


class CausalTask(Task):
    """Labels are the input's own tokens, NO_LOSS where a token is only read."""

    metric = "nats_per_token"
    higher_is_better = False
    scorings: ClassVar[tuple[str, ...]] = ("loss",)
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"

    def made_up(self, tokens: int, draw: np.random.Generator) -> Example:
        whole = (start_tokens(self.tokenizer) + self._ordinary_tokens(tokens, draw))[:tokens]
        return {"input_ids": whole, "labels": [NO_LOSS, *whole[1:]]}

    def weight(self, example: Example) -> int:
        return sum(label != NO_LOSS for label in ids(example, "labels")[1:])

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token losses summed (b,) and targets counted (b,). Only the targets' logits are copied to float32."""
        from torch.nn.functional import cross_entropy

        target_bt = batch["labels"][:, 1:]  # logits at t tell the token at t + 1
        is_target_bt = target_bt != NO_LOSS
        logits_nv = logits[:, :-1][is_target_bt].float()
        nats_n = cross_entropy(logits_nv, target_bt[is_target_bt], reduction="none")
        nats_bt = nats_n.new_zeros(target_bt.shape).masked_scatter(is_target_bt, nats_n)
        return nats_bt.sum(dim=1), is_target_bt.sum(dim=1).float()

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.losses(logits, batch)

    def measure(self, scored: Scored) -> dict[str, float]:
        """Nats a token, and the perplexity, exp of it."""
        (nats,) = super().measure(scored).values()
        return {CausalTask.metric: nats, "perplexity": math.inf if nats > LARGEST_EXPONENT else math.exp(nats)}
