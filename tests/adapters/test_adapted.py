"""Which layers are adapted, and putting tensors in and out of a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedsb.adapters.adapted import AdaptedModel, head_linears
from fedsb.models.layers import find_targets
from fedsb.utils.errors import UserError

PER_BLOCK = {  # model -> the kinds of linear layers in a block; each tiny model has two blocks
    "tiny_bert": [
        "attention.output.dense",
        "attention.self.key",
        "attention.self.query",
        "attention.self.value",
        "intermediate.dense",
        "output.dense",
    ],
    "tiny_llama": [
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ],
    "tiny_gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}


@pytest.fixture(params=sorted(PER_BLOCK))
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module, tuple[str, ...]]:
    """(name, model, head)."""
    folder: Path = request.getfixturevalue(request.param)
    if request.param == "tiny_bert":
        return request.param, AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3), ("classifier",)
    return request.param, AutoModelForCausalLM.from_pretrained(folder), ()


def test_blocks(family: Any) -> None:
    name, model, head = family
    found = find_targets(model, "blocks", head)
    assert sorted({re.split(r"\.\d\.", layer)[1] for layer in found}) == PER_BLOCK[name]
    assert len(found) == 2 * len(PER_BLOCK[name])
    assert found == [layer for layer, _ in model.named_modules() if layer in found]  # the model's order


def test_embeddings_the_output_and_the_head_are_never_adapted(family: Any) -> None:
    name, model, head = family
    extra = {"bert.pooler.dense"} if name == "tiny_bert" else set()
    assert set(find_targets(model, ".*", head)) == set(find_targets(model, "blocks", head)) | extra


def test_a_regular_expression_matches_whole_names(family: Any) -> None:
    name, model, head = family
    kind = PER_BLOCK[name][0]
    found = find_targets(model, rf".*\.1\.{re.escape(kind)}", head)
    assert len(found) == 1 and found[0].endswith(f".1.{kind}")
    with pytest.raises(UserError, match=f"matches no linear layer. There are: .*{kind}"):
        find_targets(model, kind, head)  # no whole name


def test_endings(family: Any) -> None:
    name, model, head = family
    ending = PER_BLOCK[name][1].split(".")[-1]
    found = find_targets(model, [ending], head)
    assert found and all(layer.split(".")[-1] == ending for layer in found)


def test_an_unknown_ending_lists_what_there_is(family: Any) -> None:
    name, model, head = family
    with pytest.raises(UserError) as caught:
        find_targets(model, [PER_BLOCK[name][0], "no_such_layer"], head)
    assert "'no_such_layer'" in str(caught.value)
    assert all(kind in str(caught.value) for kind in PER_BLOCK[name])


@pytest.mark.parametrize(("targets", "message"), [("(", "not a regular expression"), ([], "matches no linear layer")])
def test_bad_targets(targets: Any, message: str, tiny_bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with pytest.raises(UserError, match=message):
        find_targets(model, targets)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5)])
        self.classifier = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


def adapted_toy() -> tuple[AdaptedModel, dict[str, torch.Tensor]]:
    """A toy of two layers with rank-2 cores, and tensors for two clients."""
    torch.manual_seed(0)
    adapted = AdaptedModel(Toy(), kind="core", targets=["blocks.0", "blocks.1"], head=["classifier"], scale=2.0)
    tensors = {}
    for layer, (m, n) in adapted.shapes.items():
        tensors |= {f"{layer}.A": torch.randn(2, n), f"{layer}.B": torch.randn(m, 2)}
        tensors[f"{layer}.R"] = torch.randn(2, 1, 2, 2)
    return adapted, {**tensors, "classifier.weight": torch.randn(2, 2, 5), "classifier.bias": torch.randn(2, 2)}


def test_two_clients_in_one_forward_equal_two_dense_models() -> None:
    adapted, tensors = adapted_toy()
    x = torch.randn(6, 4)
    adapted.load(tensors)
    got = adapted.model(x)
    weights = dict(adapted.base_weights())
    for k in range(2):
        y = x[3 * k : 3 * k + 3]
        for layer in ("blocks.0", "blocks.1"):
            W = weights[layer] + 2.0 * tensors[f"{layer}.B"] @ tensors[f"{layer}.R"][k, 0] @ tensors[f"{layer}.A"]
            y = y @ W.T + adapted.layers[layer].base.bias
        y = y @ tensors["classifier.weight"][k].T + tensors["classifier.bias"][k]
        torch.testing.assert_close(got[3 * k : 3 * k + 3], y)


def test_only_what_is_named_trains() -> None:
    adapted, tensors = adapted_toy()
    adapted.load(tensors, trainable=frozenset({"blocks.1.R", "classifier.bias"}))
    assert set(adapted.parameters()) == {"blocks.1.R", "classifier.bias"}
    adapted.model(torch.randn(2, 4)).sum().backward()
    with_gradient = {name for name, p in adapted.model.named_parameters() if p.grad is not None}
    assert with_gradient == {"blocks.1.R", "classifier.bias"}
    assert adapted.head_keys == {"classifier.weight", "classifier.bias"}


def test_the_adapter_is_float32_on_a_bfloat16_base() -> None:
    """1 + 1e-4 is 1 in bfloat16."""
    _, tensors = adapted_toy()
    adapted = AdaptedModel(
        Toy().to(torch.bfloat16), kind="core", targets=["blocks.0", "blocks.1"], head=["classifier"], scale=2.0
    )
    tensors["blocks.0.R"] = torch.full((2, 1, 2, 2), 1 + 1e-4)
    adapted.load(tensors, trainable=frozenset(tensors) - {"blocks.0.A", "blocks.0.B", "blocks.1.A", "blocks.1.B"})
    assert all(p.dtype == torch.float32 for p in adapted.parameters().values())
    assert torch.equal(adapted.parameters()["blocks.0.R"], tensors["blocks.0.R"])
    adapted.model(torch.randn(4, 4, dtype=torch.bfloat16)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.parameters().values())


@pytest.mark.parametrize("kind", ["missing", "unknown"])
def test_tensors_that_do_not_fit_are_refused(kind: str) -> None:
    """A tensor left out would leave the client before's in its place."""
    adapted, tensors = adapted_toy()
    adapted.load(tensors)
    wrong = {"blocks.0.r" if key == "blocks.0.R" else key: value for key, value in tensors.items()}
    if kind == "missing":
        wrong.pop("blocks.0.r")
    with pytest.raises(ValueError) as caught:
        adapted.load(wrong)
    assert ("'blocks.0.R' is missing" if kind == "missing" else "'blocks.0.r' is unknown") in str(caught.value)


def test_unwrap_gives_the_base_back() -> None:
    torch.manual_seed(0)
    model, x = Toy(), torch.randn(3, 4)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    adapted = AdaptedModel(model, kind="factors", targets=["blocks.0", "blocks.1"], head=["classifier"])
    assert adapted.unwrap() is model
    assert torch.equal(model(x), before)
    assert [name for name, _ in model.named_parameters()] == names


def test_the_head_starts_as_it_stands_and_answers_in_the_inputs_dtype() -> None:
    model = Toy().to(torch.bfloat16)
    weight = model.classifier.weight.detach().clone()
    adapted = AdaptedModel(model, kind="core", targets=["blocks.0"], head=["classifier"])
    assert torch.equal(adapted.head_tensors()["classifier.weight"], weight.float())
    assert adapted.heads["classifier"](torch.ones(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_head_of_another_kind_is_refused() -> None:
    model = nn.Module()
    model.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(UserError, match=r"'head' contains 'head.1.weight', which is not a linear layer"):
        head_linears(model, ["head"])
    model.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    assert head_linears(model, ["head"]) == ["head.0", "head.2"]
