"""Conversations of several turns: next-token loss on what the assistant says, each turn with its end token.

Reads the column messages, a list of {"role", "content"} a row. The text is made by the tokenizer's own chat template. A
turn of the assistant is what the template writes after the turns before it and its generation prompt, as in use:

    before = template(messages[:i], add_generation_prompt)     read
    after  = template(messages[:i + 1])                        what follows `before` is a target, but for
                                                               white space at its end

The parts are tokenised apart and joined, so that what a model reads before a turn is what it was trained behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from fedsb.data.sources import Row
from fedsb.data.tasks.base import NO_LOSS, Example, Question, TaskOptions, Tokenizer
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.instruction import answer_end, stop_texts
from fedsb.errors import UserError

ASSISTANT = "assistant"
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a conversation's text."""

    text: str
    told: bool  # the assistant's: a target


class Chat(CausalTask):
    """The assistant's turns of a conversation, by the model's chat template."""

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        super().__init__(tokenizer=tokenizer, options=options, max_tokens=max_tokens)
        if tokenizer is not None and not tokenizer.chat_template:
            raise UserError(
                "task.kind = 'chat' needs a tokenizer with a chat template, and this one has none: take an instruct "
                "model, save a chat_template with the tokenizer, or take task.kind = 'instruction'"
            )

    @property
    def reads(self) -> list[str]:
        return [self.options.messages]

    @property
    def needs(self) -> list[str]:
        return self.reads

    def questions(self, rows: list[Row]) -> list[Question]:
        """Returns each conversation as it stands before the assistant's next turn; one that ends with a turn of the
        assistant is asked for that turn again."""
        asked: list[str] = []
        for number, row in enumerate(rows, start=1):
            turns = self._turns(row, number)
            turns = turns[:-1] if turns[-1]["role"] == ASSISTANT else turns
            if not turns:
                raise UserError(f"row {number} has no turn before the assistant's: there is nothing to answer")
            asked.append(_written(self.tokenizer, turns, prompt=True))
        return [self._question(text, prompt) for text, prompt in zip(asked, self._tokenize(asked), strict=True)]

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """One example a row, fewer where no word of the assistant's is in the window: those rows are dropped.

        The second number counts the dropped rows and those that were cut.
        """
        talks = [parts_of(self.tokenizer, self._messages(row, number)) for number, row in enumerate(rows, start=1)]
        tokens = iter(self._tokenize([part.text for part in chain(*talks)]))
        examples: list[Example] = []
        n_cut = 0
        for parts in talks:
            pieces = [(next(tokens), part.told) for part in parts]
            whole = [token for piece, _ in pieces for token in piece]
            labels = [token if told else NO_LOSS for piece, told in pieces for token in piece]
            n_cut += len(whole) > self.max_tokens
            example: Example = {"input_ids": whole[: self.max_tokens], "labels": labels[: self.max_tokens]}
            if self.weight(example):
                examples.append(example)
        if rows and not examples:
            raise UserError(f"no assistant's turn begins within {self.max_tokens} tokens: raise max_tokens")
        return examples, n_cut

    @property
    def trained_end(self) -> int | None:
        return answer_end(self.tokenizer)

    def stops(self) -> list[str]:
        return stop_texts(self.tokenizer)

    def _turns(self, row: Row, number: int) -> list[Message]:
        """Returns a row's messages. Raises UserError where they are not messages."""
        column = self.options.messages
        found = row.get(column)
        if not isinstance(found, list) or not found or not all(map(_is_message, found)):
            raise UserError(
                f"row {number} holds {found!r:.80} in the column {column!r}, where a list of messages is needed, each "
                'with a "role" and a "content" that are text'
            )
        return found

    def _messages(self, row: Row, number: int) -> list[Message]:
        """Returns a row's messages, one of them the assistant's. Raises UserError where there is none."""
        found = self._turns(row, number)
        if not any(message["role"] == ASSISTANT for message in found):
            roles = ", ".join(message["role"] for message in found)
            raise UserError(f"row {number} has no turn of the role 'assistant' (its roles: {roles}): nothing to learn")
        return found


def parts_of(tokenizer: Tokenizer, messages: list[Message]) -> list[Part]:
    """A conversation's text up to its last word of the assistant's, piece by piece.

    Raises UserError where the template refuses the conversation, or writes it otherwise once it goes on.
    """
    parts: list[Part] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _written(tokenizer, messages[:i], prompt=True)
        after = _written(tokenizer, messages[: i + 1], prompt=False)
        for head, whole, what in ((done, before, "the turns before it"), (before, after, "its own prompt")):
            if not whole.startswith(head):
                raise UserError(
                    f"the chat template writes turn {i + 1} so that it does not follow {what}: {head[-60:]!r} is no "
                    f"beginning of {whole[:400]!r}. Training would show what is never read in use. Give the tokenizer "
                    "a chat_template that writes the same turns the same way whatever follows, or train on single "
                    "turns with task.kind = 'instruction'"
                )
        told = after[len(before) :].rstrip()  # the line's end after the end-of-turn token is not the model's to write
        parts += [Part(text=before[len(done) :], told=False), Part(text=told, told=True)]
        done = before + told
    return parts


def _written(tokenizer: Tokenizer, messages: list[Message], *, prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template raises what it likes, mostly jinja2's TemplateError
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses a conversation of the roles {roles or 'none'}: {error}") from error


def _is_message(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("role", "content"))
