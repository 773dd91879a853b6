"""Numbers for texts: what a label may be, the loss and the correlations by hand."""

import pytest
import torch

from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.utils.errors import UserError


def task_of(tokenizer, kind="regression", **options):
    return open_task(kind, tokenizer=tokenizer, options=TaskOptions(**options), max_tokens=16)


def rows_of(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def test_a_label_is_a_number(minilm):
    task = task_of(minilm)
    task.fit_labels(rows_of(3.8, 1, "0.25"), [])
    assert (task.label_names, task.classes, task.problem_type) == (["label"], [], "regression")
    examples, _ = task.encode(rows_of(3.8, 1, "0.25"))
    batch = task.collate(examples)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == pytest.approx([3.8, 1, 0.25])
    assert task.baseline(examples, examples) is None


@pytest.mark.parametrize("label", ["similar", None, True, "nan", float("inf"), "1,5", 10**400])
def test_a_label_that_is_none(minilm, label):
    with pytest.raises(UserError, match=r"row 2 has the label .* in the column 'label', where a number is expected"):
        task_of(minilm).fit_labels(rows_of(1.0, label), [])


def test_labels_that_are_all_alike(minilm):
    with pytest.raises(UserError, match=r"Every training row has the label 2 in the column 'label'"):
        task_of(minilm).fit_labels(rows_of(2, 2.0), rows_of(1, 2))
    with pytest.raises(UserError, match=r"Every test row has the label 2 "):
        task_of(minilm).fit_labels(rows_of(1, 2.0), rows_of(2))


def test_loss_and_scores_by_hand(minilm):
    task = task_of(minilm)
    outputs, batch = torch.tensor([[1.0], [2.0], [4.0]]), {"labels": torch.tensor([0.5, 2.0, 1.0])}
    loss_b, weight_b = task.losses(outputs, batch)
    assert (loss_b.tolist(), weight_b.tolist()) == ([0.25, 0, 9], [1, 1, 1])
    predicted, true = task.scores(outputs, batch)
    assert (predicted.tolist(), true.tolist()) == ([1, 2, 4], [0.5, 2, 1])
    # x - mean = -4 -1 5, y - mean = -4 5 -1 (thirds, sixths): r = (16 - 5 - 5) / 42; ranks 1 2 3 and 1 3 2: 1/2
    found = task.measure([(predicted.double()[:2], true.double()[:2]), (predicted.double()[2:], true.double()[2:])])
    assert found == {"pearson": pytest.approx(6 / 42), "spearman": pytest.approx(0.5)}
    assert list(task_of(minilm, metric="spearman").measure([(predicted.double(), true.double())])) == [
        "spearman",
        "pearson",
    ]


def test_mean_pooling_is_over_the_tokens_that_are_there(minilm):
    task = task_of(minilm, pooling="mean")
    assert task.auto_class == "AutoModelForTokenClassification"
    batch = {"labels": torch.tensor([5.0]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert task.scores(torch.tensor([[[1.0], [3.0], [99.0]]]), batch)[0].tolist() == [2]


def test_what_a_metric_may_be(minilm):
    assert task_of(minilm, metric="spearman").metric == "spearman"
    assert task_of(minilm, "classification", metric="f1").metric == "f1"
    for kind, metric, said in (
        ("regression", "f1", "pearson, spearman"),
        ("classification", "pearson", "accuracy, f1, matthews"),
        ("text", "accuracy", "nats_per_token only"),
    ):
        with pytest.raises(UserError, match=rf"'{metric}' is not supported by this task. Supported: {said}"):
            task_of(minilm, kind, metric=metric)


def test_a_metric_of_classes_takes_all_rows_together(minilm):
    """Two batches; the mean of their F1 (2/3 and 0) would be 1/3, that of all rows is 1/2."""
    task = task_of(minilm, "classification", metric="f1")
    task.fit_labels(rows_of("no", "yes"), [])
    batches = [
        (torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double()),
        (torch.tensor([0.0]).double(), torch.tensor([1.0]).double()),
    ]
    found = task.measure(batches)  # Matthews: (3 x 1 - 5) / (9 - 5)
    assert found == {"f1": pytest.approx(1 / 2), "accuracy": pytest.approx(1 / 3), "matthews": pytest.approx(-1 / 2)}
    assert next(iter(found)) == "f1"
    train, test = (task.encode(rows)[0] for rows in (rows_of("yes", "yes", "no"), rows_of("yes", "no", "yes", "yes")))
    assert task.baseline(train, test) == pytest.approx(6 / 7)  # always "yes"
    matthews = task_of(minilm, "classification", metric="matthews")
    matthews.fit_labels(rows_of("no", "yes"), [])
    assert matthews.baseline(train, test) == 0
