"""Classes of one text or of a pair of texts: cross entropy; accuracy, F1 or Matthews.

Reads the columns text, text_pair (if it is configured) and label. A label is an integer, a string, or true/false. A
pair that is too long loses tokens of its longer text first.

`pooling` combines the last states of the tokens: "model" does what the model's own classifier does (BERT: a dense layer
over the first token), "mean" averages all tokens. The mean of the states through a linear head is the mean of the
tokens' logits, so "mean" is a token classifier, as transformers and PEFT know it, whose logits are averaged. A score is
the predicted and the true class, because F1 and Matthews are not means over rows; see metrics.py.
Shapes: b examples, t tokens, c classes.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from fedsb.data.grading import metrics
from fedsb.data.grading.metrics import Values
from fedsb.data.names import SHOWN, is_missing, refuse_same_names
from fedsb.data.rows import Row, place_of
from fedsb.data.tasks.base import Batch, Example, Scored, Task, TaskOptions, join_scores
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.utils.errors import BadRowError, UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

CONFUSION_CLASSES = 50  # no confusion matrix for more


class Classification(Task):
    """A class for a text, or for a pair of texts."""

    metric = "accuracy"
    higher_is_better = True
    scorings = ("logits",)
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews")
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        super().__init__(tokenizer=tokenizer, options=options, max_tokens=max_tokens)
        if options.pooling == "mean":
            self.auto_class = "AutoModelForTokenClassification"
            self.peft_task_type = "TOKEN_CLS"

    @property
    def reads(self) -> list[str]:
        return [self.options.text, *([] if self.options.text_pair is None else [self.options.text_pair])]

    @property
    def needs(self) -> list[str]:
        return [*self.reads, self.options.label]

    def fit_labels(self, train_rows: list[Row], test_rows: list[Row]) -> None:
        """Sets the classes to those of train, sorted by value or alphabet.

        Raises UserError for a label of an unknown type, labels of several types, a single class, and a label that only
        the test has.
        """
        names = [str(label) for label in self.labels_in(train_rows)]
        if len(names) < 2:
            raise UserError(
                f"Every training row has the label {', '.join(map(repr, names))}, but two classes are needed. Check "
                "task.label."
            )
        refuse_same_names(names, "the labels")
        only_test = sorted({str(label) for label in self._labels(test_rows)} - set(names))
        if only_test:
            shown = ", ".join(map(repr, only_test[:SHOWN])) + (" ..." if len(only_test) > SHOWN else "")
            raise UserError(
                f"The test has the label {shown}, which no training row has: {did_you_mean(only_test[0], names)}. Add "
                "such rows to train, or leave them out of the test with data.exclude."
            )
        self.label_names = names

    def labels_in(self, rows: list[Row]) -> list[Any]:
        return sorted(set(self._labels(rows)))

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        examples, n_cut = self.inputs(rows)
        return [
            example | {"labels": target}
            for example, target in zip(examples, self._targets(rows) if rows else [], strict=True)
        ], n_cut

    def inputs(self, rows: list[Row]) -> tuple[list[Example], int]:
        """Returns (the examples of rows, which need no label, how many rows lost text to max_tokens)."""
        if not rows:
            return [], 0
        fields = self._fields([self._texts(rows, column) for column in self.reads])
        if empty := [i for i, tokens in enumerate(fields["input_ids"]) if not tokens]:
            raise BadRowError(
                f"{place_of(rows[empty[0]], empty[0] + 1)}: {len(empty)} of {len(rows)} rows have no text that the "
                f"tokenizer reads in the column {self.options.text!r}. Remove them."
            )
        too_long = [i for i, tokens in enumerate(fields["input_ids"]) if len(tokens) > self.max_tokens]
        if too_long:  # tokenised again, so that the tokenizer cuts around its own special tokens
            long = [rows[i] for i in too_long]
            cut = self._fields([self._texts(long, column) for column in self.reads], limit=self.max_tokens)
            for name, values in cut.items():
                for position, value in zip(too_long, values, strict=True):
                    fields[name][position] = value
        examples: list[Example] = [
            {name: values[position] for name, values in fields.items()} for position in range(len(rows))
        ]
        return examples, len(too_long)

    def _targets(self, rows: list[Row]) -> list[int] | list[float]:
        """Returns the position of each row's class."""
        classes = {name: position for position, name in enumerate(self.label_names)}
        labels = self._labels(rows)
        for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=1):
            if str(label) not in classes:
                raise BadRowError(
                    f"{place_of(row, number)}: the label {label!r} is not one of this model's classes: "
                    f"{did_you_mean(str(label), self.label_names)}"
                )
        return [classes[str(label)] for label in labels]

    def made_up(self, tokens: int, draw: np.random.Generator) -> Example:
        """Returns an example of a text, so that the tokenizer adds the special tokens that some models need."""
        text = self.tokenizer.decode(self._ordinary_tokens(2 * tokens, draw))  # may be fewer after tokenisation
        fields = self._fields([[text]], limit=tokens)
        example: Example = {name: values[0] for name, values in fields.items()}
        return example | {"labels": 0.0 if self.problem_type == "regression" else 0}

    def weight(self, example: Example) -> int:
        return 1

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (the cross entropy (b,) of logits (b, c) or (b, t, c), ones (b,))."""
        from torch.nn.functional import cross_entropy

        loss_b = cross_entropy(pooled(logits, batch), batch["labels"], reduction="none")
        return loss_b, loss_b.new_ones(loss_b.shape)

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (the class of the largest logit (b,), the label's class (b,))."""
        return pooled(logits, batch).argmax(dim=-1).float(), batch["labels"].float()

    def measure(self, scored: Scored) -> dict[str, float]:
        """Returns all three metrics, the task's metric first."""
        predicted, true = join_scores(scored)
        names = dict.fromkeys((self.metric, *self.metrics))
        return {name: self._metric(name, predicted, true) for name in names}

    def confusion(self, scored: Scored) -> list[list[int]] | None:
        if len(self.label_names) > CONFUSION_CLASSES:
            return None
        predicted, true = join_scores(scored)
        table = np.zeros((len(self.label_names), len(self.label_names)), dtype=int)
        np.add.at(table, (true.astype(int), predicted.astype(int)), 1)
        return cast(list[list[int]], table.tolist())

    def _metric(self, metric: str, predicted: Values, true: Values) -> float:
        """Returns a metric of the predicted classes (N,) and the true ones (N,)."""
        if metric == "f1":
            return metrics.f1(predicted, true, len(self.label_names))
        return metrics.matthews(predicted, true) if metric == "matthews" else metrics.accuracy(predicted, true)

    def baseline(self, examples_train: list[Example], examples_test: list[Example]) -> float | None:
        """Returns the metric on test of always predicting the most frequent class of train (a tie: the first class)."""
        if not examples_train or not examples_test:
            return None
        counts = Counter(example["labels"] for example in examples_train)
        majority = max(range(len(self.label_names)), key=lambda label: counts[label])
        true = np.array([example["labels"] for example in examples_test], dtype=np.float64)
        return self._metric(self.metric, np.full_like(true, majority), true)

    def best_guess(self, examples_test: list[Example]) -> float | None:
        true = np.array([example["labels"] for example in examples_test], dtype=np.float64)
        return max(
            (self._metric(self.metric, np.full_like(true, label), true) for label in set(true.tolist())), default=None
        )

    def _fields(self, texts: list[list[str]], *, limit: int | None = None) -> dict[str, list[list[int]]]:
        """Returns the tokenizer's lists for texts or pairs, without the attention mask, which collate adds."""
        how = False if limit is None else "longest_first" if len(texts) > 1 else "only_first"
        made = self.tokenizer(
            *texts,
            truncation=how,
            max_length=limit,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=True,  # a row's "[SEP]" or "</s>" is text
        )
        return {name: list(made[name]) for name in ("input_ids", "token_type_ids") if name in made}

    def _labels(self, rows: list[Row]) -> list[Any]:
        """Returns the label of each row. Raises UserError if one is missing or of an unknown type."""
        name = self.options.label
        labels = [row.get(name) for row in rows]
        missing = [position for position, label in enumerate(labels) if is_missing(label)]
        if missing:
            kinds = list(dict.fromkeys("" if labels[i] is None else str(labels[i]) for i in missing))
            first = missing[0]
            raise BadRowError(
                f"{place_of(rows[first], first + 1)} has the label {labels[first]!r} in the column {name!r}. "
                f"{len(missing)} of {len(rows)} rows have no label. Fill them in, or leave such rows out with "
                f"data.exclude = {{ {name} = {json.dumps(kinds[0] if len(kinds) == 1 else kinds)} }}."
            )
        for number, label in enumerate(labels, start=1):
            if not isinstance(label, (int, str)):
                raise BadRowError(
                    f"{place_of(rows[number - 1], number)} has the label {label!r:.60} ({type(label).__name__}) in the "
                    f"column {name!r}. A label must be an integer, a string or true/false."
                )
        types = sorted({type(label).__name__ for label in labels})
        if len(types) > 1:
            raise UserError(f"The column {name!r} mixes labels of the types {', '.join(types)}. Use one type.")
        return labels


def pooled(logits: Tensor, batch: Batch) -> Tensor:
    """Returns logits of texts (b, c), float32. Those of a token classifier (b, t, c) are averaged over the tokens."""
    if logits.dim() == 2:
        return logits.float()
    mask_bt1 = batch["attention_mask"].unsqueeze(-1).float()
    return (logits.float() * mask_bt1).sum(1) / mask_bt1.sum(1)
