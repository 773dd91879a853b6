"""Labels, pairs and cuts with the real MiniLM tokenizer; losses and scores by hand."""

import math

import pytest
import torch

from fedsb.data.sources import load_table
from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.utils.errors import UserError


def task_of(tokenizer, max_tokens=16, **columns):
    return open_task("classification", tokenizer=tokenizer, options=TaskOptions(**columns), max_tokens=max_tokens)


def rows_of(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [((10, 9, 2), ["2", "9", "10"]), (("b", "a", "b"), ["a", "b"]), ((True, False), ["False", "True"])],
)
def test_labels_are_sorted_by_value_or_alphabet(minilm, labels, names):
    task = task_of(minilm)
    task.fit_labels(rows_of(*labels), rows_of(labels[0]))
    assert task.label_names == names
    examples, n_cut = task.encode(rows_of(*labels))
    assert [names[example["labels"]] for example in examples] == [str(label) for label in labels]
    assert (n_cut, task.weight(examples[0])) == (0, 1)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((0, 1), (0, 5), "The test has the label '5', which no training row has"),
        ((0, 0), (0,), "Every training row has the label '0'"),
        ((0, "a"), (0,), "mixes labels of the types int, str"),
        ((0, 1, None), (0,), "row 3 has the label None"),
        ((0.5, 1.5), (0.5,), r"row 1 has the label 0\.5 \(float\)"),
    ],
)
def test_labels_that_cannot_be(minilm, train, test, message):
    with pytest.raises(UserError, match=message):
        task_of(minilm).fit_labels(rows_of(*train), rows_of(*test))


def test_a_label_must_be_fitted_first(minilm):
    with pytest.raises(UserError, match="the label 1 is not one of this model"):
        task_of(minilm).encode(rows_of(1))


def test_a_long_text_keeps_its_special_tokens_and_is_counted(minilm):
    task = task_of(minilm, max_tokens=5)
    rows = [{"text": "one two three four", "label": 0}, {"text": "one two three", "label": 1}]
    task.fit_labels(rows, rows)
    examples, n_cut = task.encode(rows)
    assert [minilm.decode(e["input_ids"]) for e in examples] == ["[CLS] one two three [SEP]"] * 2
    assert n_cut == 1


def test_a_pair_loses_from_its_longer_text(minilm):
    task = task_of(minilm, max_tokens=8, text="premise", text_pair="hypothesis")
    rows = [{"premise": "one two three four five", "hypothesis": "six seven", "label": label} for label in (0, 1)]
    task.fit_labels(rows, rows)
    (example, _), n_cut = task.encode(rows)
    assert minilm.decode(example["input_ids"]) == "[CLS] one two three [SEP] six seven [SEP]"
    assert example["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert n_cut == 2
    batch = task.collate([example, example])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 8),
        "token_type_ids": (2, 8),
        "attention_mask": (2, 8),
        "labels": (2,),
    }


def test_losses_and_scores_by_hand(minilm):
    task = task_of(minilm)
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]], dtype=torch.bfloat16)  # p = 1/4, 3/4
    batch = {"labels": torch.tensor([1, 1])}
    loss_b, weight_b = task.losses(logits, batch)
    assert loss_b.dtype == torch.float32
    torch.testing.assert_close(loss_b, torch.tensor([math.log(4 / 3), math.log(4)]), atol=5e-3, rtol=0)  # bfloat16 in
    assert weight_b.tolist() == [1, 1]
    predicted_b, true_b = task.scores(logits, batch)
    assert (predicted_b.tolist(), true_b.tolist()) == ([1, 0], [1, 1])
    found = task.measure([(predicted_b.double(), true_b.double())])
    assert found == {"accuracy": 0.5, "f1": pytest.approx(1 / 3), "matthews": 0}  # no class is fitted: F1 of 0 and 2/3
    assert list(found) == ["accuracy", "f1", "matthews"]


def test_the_baseline_is_trains_majority_on_test(minilm):
    task = task_of(minilm)
    train, test = rows_of("a", "b", "b"), rows_of("b", "a", "a", "a")
    task.fit_labels(train, test)
    assert task.baseline(task.encode(train)[0], task.encode(test)[0]) == 0.25
    assert task.baseline([], []) is None


def test_trec_and_snli(minilm, real_data):
    train, test = [load_table(str(real_data / "trec" / f"{part}.jsonl.gz")) for part in ("train", "test")]
    task = task_of(minilm, max_tokens=64)
    task.fit_labels(train.rows, test.rows)
    examples, n_cut = task.encode(test.rows)
    assert task.label_names == list("012345")
    assert (len(examples), n_cut) == (500, 0)
    assert minilm.decode(examples[0]["input_ids"]) == "[CLS] how far is it from denver to aspen? [SEP]"
    assert examples[0]["labels"] == 5

    pairs = load_table(str(real_data / "snli" / "dev.jsonl.gz")).rows[:20]
    task = task_of(minilm, max_tokens=64, text="premise", text_pair="hypothesis")
    task.fit_labels(pairs, pairs)
    first = task.encode(pairs)[0][0]
    hypothesis = [i for i, kind in zip(first["input_ids"], first["token_type_ids"], strict=True) if kind == 1]
    assert minilm.decode(hypothesis).startswith("the sisters are hugging goodbye")


def test_mean_pooling_averages_the_logits_of_the_tokens_that_are_there(minilm):
    """Text 0: tokens (1, 0) and (3, 0), the third is padding; text 1: three tokens of (0, 3)."""
    task = task_of(minilm, pooling="mean")
    assert (task.auto_class, task.peft_task_type) == ("AutoModelForTokenClassification", "TOKEN_CLS")
    logits = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 99.0]], [[0.0, 3.0]] * 3])
    batch = {"labels": torch.tensor([0, 0]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    loss_b, weight_b = task.losses(logits, batch)
    assert loss_b.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(3))])
    assert weight_b.tolist() == [1, 1]
    assert task.scores(logits, batch)[0].tolist() == [0, 1]
