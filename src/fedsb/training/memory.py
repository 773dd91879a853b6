"""An estimate of the memory of training, from the architecture alone, part by part.

    base          its weights, quantised or in their dtype
    adapter       float32: what is frozen once, and 16 bytes for each trained value of each client in the forward
                  (the value, its gradient and Adam's two moments)
    carried       float32: what FLoRA and FedEx-LoRA have added to the base after a round
    activations   what autograd keeps of one joint forward: near (m + n) values of every linear layer of the blocks and
                  token, in the base's dtype; with LoRA's factors a quarter more, for their inputs are kept too
    row_gradients float32, one for each row of a forward, in a private run
    logits        of a language model: logits and their gradient in the base's dtype, both again in float32

The activations of SmolLM2-135M's architecture, counted with saved-tensor hooks at 2 x 64 tokens in bfloat16: 75.7 MB
with a core of rank 16 where this says 78.2 MB, 96.3 MB with factors where it says 97.8 MB. Not in it: the attention
matrices of "eager", what the allocator wastes, the framework itself (half a gigabyte of CUDA context).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedsb.config.schema import Config
from fedsb.data.tasks import TASKS
from fedsb.methods.base import Method
from fedsb.training.local import BYTES_PER_TRAINED_VALUE
from fedsb.utils.tensors import Shapes

FACTORS_KEEP = 1.25  # activations beside LoRA's factors over those beside a core, as counted


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, part by part."""

    base: int
    adapter: int
    carried: int
    activations: int
    logits: int
    row_gradients: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.carried + self.activations + self.logits + self.row_gradients


def trained_values(method: Method, shapes: Shapes, head: int) -> int:
    """Returns the number of values that a client trains: the uploaded ones and those in its client state."""
    traffic = method.traffic(shapes, head=head, clients=1)
    if method.adapter == "core" or method.spec.client_state == "nothing":
        return traffic.step
    return sum(method.rank * (m + n) for m, n in shapes.values()) + head


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a base model, as far as memory depends on them.

    Args:
        shapes: of the adapted layers.
        block_shapes: of all linear layers of the blocks.
        base: bytes of the weights.
        head: values of the task head.
        vocabulary: tokens that a language model predicts; 0: not a language model.
        dtype: in which the model computes.
    """

    shapes: Shapes
    block_shapes: Shapes
    base: int
    head: int
    vocabulary: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        config: Config,
        model: Any,
        shapes: Shapes,
        block_shapes: Shapes,
        *,
        base: int,
        head: int,
        dtype: torch.dtype,
    ) -> ModelSizes:
        """Returns the sizes of a loaded model for the task of a configuration."""
        vocabulary = 0
        if TASKS[config.task.kind].auto_class == "AutoModelForCausalLM":
            vocabulary = int(model.config.get_text_config().vocab_size)
        return cls(shapes=shapes, block_shapes=block_shapes, base=base, head=head, vocabulary=vocabulary, dtype=dtype)


def memory_by_clients(
    config: Config, method: Method, sizes: ModelSizes, cohort: int, batch: int
) -> Callable[[int], Memory]:
    """Returns the estimate as a function of the number of clients in one forward, each with `batch` rows."""

    def of(clients: int) -> Memory:
        return training_memory(
            method,
            sizes,
            together=clients,
            cohort=cohort,
            tokens=clients * batch * config.model.max_seq_length,
            private_rows=clients * batch if config.privacy.unit == "example" else 0,
            activation_checkpointing=config.model.activation_checkpointing,
        )

    return of


def training_memory(
    method: Method,
    sizes: ModelSizes,
    *,
    together: int,  # clients in one forward
    cohort: int,  # clients in a round
    tokens: int,  # in one forward, of all clients in it
    private_rows: int,  # in one forward; 0: not private
    activation_checkpointing: bool,
) -> Memory:
    """Returns the estimate for a process that trains `together` clients at once. A site trains 1."""
    shapes, block_shapes = sizes.shapes, sizes.block_shapes
    trained = trained_values(method, shapes, sizes.head)
    frozen = sum(method.total_rank * (m + n) for m, n in shapes.values()) if method.adapter == "core" else 0
    residual = method.traffic(shapes, head=sizes.head, clients=cohort).down if method.spec.changes_base else 0
    keep = sum(m + n for m, n in block_shapes.values()) * (1.0 if method.adapter == "core" else FACTORS_KEEP)
    if activation_checkpointing:  # one block's, and the hidden state at each block's start
        blocks = {re.split(r"(?<=\.)(\d+)\.", name)[1] for name in block_shapes}
        hidden = min(n for _, n in block_shapes.values())
        keep = keep / len(blocks) + hidden * len(blocks)
    return Memory(
        base=sizes.base,
        adapter=4 * frozen + together * trained * BYTES_PER_TRAINED_VALUE,
        carried=4 * residual,
        activations=round(tokens * keep * sizes.dtype.itemsize),
        logits=tokens * sizes.vocabulary * (2 * sizes.dtype.itemsize + 8),
        row_gradients=4 * private_rows * trained,
    )
