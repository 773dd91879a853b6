"""What every task does: rows in, padded batches out, and what a batch loses and scores.

Shapes: b examples, t tokens, v vocabulary, c classes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np

from fedsb.data.grading.metrics import Values
from fedsb.data.rows import Row, Table, place_of, require_columns
from fedsb.utils.errors import BadRowError, UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
Tokenizer = Any  # a transformers tokenizer, which ships no types

MADE_UP = 1000  # a made-up text takes its tokens from the first so many
NO_LOSS = -100  # the label that cross entropy leaves out
MARK = "\U0010fffd"  # around the number of a special token that stands in a row's text; see Task.as_text
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
    input: str = "input"
    pooling: Literal["model", "mean"] = "model"
    score: Score = "auto"
    metric: MetricName = "auto"
    new_tokens: int | None = None
    messages: str = "messages"
    run_code: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # label -> the name of its class


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
        self.names = dict(options.names)  # label -> the name that is shown and exported; see name_classes
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

    @property
    def class_names(self) -> list[str]:
        """What the head's outputs are called for people and in exported models: `label_names`, or their names."""
        return [self.names.get(label, label) for label in self.label_names]

    def take_classes(self, of_run: Mapping[str, Any]) -> None:
        """Takes the classes and their names from the manifest of a run ("task")."""
        self.label_names = list(of_run["label_names"] or [])
        if shown := of_run.get("class_names"):
            self.names = dict(zip(self.label_names, shown, strict=True))

    def name_classes(self, of_table: Sequence[str] = ()) -> None:
        """Names the classes as task.names says, else by the names that a table has of the labels 0, 1, ...

        The labels are known. Raises UserError for a name of no label, and for two classes of one name.
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
        """Whether a higher score is better, with that task.score."""
        return cls.higher_is_better

    @property
    @abstractmethod
    def needs(self) -> list[str]:
        """The columns that a table must have."""

    @property
    def prompt_also(self) -> tuple[str, ...]:
        """The columns that become a part of what the model reads, where a table has them."""
        return ()

    @property
    def reads_also(self) -> tuple[str, ...]:
        """All columns that are read where a table has them."""
        return self.prompt_also

    @property
    @abstractmethod
    def reads(self) -> list[str]:
        """Returns the columns that the model reads: those that a row without its label or answer has too."""

    def columns_of(self, table: Table) -> list[str]:
        """The columns that are read, what is to be predicted last. Raises UserError where one is missing."""
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

    def confusion(self, scored: Scored) -> list[list[int]] | None:
        """Returns the rows of each true class by predicted class; None for a task without classes, or with many."""
        return None

    def fit_labels(self, train_rows: list[Row], test_rows: list[Row]) -> None:
        """Fixes `label_names`; a task without classes has none."""
        self.label_names = []

    def baseline(self, examples_train: list[Example], examples_test: list[Example]) -> float | None:
        """The metric of a guess that reads no text, where there is one."""
        return None

    def best_guess(self, examples_test: list[Example]) -> float | None:
        """Returns the best metric on these rows of predicting one class always, where there are classes."""
        return None

    def cut_in_pieces(self, rows: list[Row]) -> int:
        """Returns how many of these rows become several examples; for most tasks none does."""
        return 0

    def labels_in(self, rows: list[Row]) -> list[Any]:

        return []

    @abstractmethod
    def made_up(self, tokens: int, draw: np.random.Generator) -> Example:
        """Returns an example of at most `tokens` random tokens with some target, to try a model with."""

    def _ordinary_tokens(self, count: int, draw: np.random.Generator) -> list[int]:
        """Returns random tokens, none of them special."""
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ordinary = [number for number in range(min(len(self.tokenizer), MADE_UP)) if number not in added]
        return [int(number) for number in draw.choice(ordinary or [0], size=count)]

    def hold_out(self, rows: list[Row], share: float, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
        """(training rows, held-out rows) of one client: random rows, at least one stays in training."""
        check_share(share)
        n_held = min(round(share * len(rows)), max(len(rows) - 1, 0))
        held = set(rng.permutation(len(rows))[:n_held].tolist())
        return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]

    def collate(self, examples: list[Example], *, multiple_of: int = 8) -> Batch:
        """A padded batch: input_ids, attention_mask, labels, and token_type_ids where the tokenizer makes them.

        Padded on the right; on the left for models that read a text's class at its last token (XLNet).

        All are (b, t) int64, t rounded up to `multiple_of` but not above max_tokens; labels of classes are (b,), and
        those that are numbers float32.
        """
        import torch

        longest = max(len(ids(example, "input_ids")) for example in examples)
        width = max(longest, min(-(-longest // multiple_of) * multiple_of, self.max_tokens))
        ones = [{"attention_mask": [1] * len(ids(example, "input_ids"))} for example in examples]
        fill = {
            "input_ids": pad_token(self.tokenizer),
            "labels": NO_LOSS,
            "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0),
        }  # the others are padded with 0
        left = self.pads_left

        def stack(name: str) -> Tensor:
            values = [(example | one)[name] for example, one in zip(examples, ones, strict=True)]
            if isinstance(values[0], (int, float)):
                return torch.tensor(values)
            lists = cast(list[list[int]], values)
            pads = [[fill.get(name, 0)] * (width - len(value)) for value in lists]
            rows = zip(pads, lists, strict=True) if left else zip(lists, pads, strict=True)
            return torch.tensor([first + second for first, second in rows])

        return {name: stack(name) for name in (*examples[0], "attention_mask") if name != "question"}

    @cached_property
    def pads_left(self) -> bool:
        """Returns whether the tokenizer pads on the left and ends a text with its class token, as XLNet's does."""
        if getattr(self.tokenizer, "padding_side", "right") != "left":
            return False
        tokens = self.tokenizer("a")["input_ids"]
        return bool(tokens) and tokens[-1] == self.tokenizer.cls_token_id

    def _texts(self, rows: Sequence[Row], column: str) -> list[str]:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(column), str):
                found = row.get(column, "nothing")
                raise BadRowError(
                    f"{place_of(row, number)}: the column {column!r} contains {found!r:.60}, where text is expected. "
                    "Fill it in, or remove the row."
                )
        return [row[column] for row in rows]

    @cached_property
    def special(self) -> dict[str, int]:
        """The tokenizer's special tokens, as they would stand in a text, with their ids; the longest first."""
        found = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Matches a special token; nothing where there are none."""
        return re.compile("|".join(map(re.escape, self.special)) or r"(?!)")

    def has_special(self, text: str) -> bool:
        """Returns whether a text contains what this tokenizer would read as a special token."""
        return self._special_pattern.search(text) is not None

    def as_text(self, text: str) -> str:
        """Returns a row's text with its special tokens marked, so that `_tokenize` reads them as ordinary text.

        For a text that is put between a template's own special tokens.
        """
        return self._special_pattern.sub(lambda found: f"{MARK}{self.special[found.group()]}{MARK}", text)

    def _tokenize(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """The tokens of each text, uncut, without any special token around it.

        Special tokens in a text are recognised, but for those that `as_text` marked; with `plain` none is.
        """
        if not texts:
            return []
        made = self.tokenizer(texts, add_special_tokens=False, verbose=False, split_special_tokens=plain)
        found = cast(list[list[int]], list(made["input_ids"]))
        for position, text in enumerate(texts):
            if MARK in text and not plain:
                found[position] = self._tokenize_marked(text)
        return found

    def _tokenize_marked(self, text: str) -> list[int]:
        names = {number: name for name, number in self.special.items()}
        tokens: list[int] = []
        at = 0
        for found in [*self._special_pattern.finditer(text), None]:
            piece = text[at : found.start() if found else None]
            # a row's own text may contain such marks: a number of no special token stays as it is
            piece = re.sub(f"{MARK}(\\d{{1,9}}){MARK}", lambda mark: names.get(int(mark[1]), mark[0]), piece)
            tokens += self._tokenize([piece], plain=True)[0] if piece else []
            if found:
                tokens.append(self.special[found.group()])
                at = found.end()
        return tokens


@contextmanager
def errors_at(row: Row, number: int) -> Iterator[None]:
    """Puts the file and line of a row in front of what is raised inside."""
    try:
        yield
    except BadRowError:
        raise
    except UserError as error:
        raise BadRowError(f"{place_of(row, number)}: {error}") from error


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
