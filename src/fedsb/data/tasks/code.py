"""Programs in Python: trained on instruction pairs, scored by running the tests of HumanEval and MBPP (pass@1, greedy).

    CodeFeedback  query, answer                                   training only: it holds no tests
    HumanEval     prompt, canonical_solution, test, entry_point   Chen et al., arXiv 2107.03374
    MBPP          text (or prompt), code, test_list               Austin et al., arXiv 2108.07732

HumanEval's functions are asked for as an instruction; MBPP's with its tests, as its authors do. Both are learned and
read as a fenced block: the first that defines a function which the tests call, else the first, else the whole text. In
front of HumanEval's stand its own imports and signature, so that a body alone is a whole program too.

Scoring runs what a model wrote, in a sandbox (code_check.py), and only where task.run_code = true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsb.data.grading.code_check import Ran, run_tests
from fedsb.data.grading.verdict import Verdict
from fedsb.data.rows import Row
from fedsb.data.tasks.answers import Answers, Layout
from fedsb.data.tasks.base import Question, TaskOptions, Tokenizer
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
                "task.kind = 'code' is scored by running programs that the model wrote, in a sandbox: allow it with "
                "task.run_code = true, or take task.score = 'loss', which runs nothing (docs/tasks.md says what the "
                "sandbox keeps out)"
            )

    @property
    def reads_also(self) -> tuple[str, ...]:
        return ("test", "entry_point", "test_list", "test_imports", "test_setup_code")

    def prompt_layout(self, columns: Sequence[str], origin: str = "the table") -> Layout:
        """Returns how to read a table; the columns of tests distinguish HumanEval and MBPP from a table of prompts."""
        tests = {"entry_point": (HUMANEVAL,), "test_list": (MBPP, SANITIZED)}
        for column, layouts in tests.items():
            found = next((layout for layout in layouts if {layout.prompt, column} <= set(columns)), None)
            if found is not None:
                return found
        return super().prompt_layout(columns, origin)

    def told(self, row: Row, layout: Layout) -> str:
        text = str(row[layout.answer])
        if layout is HUMANEVAL:
            text = str(row[layout.prompt]) + text
        return fenced(text) if layout in (HUMANEVAL, MBPP, SANITIZED) else text

    def asked(self, row: Row, layout: Layout) -> str:
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
                f"{layout.name} rows hold no tests to run (HumanEval: test and entry_point; MBPP: test_list): name "
                "such a table as data.test, or take task.score = 'loss'"
            )
        return Question(
            asked=self.asked(row, layout),
            gold="\n".join([*setup_of(row), *tests]),
            kind="code",
            new_tokens=self.options.new_tokens or NEW_TOKENS,
            given=str(row[layout.prompt]) if layout is HUMANEVAL else "",
        )

    def grade(self, question: Question, written: str) -> Verdict:
        """Right where the program passes its tests; a fault where it had to be stopped, or stopped its process."""
        code = code_of(written, question.gold)
        ran = ran_with(question, code)
        return Verdict(right=ran.passed, extracted=code.strip() or None, fault=None if ran.ended else ran.why)


def ran_with(question: Question, code: str) -> Ran:
    """The code run with the question's tests, behind what was given."""
    return run_tests(f"{question.given.rstrip()}\n{code}\n" if question.given else f"{code}\n", question.gold)


def tests_of(row: Row) -> list[str]:
    """The tests as lines of Python; none where a row has none."""
    if row.get("test") and row.get("entry_point"):
        return [str(row["test"]), f"check({row['entry_point']})"]
    found: Sequence[object] = row.get("test_list") or []
    return [str(test) for test in found]


def setup_of(row: Row) -> list[str]:
    """What MBPP's tests need before them."""
    imports: Sequence[object] = row.get("test_imports") or []
    return [*map(str, imports), *filter(None, [str(row.get("test_setup_code") or "")])]


def fenced(code: str) -> str:
    return f"```python\n{code.replace(chr(13), '').strip(chr(10))}\n```"


def code_of(written: str, tests: str) -> str:
    """The program in an answer: of its blocks in Python the first that defines what the tests call, else the first."""
    found = [block.groups() for block in FENCE.finditer(written)]
    blocks = [text for language, text in found if language.lower() in PYTHON] or [text for _, text in found]
    called = set(re.findall(r"\b([A-Za-z_]\w*)\s*\(", tests)) | set(re.findall(r"check\((\w+)\)", tests))
    for block in blocks:
        if called & set(re.findall(r"^(?:async\s+)?def\s+(\w+)", block, re.MULTILINE)):
            return block
    return blocks[0] if blocks else written
