"""Conversations of several turns: next-token loss on what the assistant says, each turn with its end token.

Reads the column messages, a list of {"role", "content"} a row. The text is made by the tokenizer's own chat template. A
turn of the assistant is what the template writes after the turns before it and its generation prompt, as in use:

    before = template(messages[:i], add_generation_prompt)     read
    after  = template(messages[:i + 1])                        what follows `before` is a target, but for
                                                               white space at its end

The parts are tokenised apart and joined, so that what a model reads before a turn is what it was trained behind.
Special tokens in a row's text are read as text; those that the template writes stay special.

Where a table has them, two more columns are read: `system`, a text that becomes the first turn, and `tools`, a list (or
JSON text) that the template is given. A turn of the assistant with "weight": 0 is read and is not a target.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fedsb.data.rows import Row, place_of
from fedsb.data.tasks.base import NO_LOSS, Example, Question, TaskOptions, Tokenizer, errors_at
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.instruction import answer_end, from_template, stop_texts
from fedsb.utils.errors import BadRowError, UserError

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
    def prompt_also(self) -> tuple[str, ...]:
        return ("system", "tools")

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
                raise BadRowError(
                    f"{place_of(row, number)} has no turn before the assistant's: there is nothing to answer"
                )
            messages, tools = self._conversation(row, number, turns)
            with errors_at(row, number):
                asked.append(from_template(self.tokenizer, messages, tools, prompt=True))
        return [self._question(text, prompt) for text, prompt in zip(asked, self._tokenize(asked), strict=True)]

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """One example a row, fewer where no word of the assistant's is in the window: those rows are dropped.

        The second number counts the dropped rows and those that were cut.
        """
        talks = [self._parts(row, number) for number, row in enumerate(rows, start=1)]
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
            raise UserError(
                f"no assistant's turn begins within {self.max_tokens} tokens. Raise model.max_seq_length. Turns of "
                "weight 0 do not count"
            )
        return examples, n_cut

    def _parts(self, row: Row, number: int) -> list[Part]:
        messages, tools = self._conversation(row, number, self._messages(row, number))
        with errors_at(row, number):
            return parts_of(self.tokenizer, messages, tools)

    def _conversation(self, row: Row, number: int, turns: list[Message]) -> tuple[list[Message], list[Any] | None]:
        """Returns what the template takes: a row's turns after its system text, and its tools."""
        place, messages, system = place_of(row, number), turns, row.get("system")
        if system:
            if not isinstance(system, str) or messages[0]["role"] == "system":
                why = "which already begin with a system turn" if isinstance(system, str) else "which must be text"
                raise BadRowError(f"{place}: the column 'system' is put before the messages, {why}. Remove one.")
            messages = [{"role": "system", "content": system}, *messages]
        return [_marked(message, self.as_text) for message in messages], _tools(row.get("tools"), place)

    @property
    def trained_end(self) -> int | None:
        return answer_end(self.tokenizer)

    def stops(self) -> list[str]:
        return stop_texts(self.tokenizer)

    def _turns(self, row: Row, number: int) -> list[Message]:
        """Returns a row's messages. Raises UserError where they are not messages."""
        column = self.options.messages
        found = row.get(column)
        place = place_of(row, number)
        if not isinstance(found, list) or not found or not all(map(_is_message, found)):
            raise BadRowError(
                f"{place}: the column {column!r} contains {found!r:.80}, where a list of messages is expected, each "
                'with a "role" and a "content" that are text'
            )
        return found

    def _messages(self, row: Row, number: int) -> list[Message]:
        """Returns a row's messages, one of them the assistant's. Raises UserError where there is none."""
        found = self._turns(row, number)
        if not any(message["role"] == ASSISTANT for message in found):
            roles = ", ".join(message["role"] for message in found)
            raise BadRowError(
                f"{place_of(row, number)} has no turn of the role 'assistant' (its roles: {roles}): nothing to learn"
            )
        place = place_of(row, number)
        for turn, message in enumerate(found, start=1):
            weight = message.get("weight")
            if weight not in (None, 0, 1) or (weight == 1 and message["role"] != ASSISTANT):
                raise BadRowError(
                    f"{place}: turn {turn}, of the role {message['role']!r}, has the weight {weight!r:.40}. A turn of "
                    "the assistant may have 0 (it is read only) or 1 (it is a target); other turns are never targets."
                )
        return found


def parts_of(tokenizer: Tokenizer, messages: list[Message], tools: list[Any] | None = None) -> list[Part]:
    """A conversation's text up to its last word of the assistant's, piece by piece.

    Raises UserError where the template refuses the conversation, or writes it otherwise once it goes on.
    """
    parts: list[Part] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = from_template(tokenizer, messages[:i], tools, prompt=True)
        after = from_template(tokenizer, messages[: i + 1], tools, prompt=False)
        if tools and not done and before == from_template(tokenizer, messages[:i], None, prompt=True):
            raise UserError(
                "the rows have a column 'tools', but the chat template writes the same text with and without them. "
                "Take a model whose template reads tools, or remove the column."
            )
        for head, whole, what in ((done, before, "the turns before it"), (before, after, "its own prompt")):
            if not whole.startswith(head):
                raise UserError(
                    f"the chat template writes turn {i + 1} so that it does not follow {what}: {head[-60:]!r} is no "
                    f"beginning of {whole[:400]!r}. Training would show what is never read in use. Give the tokenizer "
                    "a chat_template that writes the same turns the same way whatever follows, or train on single "
                    "turns with task.kind = 'instruction'"
                )
        told = after[len(before) :].rstrip()  # the line's end after the end-of-turn token is not the model's to write
        parts += [Part(text=before[len(done) :], told=False), Part(text=told, told=message.get("weight") != 0)]
        done = before + told
    return parts


def _is_message(found: object) -> bool:
    """Returns whether this is a turn: a role and a content that are text, or a call of tools without a content."""
    if not isinstance(found, dict) or not isinstance(found.get("role"), str):
        return False
    return isinstance(found.get("content"), str) or (found.get("content") is None and bool(found.get("tool_calls")))


def _marked(message: Message, as_text: Callable[[str], str]) -> Message:
    """Returns a turn for the template, without values that are null and with special tokens in its content as text."""
    found = {key: value for key, value in message.items() if value is not None}
    return found | {"content": as_text(message.get("content") or "")}


def _tools(found: object, place: str) -> list[Any] | None:
    """Returns the tools of a row, a list or the JSON text of one. Raises BadRowError for anything else."""
    if found is None or found == "":
        return None
    try:
        tools = json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list):
        raise BadRowError(f"{place}: the column 'tools' contains {found!r:.60}, where a list of tools is expected.")
    return tools or None
