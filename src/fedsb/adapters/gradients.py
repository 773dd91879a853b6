"""Full-size gradients of frozen linear layers, one group of layers at a time, without gradients on the weights.

    dL/dW = sum over calls and tokens of  g_t x_t'          x the layer's input, g = dL/dy of its output

Hooks accumulate g' x during the backward pass, so the weights may be frozen or quantised. Only the gradients of one
group are in memory: at most `budget_bytes`, or one layer. The cost is one pass over the samples per group. The `update`
basis (LoRA-SB, arXiv 2411.19557) needs these gradients, both in a federation and on one machine.

Shapes: m out, n in. A group also keeps its layers' inputs from forward to backward, with or without activation
checkpointing. Both kinds of checkpointing work. The re-entrant kind needs embeddings that require grad
(`model.enable_input_require_grads()`), as it does in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.models.layers import linear_shape
from fedsb.utils.errors import RunError

FLOAT32_BYTES = 4


def weight_gradients(
    layers: Mapping[str, nn.Module], run: Callable[[], None], *, budget_bytes: int = 1 << 30
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, dL/dW (m, n) float32) for each of `layers`, in their order.

    Args:
        layers: nn.Linear, Conv1D, or quantised layers with the same interface. The gradients of several calls add up.
        run: runs all forward and backward passes, for the loss summed over all samples. It is called once per group
            and must do the same each time. Parameters that require grad accumulate their gradients as usual.
        budget_bytes: maximum size of the gradients of a group.

    A layer that does not affect the loss (such as the last layers of CANINE) has a gradient of zeros.

    Raises:
        RunError: a layer was only called without a graph, so its gradient is unknown.
    """
    for group in layer_groups(layers, budget_bytes):
        sums = {name: _GradientSum(layer) for name, layer in group.items()}
        handles = [layer.register_forward_hook(sums[name].forward_hook) for name, layer in group.items()]
        try:
            with torch.enable_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        for name in group:
            done = sums.pop(name)
            if done.calls and not done.calls_with_graph:
                raise RunError(
                    f"The gradient of layer {name!r} is unknown, because the layer was called without a graph. With "
                    "re-entrant activation checkpointing, call model.enable_input_require_grads() first."
                )
            yield name, done.G


def layer_groups(layers: Mapping[str, nn.Module], budget_bytes: int) -> Iterator[dict[str, nn.Module]]:
    """Yields groups of layers whose float32 gradients fit the budget. A layer that exceeds it forms its own group."""
    group: dict[str, nn.Module] = {}
    used_bytes = 0
    for name, layer in layers.items():
        m, n = linear_shape(layer)
        if group and used_bytes + m * n * FLOAT32_BYTES > budget_bytes:
            yield group
            group, used_bytes = {}, 0
        group[name] = layer
        used_bytes += m * n * FLOAT32_BYTES
    if group:
        yield group


class _GradientSum:
    """The accumulated gradient G (m, n) of one layer's weight."""

    def __init__(self, layer: nn.Module) -> None:
        device = next(layer.parameters()).device
        self.G = torch.zeros(linear_shape(layer), dtype=torch.float32, device=device)
        self.calls = 0
        self.calls_with_graph = 0

    def forward_hook(self, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Registers the backward hook. In re-entrant checkpointing, only the second forward has a graph."""
        self.calls += 1
        if not torch.is_grad_enabled():
            return y
        self.calls_with_graph += 1
        if not y.requires_grad:  # nothing before this layer is trained; a clone may be changed in place
            y = y.detach().requires_grad_().clone()
        x = args[0].detach()

        def add(g: Tensor) -> None:
            self.G.addmm_(g.reshape(-1, g.shape[-1]).float().T, x.reshape(-1, x.shape[-1]).float())

        y.register_hook(add)  # type: ignore[no-untyped-call]
        return y
