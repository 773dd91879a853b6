"""Questions with answers to choose from, in the format of LLM-Adapters (Hu et al., arXiv 2304.01933).

Reads the columns instruction, output and answer: "... Answer format: answer1/answer2/answer3", "the correct answer is
answer2", "answer2". The model learns the output. The tests boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-e,
ARC-c and openbookqa are scored by the first name that the model writes, or by which output it finds likeliest.
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
            told = output_of(str(row[found[1]]))
            if row.get("output") not in (None, told):
                place = row.place if isinstance(row, PlacedRow) else f"{table.origin}, row {number}"
                raise BadRowError(
                    f"{place}: the output {row['output']!r:.80} is not {told!r}, which is what the options are "
                    "compared by; mend it, or take the column output away"
                )
        return found

    @property
    def prompt_also(self) -> tuple[str, ...]:
        return ("input",)

    @property
    def reads_also(self) -> tuple[str, ...]:
        return ("input", "output")

    def asked(self, row: Row, layout: Layout) -> str:
        """The instruction, and behind an empty line the input, where there is one."""
        return "\n\n".join(str(part) for part in (row[layout.prompt], row.get("input")) if part)

    def told(self, row: Row, layout: Layout) -> str:
        return output_of(str(row[layout.answer]))

    def question(self, row: Row, layout: Layout) -> Question:
        asked, gold = self.asked(row, layout), str(row[layout.answer])
        options = options_of(asked)
        if gold not in options:
            raise UserError(f"the answer {gold!r} is none of {'/'.join(options)}, which the question names")
        return Question(
            asked=asked,
            gold=gold,
            kind="choice",
            options=options,
            written=tuple(map(output_of, options)),
            new_tokens=self.options.new_tokens or NEW_TOKENS,
        )

    def open_question(self, asked: str, layout: Layout) -> Question:
        options = options_of(asked) if self.scoring == "options" else ()
        return replace(super().open_question(asked, layout), options=options, written=tuple(map(output_of, options)))

    def grade(self, question: Question, written: str) -> Verdict:
        family = next(names for names in NAMES if question.gold in names)
        return grade_choice(question.gold, written, family)


def output_of(name: str) -> str:
    """What the model learns to write for an answer."""
    return f"the correct answer is {name}"


def options_of(asked: str) -> tuple[str, ...]:
    """The names at the question's end, behind "Answer format:". Raises UserError where they are none of NAMES."""
    found = re.search(r"Answer format:\s*(\S+)\s*$", asked)
    names = tuple(found.group(1).split("/")) if found else ()
    if not any(set(names) <= set(family) for family in NAMES) or len(names) < 2:
        known = ", ".join("/".join(family) for family in NAMES)
        raise UserError(
            f"the question {asked[-60:]!r} does not end with its answers, as in 'Answer format: true/false' (known "
            f"are {known}, or fewer of one of them)"
        )
    return names
