"""The loss of next-token tasks: L = sum over targets of -log p(token | tokens before it), in nats.

Shapes: b examples, t tokens, v vocabulary, n targets in the batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedsb.data.rows import Row
from fedsb.data.tasks.base import NO_LOSS, Batch, Example, Question, Scored, Task, ids
from fedsb.data.tasks.tokens import start_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NEW_TOKENS = 128  # of a text that is not graded
MOST = 0.8  # share of targets among the tokens of a batch, above which the loss is computed at every token
LARGEST_EXPONENT = 700.0  # exp of more overflows


class CausalTask(Task):
    """A task whose labels are the input's own tokens, with NO_LOSS for tokens that are only read."""

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

    def collate(self, examples: list[Example], *, multiple_of: int = 8) -> Batch:
        """Returns the batch with "targets" (n,): the positions, in the flattened batch, of the tokens to predict.

        They are found here, on the host, so that a device need not be asked for their number. Texts that are padded on
        the right need no attention mask: no token sees one after it, which `training/preflight.py` tests.
        """
        batch = super().collate(examples, multiple_of=multiple_of)
        is_target_bt = batch["labels"] != NO_LOSS
        is_target_bt[:, 0] = False  # nothing comes before it
        batch["targets"] = is_target_bt.flatten().nonzero()[:, 0]
        if not self.pads_left:
            del batch["attention_mask"]
        return batch

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (sum of token losses (b,), number of targets (b,)).

        Where many tokens are only read, only the logits of targets are copied to float32. Otherwise choosing them would
        cost more than it saves: a copy of the logits, and one of their gradient. Gradients are the same, bit for bit.
        """
        from torch.nn.functional import cross_entropy, pad

        target_n, labels_bt = batch["targets"], batch["labels"]
        if len(target_n) > MOST * labels_bt.numel():
            next_bt = pad(labels_bt[:, 1:], (0, 1), value=NO_LOSS)
            nats = cross_entropy(logits.flatten(0, 1).float(), next_bt.flatten(), reduction="none")
            return nats.view(labels_bt.shape).sum(dim=1), (next_bt != NO_LOSS).sum(dim=1).float()
        logits_nv = logits.flatten(0, 1).index_select(0, target_n - 1).float()  # those at t predict the token at t + 1
        nats_n = cross_entropy(logits_nv, labels_bt.flatten().index_select(0, target_n), reduction="none")
        nats_bt = nats_n.new_zeros(labels_bt.numel()).index_copy(0, target_n, nats_n).view(labels_bt.shape)
        return nats_bt.sum(dim=1), (labels_bt[:, 1:] != NO_LOSS).sum(dim=1).float()

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.losses(logits, batch)

    @abstractmethod
    def questions(self, rows: list[Row]) -> list[Question]:
        """Returns the questions of rows, which need no answers. Raises UserError at a row without text."""

    def _question(self, prompt: str, prompt_ids: Sequence[int]) -> Question:
        limit = self.options.new_tokens or NEW_TOKENS
        return Question(prompt=prompt, gold="", kind="open", new_tokens=limit, prompt_ids=tuple(prompt_ids))

    @property
    def trained_end(self) -> int | None:
        """The token that training puts at the end of what the model writes; None if there is none."""
        return None

    def end_tokens(self, model: Any = None) -> list[int]:
        """Returns the tokens that end a written text.

        They are the token that training puts there, the tokenizer's end token and, if a model is given, the end tokens
        of its generation config.
        """
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named = own if isinstance(own, list) else [own]
        found = {self.trained_end, self.tokenizer.eos_token_id, *named}
        return sorted(int(token) for token in found if token is not None)

    def stops(self) -> list[str]:
        """Returns the texts at which a written text is cut if no end token ended it."""
        return []

    def measure(self, scored: Scored) -> dict[str, float]:
        """Returns nats per token and the perplexity, its exponential."""
        (nats,) = super().measure(scored).values()
        return {CausalTask.metric: nats, "perplexity": math.inf if nats > LARGEST_EXPONENT else math.exp(nats)}
