"""Word problems with worked answers: trained on MetaMathQA, scored on GSM8K by value and on MATH by math-verify.

    MetaMathQA   query, response (and type)   the response ends with "The answer is: X"       arXiv 2309.12284
    GSM8K        question, answer             the answer ends with "#### X"                   arXiv 2110.14168
    MATH         problem, solution            the last \\boxed{} of the solution contains X    arXiv 2103.03874

For every table, the model learns to end with "The answer is: X". MetaMathQA has this ending, and it is added to the
others. GSM8K's calculator marks, <<48/2=24>>, are left out. A row of GSM8K (and of MetaMathQA with a type that begins
with "GSM") is graded as a number if its gold answer is one, and every other row as mathematics.
"""

from __future__ import annotations

import re

from fedsb.data.grading.math_check import MathChecker, need_math_verify
from fedsb.data.grading.verdict import ANSWER, Verdict, after_hashes, as_number, grade_number, last_answer, last_boxed
from fedsb.data.rows import Row
from fedsb.data.tasks.answers import Answers, Layout
from fedsb.data.tasks.base import Question, TaskOptions
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.utils.errors import UserError

GSM8K = Layout(name="GSM8K", prompt="question", answer="answer")
METAMATH = Layout(name="MetaMathQA", prompt="query", answer="response")
MATH = Layout(name="MATH", prompt="problem", answer="solution")
NEW_TOKENS = {"number": 256, "math": 512}


class Arithmetic(Answers):
    """Word problems, graded by value: MetaMathQA, GSM8K, MATH."""

    layouts = (METAMATH, GSM8K, MATH)
    longest = NEW_TOKENS["math"]

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        super().__init__(tokenizer=tokenizer, options=options, max_tokens=max_tokens)
        self.checker = MathChecker()

    @property
    def optional_columns(self) -> tuple[str, ...]:
        return ("type",)

    def row_answer(self, row: Row, layout: Layout) -> str:
        text = str(row[layout.answer])
        if ANSWER in text:
            return text
        gold = gold_of(text)
        if gold is None:
            return text  # a row without an answer that can be graded is learned as it is
        return f"{re.sub(r'<<[^<>]*>>', '', text).rstrip()}\n{ANSWER} {' '.join(gold.split())}"

    def question(self, row: Row, layout: Layout) -> Question:
        text = str(row[layout.answer])
        gold = gold_of(text)
        if gold is None:
            raise UserError(
                f"the column {layout.answer!r} contains {text[-60:]!r}, which has no gold answer. Write it after "
                f"{ANSWER!r} or '####', or in \\boxed{{}}."
            )
        of_gsm8k = "####" in text or str(row.get("type", "")).startswith("GSM")
        by_value = layout is GSM8K or (of_gsm8k and as_number(gold) is not None)
        if by_value and as_number(gold) is None:
            raise UserError(f"the gold answer {gold!r} in the column {layout.answer!r} is not a single number.")
        if not by_value:
            need_math_verify()
        kind = "number" if by_value else "math"
        limit = self.options.new_tokens or NEW_TOKENS[kind]
        return Question(prompt=self.row_prompt(row, layout), gold=gold, kind=kind, new_tokens=limit)

    def grade(self, question: Question, written: str) -> Verdict:
        if question.kind == "number":
            return grade_number(question.gold, written)
        return self.checker.grade(question.gold, written)


def gold_of(text: str) -> str | None:
    """Returns the answer at the end of a worked solution, however it is marked; None if there is none."""
    for read in (last_answer, after_hashes, last_boxed):
        gold = read(text)
        if gold is not None:
            return gold
    return None
