"""Tasks whose answers are graded: trained as instructions, scored by what the model writes.

The prompt is one function of a row, `asked`, in training and in tests, tokenised apart from the answer. A table's
columns say where it comes from; each family lists the sets of columns that it knows. What is scored carries a
`Question` beside its tokens. Scoring is by `task.score`:

    answers    the model writes an answer, which is graded: accuracy
    options    the likeliest of the answers that there are: accuracy (of families that have such)
    loss       nats a token of the right answer: no generation, cheap
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedsb.data.grading.verdict import Verdict
from fedsb.data.rows import Row, Table, place_of
from fedsb.data.tasks.base import NO_LOSS, Example, Question, TaskOptions, Tokenizer, errors_at
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.instruction import Instruction, answer_text
from fedsb.utils.errors import BadRowError, UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table that a family knows by its columns."""

    name: str
    prompt: str
    answer: str  # what the model is to write, or what that is made of


class Answers(Instruction):
    """A family of questions with graded answers."""

    metric = "accuracy"
    higher_is_better = True
    scorings: ClassVar[tuple[str, ...]] = ("answers", "loss")
    layouts: tuple[Layout, ...]
    longest: ClassVar[int]  # new tokens of an answer that is not graded, where task.new_tokens is not set

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        super().__init__(tokenizer=tokenizer, options=options, max_tokens=max_tokens)
        if self.scoring == "loss":
            self.metric, self.higher_is_better = CausalTask.metric, CausalTask.higher_is_better

    @classmethod
    def higher_is_better_by(cls, score: str) -> bool:
        return score != "loss"

    @abstractmethod
    def question(self, row: Row, layout: Layout) -> Question:
        """What is asked and what is right, without its tokens. Raises UserError where the row holds no gold answer."""

    @abstractmethod
    def grade(self, question: Question, written: str) -> Verdict:
        """Whether what the model wrote is right."""

    def columns_of(self, table: Table) -> list[str]:
        layout = self.layout(table.columns, table.origin)
        return [layout.prompt, layout.answer]

    def layout(self, columns: Sequence[str], origin: str = "the table") -> Layout:
        """How to read a table: by the task.prompt and task.answer that were set, else the first layout that fits."""
        own = Layout(name="own", prompt=self.options.prompt, answer=self.options.answer)
        for layout in (own, *self.layouts):
            if {layout.prompt, layout.answer} <= set(columns):
                return layout
        known = "; ".join(f"{layout.name}: {layout.prompt}, {layout.answer}" for layout in self.layouts)
        raise UserError(
            f"{origin} has the columns {', '.join(columns)}. Known are {known}. For another table name its columns: "
            "--set task.prompt=COLUMN --set task.answer=COLUMN"
        )

    def prompt_layout(self, columns: Sequence[str], origin: str = "the table") -> Layout:
        """Returns how to read a table whose rows may lack their answers."""
        own = Layout(name="own", prompt=self.options.prompt, answer=self.options.answer)
        whole = (layout for layout in (own, *self.layouts) if {layout.prompt, layout.answer} <= set(columns))
        asking = (layout for layout in (own, *self.layouts) if layout.prompt in columns)
        return next(whole, None) or next(asking, None) or self.layout(columns, origin)

    def questions(self, rows: list[Row]) -> list[Question]:
        """Returns what rows ask; how long an answer may be is as in scoring, where a row has its answer."""
        if not rows:
            return []
        layout = self.prompt_layout(list(rows[0]))
        self._texts(rows, layout.prompt)  # raises where there is none
        asked = [self.asked(row, layout) for row in rows]
        prompts = self.prompts(asked, self.given(rows))
        found = []
        for number, (row, text, prompt) in enumerate(zip(rows, asked, prompts, strict=True), start=1):
            try:
                question = self.question(row, layout) if row.get(layout.answer) else self.open_question(text, layout)
            except UserError as error:
                if self.scoring == "options":
                    raise BadRowError(f"{place_of(row, number)}: {error}") from error
                question = self.open_question(text, layout)  # its answer cannot be graded, and need not be
            found.append(replace(question, prompt_ids=tuple(prompt)))
        return found

    def open_question(self, asked: str, layout: Layout) -> Question:
        """Returns the question of a row without its answer."""
        return replace(self._question(asked, ()), new_tokens=self.options.new_tokens or self.longest)

    def told(self, row: Row, layout: Layout) -> str:
        """What the model learns to write."""
        return str(row[layout.answer])

    def asked(self, row: Row, layout: Layout) -> str:
        """The prompt, in training and in tests, before the template."""
        return str(row[layout.prompt])

    @property
    def prompt_also(self) -> tuple[str, ...]:
        return ()

    def given(self, rows: list[Row]) -> list[str]:
        """Returns no inputs: `asked` is the whole prompt."""
        return [""] * len(rows)

    def pairs(self, rows: list[Row]) -> tuple[list[str], list[str]]:
        if not rows:
            return [], []
        layout = self.layout(list(rows[0]))
        self._texts(rows, layout.prompt), self._texts(rows, layout.answer)  # raises where there is none
        return [self.asked(row, layout) for row in rows], [self.told(row, layout) for row in rows]

    def encode_test(self, rows: list[Row]) -> tuple[list[Example], int]:
        """An example a row, its question with the prompt's tokens uncut. None is dropped: a score is over all rows."""
        if self.scoring == "loss" or not rows:
            return self.encode(rows)
        layout = self.layout(list(rows[0]))
        examples: list[Example] = []
        for number, (row, (prompt, answer)) in enumerate(zip(rows, self.tokens(rows), strict=True), start=1):
            labels = [NO_LOSS] * len(prompt) + answer
            with errors_at(row, number):
                question = replace(self.question(row, layout), prompt_ids=tuple(prompt))
            example: Example = {
                "input_ids": (prompt + answer)[: self.max_tokens],
                "labels": labels[: self.max_tokens],
                "question": question,
            }
            examples.append(example)
        return examples, 0

    def option_tokens(self, question: Question) -> list[list[int]]:
        """What the model would write for each of the answers to choose from, its end token included."""
        return self._tokenize([answer_text(self.tokenizer, question.asked, told) for told in question.written])
