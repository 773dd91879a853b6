"""Measures the errors of grading: right answers that it calls wrong, and wrong ones that it calls right.

    python benchmarks/grading/run.py --data FOLDER     (FOLDER contains gsm8k/, math/ and commonsense/, as jsonl.gz)

Right answers are every row's own gold: as it stands, and written otherwise (LaTeX for LaTeX, a number with its
thousands set apart). Wrong ones are another row's gold, one more and one less, the other sign, the last digit dropped.
MATH's gold is graded twice, also without the short cut for equal texts, so that the library alone is seen; its wrong
answers are those of every fifth row. About ten minutes on one core. Writes results.json, with every failure by row.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedsb.data.grading import math_check
from fedsb.data.grading.verdict import Verdict, as_number
from fedsb.data.sources import load_table
from fedsb.data.tasks.arithmetic import Arithmetic
from fedsb.data.tasks.base import Question, TaskOptions
from fedsb.data.tasks.commonsense import Commonsense

HERE = Path(__file__).parent
LISTED = 400  # failures of a kind, by row
COMMONSENSE = (
    "boolq", "piqa", "social_i_qa", "hellaswag_1000", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"
)  # fmt: skip


def questions_of(task: Any, path: Path) -> list[Question]:
    table = load_table(str(path))
    task.columns_of(table)
    layout = task.layout(table.columns)
    return [task.question(row, layout) for row in table.rows]


def tally(
    cases: Iterable[tuple[int, str, str]], grade: Callable[[int, str], Verdict], *, right: bool
) -> dict[str, Any]:
    """Returns how many of the cases (row, gold, answer) are judged differently from `right`, and which."""
    count, faults, failures = 0, 0, []
    for row, gold, written in cases:
        verdict = grade(row, written)
        count, faults = count + 1, faults + (verdict.fault is not None)
        if verdict.right != right:
            failures.append({"row": row + 1, "gold": gold, "written": written, "fault": verdict.fault})
    return {
        "cases": count,
        "misjudged": len(failures),
        "share": round(len(failures) / max(count, 1), 5),
        "faults": faults,
        "failures": failures[:LISTED],
    }


def otherwise(gold: str) -> str:
    """Returns the same LaTeX in a different notation, or the same text if there is nothing to change."""
    text = re.sub(r"\\frac(?![a-z])", r"\\dfrac", gold).replace("\\left", "").replace("\\right", "")
    return re.sub(r"(?<![0-9.,])([0-9]{1,3})([0-9]{3})(?![0-9.,])", r"\1,\2", text)


def spoilt(gold: str) -> dict[str, str]:
    """Yields wrong answers that look like the gold: its last number one off or without a digit, its sign changed."""
    numbers = list(re.finditer(r"[0-9]+(?:,[0-9]{3})*(?![0-9])", gold))
    if not numbers:
        return {}
    last = numbers[-1]

    def put(text: str) -> str:
        return gold[: last.start()] + text + gold[last.end() :]

    digits = last.group().replace(",", "")
    value = int(digits)
    made = {"one more": put(str(value + 1)), "one less": put(str(value - 1)) if value > 0 else ""}
    made["a digit dropped"] = put(digits[:-1]) if len(digits) > 1 else ""
    return {kind: text for kind, text in made.items() if text} | sign_turned(gold)


def sign_turned(gold: str) -> dict[str, str]:
    if as_number(gold) in (None, 0):
        return {}
    return {"sign turned": gold[1:] if gold.startswith("-") else f"-{gold}"}


def measure(task: Any, questions: list[Question], *, spoil_every: int = 1) -> dict[str, Any]:
    def grade(row: int, written: str) -> Verdict:
        return task.grade(questions[row], f"So it is.\nThe answer is: {written}")  # type: ignore[no-any-return]

    golds = [question.gold for question in questions]
    wrong: dict[str, list[tuple[int, str, str]]] = {}
    for row, gold in list(enumerate(golds))[::spoil_every]:
        other = golds[(row + 1) % len(golds)]
        if otherwise(other) != otherwise(gold):
            wrong.setdefault("another row's", []).append((row, gold, other))
        for kind, text in spoilt(gold).items():
            if as_number(text) is not None and as_number(text) == as_number(gold):
                continue  # "18.9" is "18.90"
            wrong.setdefault(kind, []).append((row, gold, text))
    found = {
        "gold as it stands": tally(((i, g, g) for i, g in enumerate(golds)), grade, right=True),
        "gold otherwise": tally(((i, g, otherwise(g)) for i, g in enumerate(golds)), grade, right=True),
    }
    return found | {f"wrong: {kind}": tally(cases, grade, right=False) for kind, cases in wrong.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    arithmetic = Arithmetic(tokenizer=None, options=TaskOptions(), max_tokens=512)
    commonsense = Commonsense(tokenizer=None, options=TaskOptions(), max_tokens=512)
    results: dict[str, Any] = {}

    def keep(name: str, found: dict[str, Any], started: float) -> None:
        results[name] = {"seconds": round(time.monotonic() - started, 1), **found}
        (HERE / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        for kind, row in found.items():
            print(f"{name} | {kind} | {row['cases']} | {row['misjudged']} | {row['faults']}", flush=True)

    for part in ("train", "test"):
        started = time.monotonic()
        questions = questions_of(arithmetic, data / "gsm8k" / f"{part}.jsonl.gz")
        keep(f"GSM8K {part}", measure(arithmetic, questions), started)
    for part in COMMONSENSE:
        started = time.monotonic()
        rows = questions_of(commonsense, data / "commonsense" / "test" / f"{part}.jsonl.gz")

        def grade(row: int, written: str, rows: list[Question] = rows) -> Verdict:
            return commonsense.grade(rows[row], written)

        told = [(i, q.gold, w, o) for i, q in enumerate(rows) for o, w in zip(q.options, q.option_texts, strict=True)]
        found = {
            "gold as it stands": tally([case[:3] for case in told if case[3] == case[1]], grade, right=True),
            "wrong: another option": tally([case[:3] for case in told if case[3] != case[1]], grade, right=False),
        }
        keep(f"commonsense {part}", found, started)
    started = time.monotonic()
    questions = questions_of(arithmetic, data / "math" / "test.jsonl.gz")
    keep("MATH", measure(arithmetic, questions, spoil_every=5), started)
    started = time.monotonic()
    keep("MATH, by the library alone", {"gold as it stands": alone(questions)}, started)
    arithmetic.checker.close()


def alone(questions: list[Question]) -> dict[str, Any]:
    """Compares gold with gold by math-verify, without the short cut for equal texts."""
    checker = math_check.MathChecker()

    def grade(row: int, written: str) -> Verdict:
        found = checker.ask(questions[row].gold, written)
        return Verdict(right=found.right, extracted=written, fault=found.fault)

    found = tally(((i, q.gold, q.gold) for i, q in enumerate(questions)), grade, right=True)
    checker.close()
    return found


if __name__ == "__main__":
    main()
