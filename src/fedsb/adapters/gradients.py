"""Full-size gradients of frozen linear layers, a group of layers at a time, without ever giving a weight a gradient.

    dL/dW = sum over calls and tokens of  g_t x_t'          x the layer's input, g = dL/dy of its output

Hooks add g' x up while autograd passes by, so that the weights may be frozen or quantised, and the gradient of the
whole model is never held: only the group's, at most `budget_bytes` (one layer at least). The price is one pass over
the samples a group. The `update` basis (LoRA-SB, arXiv 2411.19557) needs these gradients, in the federation and on
one machine alike.

Shapes: m out, n in. Besides the gradients a group keeps its layers' inputs from forward to backward, activation
checkpointing or not. Both kinds of checkpointing work; the re-entrant kind needs a model whose embeddings require
grad (`model.enable_input_require_grads()`), as it does for training.
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
    """Yields (name, dL/dW (m, n) float32) of each of `layers`, one by one, in their order.

    Args:
        layers: nn.Linear, Conv1D, or quantised layers with their interface. A module called twice sums its calls.
        run: makes all forward and backward passes, of the summed loss over all samples; called once a group of
            layers, it must do the same each time. Parameters that require grad get theirs as in any backward.
        budget_bytes: what the gradients of a group may take.

    A layer that the loss does not depend on (the last ones of CANINE) has a gradient of zeros.

    Raises:
        RunError: a layer was only ever called without a graph, so that its gradient is unknown.
    """
    for group in layer_groups(layers, budget_bytes):
        sums = {name: _Sum(layer) for name, layer in group.items()}
        handles = [layer.register_forward_hook(sums[name].tap) for name, layer in group.items()]
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
                    f"No gradient can come back to layer {name!r}: it was called without a graph. Re-entrant "
                    "activation checkpointing needs model.enable_input_require_grads()."
                )
            yield name, done.G


def layer_groups(layers: Mapping[str, nn.Module], budget_bytes: int) -> Iterator[dict[str, nn.Module]]:
    """`layers` in groups, in order, whose float32 gradients fit the budget; a layer above it is a group of its own."""
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


class _Sum:
    """The gradient of one layer's weight, as it adds up: G (m, n)."""

    def __init__(self, layer: nn.Module) -> None:
        device = next(layer.parameters()).device
        self.G = torch.zeros(linear_shape(layer), dtype=torch.float32, device=device)
        self.calls = 0
        self.calls_with_graph = 0

    def tap(self, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """A forward hook. Under re-entrant checkpointing the first forward has no graph: the second one counts."""
        self.calls += 1
        if not torch.is_grad_enabled():
            return y
        self.calls_with_graph += 1
        if not y.requires_grad:  # nothing upstream is trained; the copy is no leaf, so it may be changed in place
            y = y.detach().requires_grad_().clone()
        x = args[0].detach()

        def add(g: Tensor) -> None:
            self.G.addmm_(g.reshape(-1, g.shape[-1]).float().T, x.reshape(-1, x.shape[-1]).float())

        y.register_hook(add)  # type: ignore[no-untyped-call]
        return y
