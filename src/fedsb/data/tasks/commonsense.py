"""Questions with answers to choose from, in the format of LLM-Adapters (Hu et al., arXiv 2304.01933).

Reads the columns instruction, output and answer: "... Answer format: answer1/answer2/answer3", "the correct answer is
answer2", "answer2". The model learns the output. The tests boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-e,
ARC-c and openbookqa are scored by the first name that the model writes, or by the output that it finds most likely.
"""

from __future__ import annotations

import re
from dataclasses import replace

from fedsb.data.grading.verdict import Verdict, grade_choice
from fedsb.data.rows import PlacedRow, Row, Table
from fedsb.data.tasks.answers import Answers, Layout
from fedsb.data.tasks.base import Question
from fedsb.utils.errors import BadRowError, UserError

LLM_ADAPTERS = Layout(name="LLM-Adapters", prompt="instruction", answer="answer")
NAMES: tuple[tuple[str, ...], ...] = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)
NEW_TOKENS = 32


class Commonsense(Answers):
    """One answer of several, by name: the eight LLM-Adapters tests."""

    scorings = ("answers", "options", "loss")
    layouts = (LLM_ADAPTERS,)
    longest = NEW_TOKENS

    def columns_of(self, table: Table) -> list[str]:
        found = super().columns_of(table)
        for number, row in enumerate(table.rows, start=1):
            answer = output_of(str(row[found[1]]))
            if row.get("output") not in (None, answer):
                place = row.place if isinstance(row, PlacedRow) else f"{table.origin}, row {number}"
                raise BadRowError(
                    f"{place}: the output {row['output']!r:.80} is not {answer!r}, by which the options are compared. "
                    "Correct it, or remove the column 'output'."
                )
        return found

    @property
    def optional_prompt_columns(self) -> tuple[str, ...]:
        return ("input",)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        return ("input", "output")

    def row_prompt(self, row: Row, layout: Layout) -> str:
        """Returns the instruction, followed by an empty line and the input if there is one."""
        return "\n\n".join(str(part) for part in (row[layout.prompt], row.get("input")) if part)

    def row_answer(self, row: Row, layout: Layout) -> str:
        return output_of(str(row[layout.answer]))

    def question(self, row: Row, layout: Layout) -> Question:
        prompt, gold = self.row_prompt(row, layout), str(row[layout.answer])
        options = options_of(prompt)
        if gold not in options:
            raise UserError(f"the answer {gold!r} is not one of the question's options, {'/'.join(options)}.")
        return Question(
            prompt=prompt,
            gold=gold,
            kind="choice",
            options=options,
            option_texts=tuple(map(output_of, options)),
            new_tokens=self.options.new_tokens or NEW_TOKENS,
        )

    def open_question(self, prompt: str, layout: Layout) -> Question:
        options = options_of(prompt) if self.scoring == "options" else ()
        texts = tuple(map(output_of, options))
        return replace(super().open_question(prompt, layout), options=options, option_texts=texts)

    def grade(self, question: Question, written: str) -> Verdict:
        family = next(names for names in NAMES if question.gold in names)
        return grade_choice(question.gold, written, family)


def output_of(name: str) -> str:
    """Returns what the model learns to write for an answer."""
    return f"the correct answer is {name}"


def options_of(prompt: str) -> tuple[str, ...]:
    """Returns the names after "Answer format:" at the question's end. Raises UserError if NAMES lacks them."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", prompt)
    names = tuple(found.group(1).split("/")) if found else ()
    if not any(set(names) <= set(family) for family in NAMES) or len(names) < 2:
        known = ", ".join("/".join(family) for family in NAMES)
        raise UserError(
            f"the question {prompt[-60:]!r} does not end with its answers, as in 'Answer format: true/false'. Known "
            f"are {known}, or a part of one of them."
        )
    return names
