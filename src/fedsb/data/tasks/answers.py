"""Tasks with graded answers: trained as instructions, scored by what the model writes.

The prompt is one function of a row, `row_prompt`, in training and in tests, and is tokenised separately from the
answer. A table is recognised by its columns; each family lists the sets of columns that it knows. An example that is
scored has a `Question` alongside its tokens. `task.score` selects the score:

    answers    the model writes an answer, which is graded: accuracy
    options    the most likely of the possible answers: accuracy (for families that have options)
    loss       nats per token of the correct answer: fast, without generation
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedsb.data.grading.verdict import Verdict
from fedsb.data.rows import Row, Table, errors_at, place_of
from fedsb.data.tasks.base import NO_LOSS, Example, Question, TaskOptions
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.instruction import Instruction, answer_text
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.utils.errors import BadRowError, UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The columns of a table that a family knows."""

    name: str
    prompt: str
    answer: str  # the column from which the model's answer is made


class Answers(Instruction):
    """A family of questions with graded answers."""

    metric = "accuracy"
    higher_is_better = True
    scorings: ClassVar[tuple[str, ...]] = ("answers", "loss")
    layouts: tuple[Layout, ...]
    longest: ClassVar[int]  # new tokens of an answer that is not graded if task.new_tokens is not set

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        super().__init__(tokenizer=tokenizer, options=options, max_tokens=max_tokens)
        if self.scoring == "loss":
            self.metric, self.higher_is_better = CausalTask.metric, CausalTask.higher_is_better

    @classmethod
    def higher_is_better_by(cls, score: str) -> bool:
        return score != "loss"

    @abstractmethod
    def question(self, row: Row, layout: Layout) -> Question:
        """Returns a row's question and gold answer, without tokens. Raises UserError if there is no gold answer."""

    @abstractmethod
    def grade(self, question: Question, written: str) -> Verdict:
        """Returns whether what the model wrote is correct."""

    def columns_of(self, table: Table) -> list[str]:
        layout = self.layout(table.columns, table.origin)
        return [layout.prompt, layout.answer]

    def layout(self, columns: Sequence[str], origin: str = "the table") -> Layout:
        """Returns how to read a table: by task.prompt and task.answer if it has them, else the first known layout."""
        own = Layout(name="own", prompt=self.options.prompt, answer=self.options.answer)
        for layout in (own, *self.layouts):
            if {layout.prompt, layout.answer} <= set(columns):
                return layout
        known = "; ".join(f"{layout.name}: {layout.prompt}, {layout.answer}" for layout in self.layouts)
        raise UserError(
            f"{origin} has the columns {', '.join(columns)}. Known are {known}. For a different table, name its "
            "columns: --set task.prompt=COLUMN --set task.answer=COLUMN"
        )

    def prompt_layout(self, columns: Sequence[str], origin: str = "the table") -> Layout:
        """Returns how to read a table whose rows may lack answers."""
        own = Layout(name="own", prompt=self.options.prompt, answer=self.options.answer)
        whole = (layout for layout in (own, *self.layouts) if {layout.prompt, layout.answer} <= set(columns))
        asking = (layout for layout in (own, *self.layouts) if layout.prompt in columns)
        return next(whole, None) or next(asking, None) or self.layout(columns, origin)

    def questions(self, rows: list[Row]) -> list[Question]:
        """Returns the questions of rows. If a row has its answer, the length limit is the same as in scoring."""
        if not rows:
            return []
        layout = self.prompt_layout(list(rows[0]))
        self._texts(rows, layout.prompt)  # raises if a text is missing
        texts = [self.row_prompt(row, layout) for row in rows]
        prompts = self.prompts(texts, self.input_texts(rows))
        found = []
        for number, (row, text, prompt) in enumerate(zip(rows, texts, prompts, strict=True), start=1):
            try:
                question = self.question(row, layout) if row.get(layout.answer) else self.open_question(text, layout)
            except UserError as error:
                if self.scoring == "options":
                    raise BadRowError(f"{place_of(row, number)}: {error}") from error
                question = self.open_question(text, layout)  # its answer cannot be graded, and need not be
            found.append(replace(question, prompt_ids=tuple(prompt)))
        return found

    def open_question(self, prompt: str, layout: Layout) -> Question:
        """Returns the question of a row without an answer."""
        return replace(self._question(prompt, ()), new_tokens=self.options.new_tokens or self.longest)

    def row_answer(self, row: Row, layout: Layout) -> str:
        """Returns what the model learns to write."""
        return str(row[layout.answer])

    def row_prompt(self, row: Row, layout: Layout) -> str:
        """Returns the prompt, in training and in tests, before the template."""
        return str(row[layout.prompt])

    @property
    def optional_prompt_columns(self) -> tuple[str, ...]:
        return ()

    def input_texts(self, rows: list[Row]) -> list[str]:
        """Returns no inputs: `row_prompt` is the whole prompt."""
        return [""] * len(rows)

    def prompts_and_answers(self, rows: list[Row]) -> tuple[list[str], list[str]]:
        if not rows:
            return [], []
        layout = self.layout(list(rows[0]))
        self._texts(rows, layout.prompt), self._texts(rows, layout.answer)  # raises if a text is missing
        return [self.row_prompt(row, layout) for row in rows], [self.row_answer(row, layout) for row in rows]

    def encode_test(self, rows: list[Row]) -> tuple[list[Example], int]:
        """Returns one example per row, with a question. No row is dropped, because a score is over all rows."""
        if self.scoring == "loss" or not rows:
            return self.encode(rows)
        layout = self.layout(list(rows[0]))
        examples: list[Example] = []
        for number, (row, (prompt, answer)) in enumerate(zip(rows, self.tokenize_rows(rows), strict=True), start=1):
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
        """Returns the tokens that the model would write for each option, including the end token."""
        texts = [answer_text(self.tokenizer, question.prompt, text) for text in question.option_texts]
        return self.encoder.tokenize(texts)
