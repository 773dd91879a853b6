"""`weight_gradients` against autograd, on tiny models of three families."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedsb.adapters.gradients import layer_groups, weight_gradients
from fedsb.models.layers import find_targets, is_conv1d, linear_shape
from fedsb.utils.errors import RunError


def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return BertForSequenceClassification(config)


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))


FAMILIES = {"bert": bert, "llama": llama, "gpt2": gpt2}


def prepared(family: str) -> tuple[PreTrainedModel, dict[str, nn.Module], Callable[[], None]]:
    """A frozen model, its block layers, and a run over two batches of three rows."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in find_targets(model)}
    batches = []
    for _ in range(2):
        ids = torch.randint(0, 50, (3, 7))
        batches.append({"input_ids": ids, "labels": torch.tensor([0, 1, 2]) if family == "bert" else ids})

    def run() -> None:
        for batch in batches:
            (3 * model(**batch).loss).backward()

    return model, layers, run


def autograd(layers: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, Tensor]:
    """dL/dW (m, n) the plain way; the weights are frozen again and hold no gradient afterwards."""
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    run()
    found = {}
    for name, layer in layers.items():
        found[name] = layer.weight.grad.T if is_conv1d(layer) else layer.weight.grad
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget_bytes", [1, 4000, 1 << 30])
def test_equals_autograd_and_leaves_no_gradient(family: str, budget_bytes: int) -> None:
    model, layers, run = prepared(family)
    expected = autograd(layers, run)
    found = dict(weight_gradients(layers, run, budget_bytes=budget_bytes))
    assert list(found) == list(layers)
    for name, G in found.items():
        assert G.dtype == torch.float32 and tuple(G.shape) == linear_shape(layers[name])
        torch.testing.assert_close(G, expected[name], rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in layers.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, layers, run = prepared("llama")
    expected = autograd(layers, run)
    model.train()  # no dropout in this model; checkpointing is off in eval mode
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, G in weight_gradients(layers, run):
        torch.testing.assert_close(G, expected[name], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_without_input_gradients_is_an_error_not_a_zero() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(4, 3)

    def run() -> None:
        y = checkpoint(first, x, use_reentrant=True)
        second(y).sum().backward()

    with pytest.raises(RunError, match="'first'"):
        list(weight_gradients({"first": first, "second": second}, run))


def test_a_layer_called_twice_sums_and_one_never_called_is_zero() -> None:
    layer, unused_settings = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    found = dict(
        weight_gradients({"twice": layer, "idle": unused_settings}, lambda: layer(layer(x)).square().sum().backward())
    )
    expected = torch.autograd.grad(layer(layer(x)).square().sum(), layer.weight)[0]
    torch.testing.assert_close(found["twice"], expected)
    assert not found["idle"].any()


def test_a_layer_that_the_loss_does_not_depend_on_has_a_gradient_of_zeros() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(4, 3)

    def run() -> None:
        second(x)
        first(x).sum().backward()

    found = dict(weight_gradients({"first": first, "second": second}, run))
    assert found["first"].any() and not found["second"].any()
    assert not second._forward_hooks


def test_the_output_may_be_changed_in_place() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    x = torch.ones(4, 3)

    def run() -> None:
        y = layer(x)
        y += 1
        y.sum().backward()

    assert dict(weight_gradients({"layer": layer}, run))["layer"].tolist() == [[4.0] * 3] * 2  # sum of 4 tokens of ones


def test_groups_fit_the_budget() -> None:
    layers = {name: nn.Linear(n, 1) for name, n in {"a": 4, "b": 4, "c": 100, "d": 4}.items()}
    assert [list(group) for group in layer_groups(layers, budget_bytes=32)] == [["a", "b"], ["c"], ["d"]]


def test_bfloat16_layers_sum_in_float32() -> None:
    layer = nn.Linear(8, 8, bias=False).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    G = dict(weight_gradients({"layer": layer}, lambda: layer(x).sum().backward()))["layer"]
    torch.testing.assert_close(G, x.float().sum(0).expand(8, 8))
