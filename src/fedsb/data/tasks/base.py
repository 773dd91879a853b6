"""What every task does: rows in, padded batches out, and what a batch loses and scores.

Shapes: b examples, t tokens, v vocabulary, c classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np

from fedsb.data.metrics import Values
from fedsb.data.sources import Row, Table, require_columns
from fedsb.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
Tokenizer = Any  # a transformers tokenizer, which ships no types

NO_LOSS = -100  # the label that cross entropy leaves out
Score = Literal["auto", "answers", "options", "loss"]
MetricName = Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman"]
Scored = Iterable[tuple["Tensor", "Tensor"]]  # what `Task.scores` gave, batch by batch, float64


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a graded row asks, beside its tokens."""

    asked: str  # before the prompt's template
    gold: str  # the right answer
    kind: str  # how it is graded, a word of the family's
    new_tokens: int  # an answer that is longer is cut
    options: tuple[str, ...] = ()  # the answers to choose from, where there are such
    written: tuple[str, ...] = ()  # what the model would write for each of them
    prompt_ids: tuple[int, ...] = ()  # what the model reads, uncut
    given: str = ""  # of code: what stands before the answer in the program that is run


Example = dict[str, "list[int] | int | float | Question"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The names of the columns that a task reads, and how it reads the model; a task takes only its own."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str = "prompt"
    answer: str = "answer"
    pooling: Literal["model", "mean"] = "model"
    score: Score = "auto"
    metric: MetricName = "auto"
    new_tokens: int | None = None
    messages: str = "messages"
    run_code: bool = False


class Task(ABC):
    """A task family: which columns it reads, how it encodes and collates them, and how it scores."""

    metric: str
    higher_is_better: bool
    scorings: ClassVar[tuple[str, ...]]  # what task.score may be; the first is the default
    metrics: ClassVar[
        tuple[str, ...]
    ] = ()  # what task.metric may be, where there is a choice; the first is the default
    auto_class: str  # the name of the transformers class that fits
    peft_task_type: str
    problem_type: str | None = None  # what transformers must be told of the head, where that is not plain

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        if max_tokens < 2:
            raise UserError(f"max_tokens = {max_tokens}: a window needs at least 2 tokens")
        self.tokenizer = tokenizer
        self.options = options
        self.max_tokens = max_tokens
        self.label_names: list[str] = []  # of the head's outputs, none without a head; set by fit_labels
        self.scoring = self.scorings[0] if options.score == "auto" else options.score
        if self.scoring not in self.scorings:
            raise UserError(f"task.score = {options.score!r}: this task has {', '.join(self.scorings)}")
        if options.metric != "auto":
            if options.metric not in self.metrics:
                known = ", ".join(self.metrics) or f"{self.metric} only"
                raise UserError(f"task.metric = {options.metric!r}: this task has {known}")
            self.metric = options.metric

    @property
    def classes(self) -> list[str]:
        """The classes that a row has one of, where rows have classes."""
        return self.label_names

    @classmethod
    def higher_is_better_by(cls, score: str) -> bool:
        """Whether a higher score is better, with that task.score."""
        return cls.higher_is_better

    @property
    @abstractmethod
    def needs(self) -> list[str]:
        """The columns that a table must have."""

    @property
    @abstractmethod
    def reads(self) -> list[str]:
        """Returns the columns that the model reads: those that a row without its label or answer has too."""

    def columns_of(self, table: Table) -> list[str]:
        """The columns of this table that are read. Raises UserError where one is missing."""
        require_columns(table, self.needs)
        return self.needs

    @abstractmethod
    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """The examples of `rows`, and how many rows lost text to max_tokens.

        Raises UserError at a row whose text is not text.
        """

    def encode_test(self, rows: list[Row]) -> tuple[list[Example], int]:
        """The same for rows that are scored."""
        return self.encode(rows)

    @abstractmethod
    def weight(self, example: Example) -> int:
        """How much the example counts in a mean loss, known before any forward: what `losses` gives as weight."""

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each example, float32: the sum of its losses (b,) and what that sum is divided by in a mean (b,)."""

    @abstractmethod
    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each example, float32, the two numbers (b,), (b,) that `measure` makes the metric of.

        For a mean they are what is summed and what is counted.
        """

    def measure(self, scored: Scored) -> dict[str, float]:
        """The metric by its name, and what is shown beside it, of all the examples' scores."""
        total = count = 0.0
        for sums, counts in scored:
            total, count = total + float(sums.sum()), count + float(counts.sum())
        return {self.metric: total / count}

    def fit_labels(self, train_rows: list[Row], test_rows: list[Row]) -> None:
        """Fixes `label_names`; a task without classes has none."""
        self.label_names = []

    def baseline(self, examples_train: list[Example], examples_test: list[Example]) -> float | None:
        """The metric of a guess that reads no text, where there is one."""
        return None

    def cut_in_pieces(self, rows: list[Row]) -> int:
        """How many of these rows become several examples; of most tasks none does."""
        return 0

    def labels_in(self, rows: list[Row]) -> list[Any]:

        return []

    def hold_out(self, rows: list[Row], share: float, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
        """(training rows, held-out rows) of one client: random rows, at least one stays in training."""
        check_share(share)
        n_held = min(round(share * len(rows)), max(len(rows) - 1, 0))
        held = set(rng.permutation(len(rows))[:n_held].tolist())
        return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]

    def collate(self, examples: list[Example], *, multiple_of: int = 8) -> Batch:
        """A right-padded batch: input_ids, attention_mask, labels, and token_type_ids where the tokenizer makes them.

        All are (b, t) int64, t rounded up to `multiple_of` but not above max_tokens; labels of classes are (b,), and
        those that are numbers float32.
        """
        import torch

        longest = max(len(ids(example, "input_ids")) for example in examples)
        width = max(longest, min(-(-longest // multiple_of) * multiple_of, self.max_tokens))
        ones = [{"attention_mask": [1] * len(ids(example, "input_ids"))} for example in examples]
        fill = {"input_ids": pad_token(self.tokenizer), "labels": NO_LOSS}  # the others are padded with 0

        def stack(name: str) -> Tensor:
            values = [(example | one)[name] for example, one in zip(examples, ones, strict=True)]
            if isinstance(values[0], (int, float)):
                return torch.tensor(values)
            lists = cast(list[list[int]], values)
            return torch.tensor([value + [fill.get(name, 0)] * (width - len(value)) for value in lists])

        return {name: stack(name) for name in (*examples[0], "attention_mask") if name != "question"}

    def _texts(self, rows: Sequence[Row], column: str) -> list[str]:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(column), str):
                held = row.get(column, "nothing")
                raise UserError(f"row {number} holds {held!r:.60} in the column {column!r}, where text is needed")
        return [row[column] for row in rows]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text without any special token, uncut."""
        if not texts:
            return []
        return cast(list[list[int]], self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def ids(example: Example, name: str) -> list[int]:
    """A token list of an example."""
    return cast(list[int], example[name])


def question_of(example: Example) -> Question:
    """What a graded example asks. Raises ValueError for one that was encoded for training."""
    found = example.get("question")
    if not isinstance(found, Question):
        raise ValueError("an example without its question: rows that are graded are encoded by `encode_test`")
    return found


def together(scored: Scored) -> tuple[Values, Values]:
    """The two numbers of every example, (N,) and (N,), float64."""
    first, second = zip(*scored, strict=True)
    return np.concatenate([part.numpy() for part in first]), np.concatenate([part.numpy() for part in second])


def pad_token(tokenizer: Tokenizer) -> int:
    """Any token does, the attention mask hides it: the pad token, else the end token, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-text token of a tokenizer that has one, else nothing."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise UserError(f"a held-out share of {share}: it must be at least 0 and below 1")
