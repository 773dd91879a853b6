"""Scoring a model on tokenised rows, as the task asks: by logits, by the likeliest option, or by written answers.

Batched, sorted by length, summed in float64. Shapes: b examples, t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fedsb.data.grading.verdict import Verdict
from fedsb.data.tasks.answers import Answers
from fedsb.data.tasks.base import NO_LOSS, Batch, Example, Question, Task, ids, inputs_of, question_of
from fedsb.data.tasks.causal import CausalTask
from fedsb.training.generation import Prompt, Written, write_answers
from fedsb.utils.tensors import to_device

LOGIT_VALUES = 1 << 28  # in a forward that only scores: 0.5 GB in 16 bits, and 1 GB in float32


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A graded answer to the example at `position`."""

    position: int
    question: Question
    written: Written
    verdict: Verdict


def forward(
    model: nn.Module, task: Task, examples: Sequence[Example], *, whole: bool = False, multiple_of: int = 8
) -> tuple[torch.Tensor, Batch]:
    """Returns (logits, the batch with its labels), on the model's device.

    In next-token tasks the logits are those that predict the batch's targets (n, v), since those of the other tokens
    would only take memory. With `whole` they are of all tokens (b, t, v). Rows are padded to a width that is a multiple
    of `multiple_of`, or the window.
    """
    device = next(model.parameters()).device
    batch = {
        key: to_device(value, device) for key, value in task.collate(list(examples), multiple_of=multiple_of).items()
    }
    if whole or "targets" not in batch:
        return model(**inputs_of(batch)).logits, batch
    with _predicting(model, batch["targets"]):
        return model(**inputs_of(batch)).logits, batch


@contextmanager
def _predicting(model: Any, target_n: torch.Tensor) -> Iterator[None]:
    """Gives the model's output layer only the hidden states before the targets."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def select(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        before_n = (target_n - 1).to(args[0].device)  # a model can span several devices
        return (args[0].flatten(0, 1).index_select(0, before_n), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class Measured(NamedTuple):
    """The metrics of a model on some examples."""

    figures: dict[str, float]  # the task's metric, and others to show with it
    confusion: list[list[int]] | None = None  # rows of each true class by predicted class


def measured(model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int) -> Measured:
    """Scores the examples as the task asks."""
    if isinstance(task, Answers) and task.scoring != "loss":
        return Measured(figures(list(answers(model, task, examples, batch_size)), task.metric))
    scored = [(first, second) for _, first, second in batch_scores(model, task, examples, batch_size)]
    return Measured(task.measure(scored), task.confusion(scored))


def figures(found: Collection[Answered], metric: str) -> dict[str, float]:
    """Returns the share of right answers, called `metric`, and counts (int) of four problems.

    cut: the text did not end by itself, though it may be right; no_room: those of them whose prompt fills the window;
    without_answer: the text contains nothing to grade; grading_faults: the grader timed out or failed.
    """
    return {
        metric: sum(answered.verdict.right for answered in found) / len(found),
        "cut": sum(not answered.written.ended for answered in found),
        "no_room": sum(not answered.written.ended and not answered.written.tokens for answered in found),
        "without_answer": sum(answered.verdict.extracted is None for answered in found),
        "grading_faults": sum(answered.verdict.fault is not None for answered in found),
    }


@torch.no_grad()
def batch_scores(
    model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yields (positions, the task's two scores of each) per batch, as float64, short examples first."""
    bound = None
    if isinstance(task, CausalTask):
        config: Any = model.config
        bound = task.weight, LOGIT_VALUES // config.get_text_config().vocab_size
    for chosen in batches_by_length(examples, batch_size, bound):
        sums, counts = task.scores(*forward(model, task, [examples[i] for i in chosen]))
        yield chosen, sums.cpu().double(), counts.cpu().double()


def batches_by_length(
    examples: Sequence[Example], batch_size: int, bound: tuple[Callable[[Example], int], int] | None = None
) -> Iterator[list[int]]:
    """Yields the positions of the examples, batch by batch, short first.

    `bound` is a weight of examples, and the largest sum of weights in a batch of several.
    """
    weight, most = bound or (lambda _: 0, 0)
    batch, total = list[int](), 0
    for i in sorted(range(len(examples)), key=lambda i: len(ids(examples[i], "input_ids"))):
        own = weight(examples[i])
        if batch and (len(batch) == batch_size or total + own > most):
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += own
    if batch:
        yield batch


def answers(model: nn.Module, task: Answers, examples: Sequence[Example], batch_size: int) -> Iterator[Answered]:
    """Yields every example's graded answer: a generated text, or the model's likeliest option."""
    questions = [question_of(example) for example in examples]
    if task.scoring == "options":
        yield from likeliest(model, task, questions, batch_size)
        return
    written = write_answers(
        model,
        task.tokenizer,
        prompts_of(questions),
        ends=task.end_tokens(model),
        stops=task.stops(),
        batch_size=batch_size,
    )
    yield from graded(task, questions, written)


def prompts_of(questions: Sequence[Question]) -> list[Prompt]:
    return [Prompt(tokens=question.prompt_ids, new_tokens=question.new_tokens) for question in questions]


def graded(task: Answers, questions: Sequence[Question], answers: Iterable[tuple[int, Written]]) -> Iterator[Answered]:
    """Yields the answers with their positions and verdicts."""
    for position, written in answers:
        question = questions[position]
        verdict = task.grade(question, written.text)
        yield Answered(position=position, question=question, written=written, verdict=verdict)


def likeliest(model: nn.Module, task: Answers, questions: Sequence[Question], batch_size: int) -> Iterator[Answered]:
    """Yields the option with the largest log p(option with its end token | prompt).

    It is not divided by length, because each string is a whole answer, as in training.
    """
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        tokens = [task.option_tokens(question) for question in some]
        examples: list[Example] = [
            {
                "input_ids": [*question.prompt_ids, *option],
                "labels": [NO_LOSS] * len(question.prompt_ids) + option,
            }
            for question, options in zip(some, tokens, strict=True)
            for option in options
        ]
        nats = [0.0] * len(examples)
        for chosen, sums, _ in batch_scores(model, task, examples, batch_size):
            for i, value in zip(chosen, sums.tolist(), strict=True):
                nats[i] = value
        following = iter(nats)
        for position, (question, options) in enumerate(zip(some, tokens, strict=True), start=start):
            costs = [next(following) for _ in options]
            best = min(range(len(costs)), key=costs.__getitem__)
            name = question.options[best]
            written = Written(text=question.option_texts[best], tokens=len(options[best]), ended=True)
            verdict = Verdict(right=name == question.gold, extracted=name)
            yield Answered(position=position, question=question, written=written, verdict=verdict)
