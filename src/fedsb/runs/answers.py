"""Stores the answers of an evaluation in answers.jsonl, so that an interrupted evaluation can resume.

{"row", "prompt", "generated", "extracted", "gold", "right", "fault", "tokens", "ended"}        row counts from 1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsb.data.tasks.answers import Answers
from fedsb.data.tasks.base import Example, Question, question_of
from fedsb.data.tasks.instruction import prompt_text
from fedsb.reporting.run_directory import read_rows
from fedsb.training.generation import Written
from fedsb.training.scoring import Answered, figures
from fedsb.utils.files import disk_errors, json_lines, write_atomic
from fedsb.utils.formatting import counts_text

EVERY_SECONDS = 10.0  # between two lines of progress

Answering = Callable[[Sequence[Example]], Iterator[Answered]]  # positions are those in its argument
Line = dict[str, Any]


def answer_all(
    task: Answers, examples: Sequence[Example], answering: Answering, path: Path, note: Callable[[str], None]
) -> Line:
    """Answers the examples that `path` does not contain, grades all answers, and returns the scores.

    A stored answer is used if its prompt and gold answer equal those of the example. It is graded again.
    """
    questions = [question_of(example) for example in examples]
    done = _stored(task, questions, path)
    if done:
        note(f"  {len(done):,} of {len(examples):,} answers are stored in {path}")
    left = [i for i in range(len(examples)) if i not in done]
    started = shown = time.monotonic()
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _lines(task, done))
        with path.open("ab") as file:
            for count, answered in enumerate(answering([examples[i] for i in left]), start=1):
                position = left[answered.position]
                done[position] = replace(answered, position=position)
                file.write(json_lines([line_of(task, done[position])]))
                file.flush()
                if (now := time.monotonic()) - shown >= EVERY_SECONDS or count == len(left):
                    shown, seconds = now, (now - started) / count * (len(left) - count)
                    note(f"  {_progress(done, len(examples), task.metric)}, about {seconds:.0f} s left")
        write_atomic(path, _lines(task, done))
    return figures(list(done.values()), task.metric) | {"answers": str(path)}


def line_of(task: Answers, answered: Answered) -> Line:
    """Returns an answer as a line of answers.jsonl."""
    return {
        "row": answered.position + 1,
        "prompt": prompt_text(task.tokenizer, answered.question.prompt),
        "generated": answered.written.text,
        "extracted": answered.verdict.extracted,
        "gold": answered.question.gold,
        "right": answered.verdict.right,
        "fault": answered.verdict.fault,
        "tokens": answered.written.tokens,
        "ended": answered.written.ended,
    }


def _stored(task: Answers, questions: Sequence[Question], path: Path) -> dict[int, Answered]:
    """Returns the stored answers by position. Leaves out an incomplete last line."""
    stored: dict[int, Answered] = {}
    for line in read_rows(path):
        position = line["row"] - 1
        if not 0 <= position < len(questions):
            continue
        question = questions[position]
        if (line["prompt"], line["gold"]) != (prompt_text(task.tokenizer, question.prompt), question.gold):
            continue
        written = Written(text=line["generated"], tokens=line["tokens"], ended=line["ended"])
        verdict = task.grade(question, written.text)
        stored[position] = Answered(position=position, question=question, written=written, verdict=verdict)
    return stored


def _lines(task: Answers, done: dict[int, Answered]) -> bytes:
    return json_lines([line_of(task, done[position]) for position in sorted(done)])


def _progress(done: dict[int, Answered], rows: int, metric: str) -> str:
    found = figures(list(done.values()), metric)
    return f"{len(done):,} of {rows:,} answered, {metric} {found[metric]:.4f}{counts_text(found)}"
