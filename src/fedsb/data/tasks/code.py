"""Programs in Python: trained on instruction pairs, scored by running the tests of HumanEval and MBPP (pass@1, greedy).

    CodeFeedback  query, answer                                   training only: it has no tests
    HumanEval     prompt, canonical_solution, test, entry_point   Chen et al., arXiv 2107.03374
    MBPP          text (or prompt), code, test_list               Austin et al., arXiv 2108.07732

HumanEval's functions are requested as an instruction; MBPP's with its tests, as its authors do. Answers are fenced
blocks: the first one that defines a function which the tests call, else the first one, else the whole text. HumanEval's
own imports and signature precede the answer, so that a body alone is a complete program too.

Scoring runs what a model wrote, in a sandbox (code_check.py), and only if task.run_code = true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsb.data.grading.code_check import ProgramResult, run_tests
from fedsb.data.grading.verdict import Verdict
from fedsb.data.rows import Row
from fedsb.data.tasks.answers import Answers, Layout
from fedsb.data.tasks.base import Question, TaskOptions
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.utils.errors import UserError

HUMANEVAL = Layout(name="HumanEval", prompt="prompt", answer="canonical_solution")
MBPP = Layout(name="MBPP", prompt="text", answer="code")
SANITIZED = Layout(name="MBPP, sanitized", prompt="prompt", answer="code")
CODEFEEDBACK = Layout(name="CodeFeedback", prompt="query", answer="answer")
NEW_TOKENS = 512
PYTHON = ("", "python", "python3", "py")
FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class Code(Answers):
    """Programs, scored by their tests: CodeFeedback to train on, HumanEval and MBPP."""

    metric = "pass@1"
    layouts = (HUMANEVAL, MBPP, SANITIZED, CODEFEEDBACK)
    longest = NEW_TOKENS

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        super().__init__(tokenizer=tokenizer, options=options, max_tokens=max_tokens)
        if self.scoring == "answers" and not options.run_code:
            raise UserError(
                "task.kind = 'code' is scored by running programs that the model wrote, in a sandbox. Allow it with "
                "task.run_code = true, or set task.score = 'loss', which runs nothing. docs/tasks.md describes the "
                "sandbox."
            )

    @property
    def optional_columns(self) -> tuple[str, ...]:
        return ("test", "entry_point", "test_list", "test_imports", "test_setup_code")

    def prompt_layout(self, columns: Sequence[str], origin: str = "the table") -> Layout:
        """Returns how to read a table; the columns of tests distinguish HumanEval and MBPP from a table of prompts."""
        tests = {"entry_point": (HUMANEVAL,), "test_list": (MBPP, SANITIZED)}
        for column, layouts in tests.items():
            found = next((layout for layout in layouts if {layout.prompt, column} <= set(columns)), None)
            if found is not None:
                return found
        return super().prompt_layout(columns, origin)

    def row_answer(self, row: Row, layout: Layout) -> str:
        text = str(row[layout.answer])
        if layout is HUMANEVAL:
            text = str(row[layout.prompt]) + text
        return fenced(text) if layout in (HUMANEVAL, MBPP, SANITIZED) else text

    def row_prompt(self, row: Row, layout: Layout) -> str:
        text = str(row[layout.prompt]).strip()
        if layout is HUMANEVAL:
            return f"Complete this Python function, and write the whole of it.\n{fenced(text)}"
        if layout in (MBPP, SANITIZED):
            return "\n".join([text, "Your code should pass these tests:", *tests_of(row)])
        return text

    def question(self, row: Row, layout: Layout) -> Question:
        tests = tests_of(row)
        if not tests:
            raise UserError(
                f"{layout.name} rows have no tests to run (HumanEval: test and entry_point; MBPP: test_list). Name "
                "a table with tests as data.test, or set task.score = 'loss'."
            )
        return Question(
            prompt=self.row_prompt(row, layout),
            gold="\n".join([*setup_of(row), *tests]),
            kind="code",
            new_tokens=self.options.new_tokens or NEW_TOKENS,
            code_prefix=str(row[layout.prompt]) if layout is HUMANEVAL else "",
        )

    def grade(self, question: Question, written: str) -> Verdict:
        """Returns whether the program passes its tests. A program that was stopped, or exited early, has a fault."""
        code = code_of(written, question.gold)
        ran = run_with_tests(question, code)
        return Verdict(right=ran.passed, extracted=code.strip() or None, fault=None if ran.ended else ran.why)


def run_with_tests(question: Question, code: str) -> ProgramResult:
    """Runs the code after the question's prefix, with the question's tests."""
    prefix = f"{question.code_prefix.rstrip()}\n" if question.code_prefix else ""
    return run_tests(f"{prefix}{code}\n", question.gold)


def tests_of(row: Row) -> list[str]:
    """Returns the tests as lines of Python; empty if a row has none."""
    if row.get("test") and row.get("entry_point"):
        return [str(row["test"]), f"check({row['entry_point']})"]
    found: Sequence[object] = row.get("test_list") or []
    return [str(test) for test in found]


def setup_of(row: Row) -> list[str]:
    """Returns the code that MBPP's tests need."""
    imports: Sequence[object] = row.get("test_imports") or []
    return [*map(str, imports), *filter(None, [str(row.get("test_setup_code") or "")])]


def fenced(code: str) -> str:
    """Returns a fenced block of Python."""
    return f"```python\n{code.replace(chr(13), '').strip(chr(10))}\n```"


def code_of(written: str, tests: str) -> str:
    """Returns the program in an answer: the first block that defines what the tests call, else the first block."""
    found = [block.groups() for block in FENCE.finditer(written)]
    blocks = [text for language, text in found if language.lower() in PYTHON] or [text for _, text in found]
    called = set(re.findall(r"\b([A-Za-z_]\w*)\s*\(", tests)) | set(re.findall(r"check\((\w+)\)", tests))
    for block in blocks:
        if called & set(re.findall(r"^(?:async\s+)?def\s+(\w+)", block, re.MULTILINE)):
            return block
    return blocks[0] if blocks else written
