"""The contract of a task: rows become padded batches, and a batch has losses and scores.

Shapes: b examples, t tokens, v vocabulary, c classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np

from fedsb.data.grading.metrics import Values
from fedsb.data.rows import Row, Table, place_of, require_columns
from fedsb.data.tasks.tokens import TextEncoder, Tokenizer, pad_token
from fedsb.utils.errors import BadRowError, UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
ANSWERS = ("labels", "targets")  # what a batch contains beside the model's inputs

MADE_UP = 1000  # a made-up text takes its tokens from this many first ones
NO_LOSS = -100  # the label that cross entropy ignores
Score = Literal["auto", "answers", "options", "loss"]
MetricName = Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman"]
Scored = Iterable[tuple["Tensor", "Tensor"]]  # the results of `Task.scores`, batch by batch, float64


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question of a graded row, alongside its tokens."""

    prompt: str  # before the prompt's template
    gold: str  # the correct answer
    kind: str  # how it is graded; each family defines its kinds
    new_tokens: int  # longer answers are cut
    options: tuple[str, ...] = ()  # the answers to choose from, if there are any
    option_texts: tuple[str, ...] = ()  # what the model would write for each option
    prompt_ids: tuple[int, ...] = ()  # what the model reads, uncut
    code_prefix: str = ""  # code that precedes the answer in the program that is run


Example = dict[str, "list[int] | int | float | Question"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The columns that a task reads, and how it uses the model. Each task uses only its own options."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str = "prompt"
    answer: str = "answer"
    input: str = "input"
    pooling: Literal["model", "mean"] = "model"
    score: Score = "auto"
    metric: MetricName = "auto"
    new_tokens: int | None = None
    messages: str = "messages"
    run_code: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # label -> the name of its class


class Task(ABC):
    """A task family: the columns that it reads, how it encodes and collates them, and how it scores."""

    metric: str
    higher_is_better: bool
    scorings: ClassVar[tuple[str, ...]]  # the values of task.score; the first is the default
    metrics: ClassVar[tuple[str, ...]] = ()  # the values of task.metric, if any; the first is the default
    auto_class: str  # the name of the transformers class
    peft_task_type: str
    problem_type: str | None = None  # of the head, for transformers, if it is not the default

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        if max_tokens < 2:
            raise UserError(f"model.max_seq_length = {max_tokens} is too small. It must be at least 2.")
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.options = options
        self.max_tokens = max_tokens
        self.label_names: list[str] = []  # of the head's outputs, empty without a head; set by fit_labels
        self.names = dict(options.names)  # label -> the name that is shown and exported; see name_classes
        self.scoring = self.scorings[0] if options.score == "auto" else options.score
        if self.scoring not in self.scorings:
            known = ", ".join(self.scorings)
            raise UserError(f"task.score = {options.score!r} is not supported by this task. Supported: {known}.")
        if options.metric != "auto":
            if options.metric not in self.metrics:
                known = ", ".join(self.metrics) or f"{self.metric} only"
                raise UserError(f"task.metric = {options.metric!r} is not supported by this task. Supported: {known}.")
            self.metric = options.metric

    @property
    def classes(self) -> list[str]:
        """The classes; empty if rows have no classes."""
        return self.label_names

    @property
    def class_names(self) -> list[str]:
        """The names of the head's outputs for people and in exported models."""
        return [self.names.get(label, label) for label in self.label_names]

    def take_classes(self, manifest: Mapping[str, Any]) -> None:
        """Restores the classes and their names from "task" in the manifest of a run."""
        self.label_names = list(manifest["label_names"] or [])
        if shown := manifest.get("class_names"):
            self.names = dict(zip(self.label_names, shown, strict=True))

    def name_classes(self, of_table: Sequence[str] = ()) -> None:
        """Names the classes by task.names, else by a table's names of the labels 0, 1, ...

        The labels must be known. Raises UserError for the name of an unknown label, and for two classes with one name.
        """
        if not self.options.names:
            self.names = {str(label): name for label, name in enumerate(of_table)} if self.classes else {}
        unknown = [label for label in self.options.names if label not in self.classes]
        if unknown:
            known = did_you_mean(unknown[0], self.classes)
            raise UserError(f"task.names has a name for {unknown[0]!r}, which no row has as label: {known}.")
        if len(set(self.class_names)) < len(self.class_names):
            raise UserError(f"task.names gives two classes one name: {', '.join(self.class_names)}. Rename one.")

    @classmethod
    def higher_is_better_by(cls, score: str) -> bool:
        """Returns whether a higher score is better with this task.score."""
        return cls.higher_is_better

    @property
    @abstractmethod
    def needs(self) -> list[str]:
        """The columns that a table must have."""

    @property
    def optional_prompt_columns(self) -> tuple[str, ...]:
        """The columns that are a part of what the model reads, if a table has them."""
        return ()

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """All columns that are read if a table has them."""
        return self.optional_prompt_columns

    @property
    @abstractmethod
    def reads(self) -> list[str]:
        """The columns that the model reads. A row without its label or answer has them too."""

    def columns_of(self, table: Table) -> list[str]:
        """Returns the columns that are read, the one to predict last. Raises UserError if one is missing."""
        require_columns(table, self.needs)
        return self.needs

    @abstractmethod
    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """Returns (the examples of `rows`, how many rows lost text to max_tokens).

        Raises UserError at a row whose text is not a string.
        """

    def encode_test(self, rows: list[Row]) -> tuple[list[Example], int]:
        """Returns the same for rows that are scored."""
        return self.encode(rows)

    @abstractmethod
    def weight(self, example: Example) -> int:
        """Returns the example's weight in a mean loss, as `losses` returns it, before any forward pass."""

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (the sum of each example's losses (b,), its weight in a mean (b,)), float32."""

    @abstractmethod
    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the two numbers (b,), (b,) per example from which `measure` computes the metric, float32.

        For a mean they are a sum and a count.
        """

    def measure(self, scored: Scored) -> dict[str, float]:
        """Returns the metric and the other metrics to show, by name, from the scores of all examples."""
        total = count = 0.0
        for sums, counts in scored:
            total, count = total + float(sums.sum()), count + float(counts.sum())
        return {self.metric: total / count}

    def confusion(self, scored: Scored) -> list[list[int]] | None:
        """Returns the number of rows by true and predicted class; None without classes, or with too many."""
        return None

    def fit_labels(self, train_rows: list[Row], test_rows: list[Row]) -> None:
        """Sets `label_names` from the rows."""
        self.label_names = []

    def baseline(self, examples_train: list[Example], examples_test: list[Example]) -> float | None:
        """Returns the metric of a guess that reads no text; None if there is no such guess."""
        return None

    def best_guess(self, examples_test: list[Example]) -> float | None:
        """Returns the best metric of always predicting the same class on these rows; None without classes."""
        return None

    def count_split_rows(self, rows: list[Row]) -> int:
        """Returns how many of these rows become several examples."""
        return 0

    def labels_in(self, rows: list[Row]) -> list[Any]:
        """Returns the different labels of the rows, sorted."""
        return []

    @abstractmethod
    def made_up(self, tokens: int, draw: np.random.Generator) -> Example:
        """Returns an example of at most `tokens` random tokens with some target, to test a model."""

    def _ordinary_tokens(self, count: int, draw: np.random.Generator) -> list[int]:
        """Returns random tokens that are not special."""
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ordinary = [number for number in range(min(len(self.tokenizer), MADE_UP)) if number not in added]
        return [int(number) for number in draw.choice(ordinary or [0], size=count)]

    def hold_out(self, rows: list[Row], share: float, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
        """Returns (training rows, held-out rows) of one client, drawn at random. At least one row stays in training."""
        check_share(share)
        n_held = min(round(share * len(rows)), max(len(rows) - 1, 0))
        held = set(rng.permutation(len(rows))[:n_held].tolist())
        return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]

    def collate(self, examples: list[Example], *, multiple_of: int = 8) -> Batch:
        """Returns a padded batch: input_ids, attention_mask, labels, and token_type_ids if the tokenizer has them.

        The padding is on the right, or on the left for models that read a text's class at its last token (XLNet). All
        tensors are (b, t) int64, with t rounded up to `multiple_of` but not above max_tokens. Class labels are (b,),
        and labels that are numbers are float32.
        """
        import torch

        longest = max(len(ids(example, "input_ids")) for example in examples)
        width = max(longest, min(-(-longest // multiple_of) * multiple_of, self.max_tokens))
        padding = {
            "input_ids": pad_token(self.tokenizer),
            "labels": NO_LOSS,
            "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0),
        }  # others: 0

        masked = [example | {"attention_mask": [1] * len(ids(example, "input_ids"))} for example in examples]

        def stack(name: str) -> Tensor:
            values = [example[name] for example in masked]
            if isinstance(values[0], (int, float)):
                return torch.tensor(values)
            lists = cast(list[list[int]], values)
            pads = [[padding.get(name, 0)] * (width - len(value)) for value in lists]
            pairs = zip(pads, lists, strict=True) if self.pads_left else zip(lists, pads, strict=True)
            return torch.tensor([first + second for first, second in pairs])

        return {name: stack(name) for name in masked[0] if name != "question"}

    @cached_property
    def pads_left(self) -> bool:
        """Returns whether the tokenizer pads on the left and ends a text with its class token, as XLNet's does."""
        if getattr(self.tokenizer, "padding_side", "right") != "left":
            return False
        tokens = self.tokenizer("a")["input_ids"]
        return bool(tokens) and tokens[-1] == self.tokenizer.cls_token_id

    def _texts(self, rows: Sequence[Row], column: str) -> list[str]:
        """Returns a column's texts. Raises BadRowError at a row whose value is not a string."""
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(column), str):
                found = row.get(column, "nothing")
                raise BadRowError(
                    f"{place_of(row, number)}: the column {column!r} contains {found!r:.60}, where text is expected. "
                    "Fill it in, or remove the row."
                )
        return [row[column] for row in rows]


def inputs_of(batch: Batch) -> Batch:
    """Returns the part of a batch that the model reads."""
    return {key: value for key, value in batch.items() if key not in ANSWERS}


def ids(example: Example, name: str) -> list[int]:
    """Returns a token list of an example."""
    return cast(list[int], example[name])


def question_of(example: Example) -> Question:
    """Returns the question of a graded example. Raises ValueError for one that was encoded for training."""
    found = example.get("question")
    if not isinstance(found, Question):
        raise ValueError("The example has no question. Rows that are graded must be encoded by `encode_test`.")
    return found


def join_scores(scored: Scored) -> tuple[Values, Values]:
    """Returns the two numbers of every example, (N,) and (N,), float64."""
    first, second = zip(*scored, strict=True)
    return np.concatenate([part.numpy() for part in first]), np.concatenate([part.numpy() for part in second])


def check_share(share: float) -> None:
    """Raises UserError unless a held-out share is at least 0 and below 1."""
    if not 0 <= share < 1:
        raise UserError(f"A held-out share of {share} is invalid. It must be at least 0 and below 1.")
