"""Classes of one text or of a pair of texts: cross entropy; accuracy, F1 or Matthews.

Reads the columns text, text_pair (where it is named) and label; a label is an integer, a string, or true/false.
A pair that is too long loses tokens from its longer text first.

`pooling` is how the tokens' last states become one: "model" as the model's own classifier does (BERT: a dense layer
over the first token), "mean" over all tokens. The mean of the states through a linear head is the mean of the tokens'
logits, so the latter is a token classifier as transformers and PEFT know it, whose logits are averaged.
What is scored is the predicted class and the true one, for F1 and Matthews are no means over rows; see metrics.py.
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
from fedsb.data.tasks.base import Batch, Example, Scored, Task, TaskOptions, Tokenizer, together
from fedsb.utils.errors import BadRowError, UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

CONFUSION_CLASSES = 50  # a table of more is not kept


class Classification(Task):
    """Which class a text, or a pair of texts, belongs to."""

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
        """The classes of train, integers by value and strings by alphabet.

        Raises UserError: a label of another type, labels of several types, one class only, a label only the test has.
        """
        names = [str(label) for label in self.labels_in(train_rows)]
        if len(names) < 2:
            raise UserError(f"every training row has the label {', '.join(map(repr, names))}: two classes are needed")
        refuse_same_names(names, "the labels")
        only_test = sorted({str(label) for label in self._labels(test_rows)} - set(names))
        if only_test:
            shown = ", ".join(map(repr, only_test[:SHOWN])) + (" ..." if len(only_test) > SHOWN else "")
            raise UserError(
                f"the test has the label {shown}, which no training row has: {did_you_mean(only_test[0], names)}. Add "
                "such rows to train, or drop them from the test with data.exclude"
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
        """Returns the examples of rows that need no label, and how many rows lost text to max_tokens."""
        if not rows:
            return [], 0
        fields = self._fields([self._texts(rows, column) for column in self.reads])
        if empty := [i for i, tokens in enumerate(fields["input_ids"]) if not tokens]:
            raise BadRowError(
                f"{place_of(rows[empty[0]], empty[0] + 1)}: {len(empty)} of {len(rows)} rows have no text that the "
                f"tokenizer reads, in the column {self.options.text!r}: leave them out"
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
        """The position of each row's class."""
        classes = {name: position for position, name in enumerate(self.label_names)}
        labels = self._labels(rows)
        for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=1):
            if str(label) not in classes:
                raise BadRowError(
                    f"{place_of(row, number)}: the label {label!r} is none of this model's classes: "
                    f"{did_you_mean(str(label), self.label_names)}"
                )
        return [classes[str(label)] for label in labels]

    def made_up(self, tokens: int, draw: np.random.Generator) -> Example:
        """Returns an example of a text, so that the tokenizer adds its special tokens: some models look for them."""
        text = self.tokenizer.decode(self._ordinary_tokens(2 * tokens, draw))  # may be fewer once it is read again
        fields = self._fields([[text]], limit=tokens)
        example: Example = {name: values[0] for name, values in fields.items()}
        return example | {"labels": 0.0 if self.problem_type == "regression" else 0}

    def weight(self, example: Example) -> int:
        return 1

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy (b,) of logits (b, c) or (b, t, c), and ones (b,)."""
        from torch.nn.functional import cross_entropy

        loss_b = cross_entropy(pooled(logits, batch), batch["labels"], reduction="none")
        return loss_b, loss_b.new_ones(loss_b.shape)

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The class of the largest logit (b,), and the label's (b,)."""
        return pooled(logits, batch).argmax(dim=-1).float(), batch["labels"].float()

    def measure(self, scored: Scored) -> dict[str, float]:
        """All three, the metric first."""
        predicted, true = together(scored)
        names = dict.fromkeys((self.metric, *self.metrics))
        return {name: self.of(name, predicted, true) for name in names}

    def confusion(self, scored: Scored) -> list[list[int]] | None:
        if len(self.label_names) > CONFUSION_CLASSES:
            return None
        predicted, true = together(scored)
        table = np.zeros((len(self.label_names), len(self.label_names)), dtype=int)
        np.add.at(table, (true.astype(int), predicted.astype(int)), 1)
        return cast(list[list[int]], table.tolist())

    def of(self, metric: str, predicted: Values, true: Values) -> float:
        """One metric of the classes that were predicted (N,) and the true ones (N,)."""
        if metric == "f1":
            return metrics.f1(predicted, true, len(self.label_names))
        return metrics.matthews(predicted, true) if metric == "matthews" else metrics.accuracy(predicted, true)

    def baseline(self, examples_train: list[Example], examples_test: list[Example]) -> float | None:
        """The metric on test of always saying the class that is most frequent in train (a tie: the first class)."""
        if not examples_train or not examples_test:
            return None
        counts = Counter(example["labels"] for example in examples_train)
        majority = max(range(len(self.label_names)), key=lambda label: counts[label])
        true = np.array([example["labels"] for example in examples_test], dtype=np.float64)
        return self.of(self.metric, np.full_like(true, majority), true)

    def best_guess(self, examples_test: list[Example]) -> float | None:
        true = np.array([example["labels"] for example in examples_test], dtype=np.float64)
        return max(
            (self.of(self.metric, np.full_like(true, label), true) for label in set(true.tolist())), default=None
        )

    def _fields(self, texts: list[list[str]], *, limit: int | None = None) -> dict[str, list[list[int]]]:
        """The tokenizer's lists for texts or pairs, without the attention mask, which collate makes."""
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
        name = self.options.label
        labels = [row.get(name) for row in rows]
        missing = [position for position, label in enumerate(labels) if is_missing(label)]
        if missing:
            kinds = list(dict.fromkeys("" if labels[i] is None else str(labels[i]) for i in missing))
            first = missing[0]
            raise BadRowError(
                f"{place_of(rows[first], first + 1)} has the label {labels[first]!r} in the column {name!r}, as "
                f"{len(missing)} of {len(rows)} rows have no label. Fill them in, or leave such rows out with "
                f"data.exclude = {{ {name} = {json.dumps(kinds[0] if len(kinds) == 1 else kinds)} }}."
            )
        for number, label in enumerate(labels, start=1):
            if not isinstance(label, (int, str)):
                raise BadRowError(
                    f"{place_of(rows[number - 1], number)} has the label {label!r:.60} ({type(label).__name__}) in the "
                    f"column {name!r}: a label is an integer, a string or true/false"
                )
        types = sorted({type(label).__name__ for label in labels})
        if len(types) > 1:
            raise UserError(f"the column {name!r} mixes labels of the types {', '.join(types)}: keep one")
        return labels


def pooled(logits: Tensor, batch: Batch) -> Tensor:
    """Logits of texts (b, c), float32: those of a token classifier (b, t, c) are averaged over each text's tokens."""
    if logits.dim() == 2:
        return logits.float()
    mask_bt1 = batch["attention_mask"].unsqueeze(-1).float()
    return (logits.float() * mask_bt1).sum(1) / mask_bt1.sum(1)
