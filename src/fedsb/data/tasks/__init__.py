"""Task families, one file each: what a row becomes, which tokens have a loss, and how scores are computed."""

from __future__ import annotations

from fedsb.data.tasks.arithmetic import Arithmetic
from fedsb.data.tasks.base import NO_LOSS, Batch, Example, Task, TaskOptions
from fedsb.data.tasks.chat import Chat
from fedsb.data.tasks.classification import Classification
from fedsb.data.tasks.code import Code
from fedsb.data.tasks.commonsense import Commonsense
from fedsb.data.tasks.instruction import Instruction
from fedsb.data.tasks.regression import Regression
from fedsb.data.tasks.text import Text
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.utils.errors import UserError, did_you_mean

__all__ = ["NO_LOSS", "TASKS", "Batch", "Example", "Task", "TaskOptions", "Tokenizer", "open_task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "text": Text,
    "instruction": Instruction,
    "chat": Chat,
    "arithmetic": Arithmetic,
    "commonsense": Commonsense,
    "code": Code,
}


def open_task(kind: str, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> Task:
    """Returns the task of this kind. Raises UserError for an unknown kind."""
    if kind not in TASKS:
        raise UserError(f"task.kind = {kind!r} is not known: {did_you_mean(kind, TASKS)}.")
    return TASKS[kind](tokenizer=tokenizer, options=options, max_tokens=max_tokens)
