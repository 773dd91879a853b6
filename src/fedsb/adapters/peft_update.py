"""The `update` basis (LoRA-SB) for a PEFT model: one call before training.

    G = sum over samples of dL/dW at W0,   D = -lr sign(G)  (or -lr G),   D ~ B diag(S) A,   R0 = diag(S) / s

so that training starts one approximate full step from W0 (Ponkshe et al., arXiv 2411.19557, eq. 9). The cost is one
forward and backward pass over the samples for each group of layers whose gradients fit `budget_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsb.adapters.basis import captured_energy, update_pair
from fedsb.adapters.gradients import weight_gradients
from fedsb.adapters.peft_config import LoraSBConfig
from fedsb.adapters.peft_layer import adapter_layers
from fedsb.utils.errors import RunError, UserError

Batch = Mapping[str, Any]


def update_basis_(
    model: Any,
    batches: Iterable[Batch],
    loss_fn: Callable[[Any, Batch], Tensor] | None = None,
    *,
    lr: float,
    sign: bool = True,
    adapter_name: str = "default",
    budget_bytes: int = 1 << 30,
) -> dict[str, float]:
    """Sets A, B and R of the adapter from the first full step on `batches`, and returns each layer's captured share.

    Args:
        model: a PeftModel with a `LoraSBConfig`. During the call, adapters are disabled and the model is in eval mode.
        batches: dicts of tensors whose first axis is the examples. A list or a DataLoader, since it is read once per
            group of layers.
        loss_fn: (model, batch) -> the sum of the losses of the batch's samples. Default: the model's own loss on one
            sample at a time, which weights samples equally, independent of their lengths.
        lr: the learning rate of the first step of training.
        sign: True for Adam-like training, D = -lr sign(G); False for SGD, D = -lr G.
        budget_bytes: maximum size of the float32 gradients of a group of layers.

    Returns:
        ||B' G A'||^2 / ||G||^2 for each layer.
    """
    if iter(batches) is batches:
        raise UserError(
            "batches is an iterator, which ends after one pass. It is read once per group of layers. Pass a list or a "
            "DataLoader."
        )
    layers = adapter_layers(model, adapter_name)
    config: LoraSBConfig = model.peft_config[adapter_name]
    device = next(model.parameters()).device

    def run() -> None:
        samples = 0
        for batch in batches:
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            for part in [moved] if loss_fn else single_samples(moved):
                loss = loss_fn(model, part) if loss_fn else model(**part).loss
                loss.backward()
                samples += 1
        if not samples:
            raise UserError("batches is empty. The `update` basis needs at least one sample.")

    captured = {}
    training = model.training
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with model.disable_adapter():
            model.requires_grad_(False)
            bases = {name: layer.get_base_layer() for name, layer in layers.items()}
            for name, G in weight_gradients(bases, run, budget_bytes=budget_bytes):
                if not torch.isfinite(G).all():
                    raise RunError(f"The gradient of layer {name!r} is not finite. Check the loss of the samples.")
                A, B, S = update_pair(G, config.total_rank, lr, sign)
                R0 = torch.diag_embed(S.reshape(config.blocks, config.r)) / config.scale
                layers[name].set_basis(adapter_name, A, B, R0)
                inside, total = captured_energy(G, A, B, config.blocks)
                captured[name] = inside / total if total else 0.0
    finally:
        model.train(training)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
    config.basis = "update"
    return captured


def single_samples(batch: Batch) -> Iterator[dict[str, Any]]:
    """Yields the rows of a batch as batches of one row. Tensors are split along their first axis."""
    rows = max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), default=0)
    for row in range(rows):
        yield {
            key: value[row : row + 1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for key, value in batch.items()
        }
