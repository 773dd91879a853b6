"""Conversations of several turns: next-token loss on the assistant's turns, each with its end token.

Reads the column messages, a list of {"role", "content"} per row. The tokenizer's own chat template makes the text. An
assistant's turn is what the template writes after the previous turns and its generation prompt, as in use:

    before = template(messages[:i], add_generation_prompt)     read
    after  = template(messages[:i + 1])                        what follows `before` is a target, except for
                                                               white space at its end

The parts are tokenised separately and joined, so that a model reads the same tokens before a turn in use as in
training. Special tokens in a row's text are read as text. Those that the template writes stay special.

Two more columns are read if a table has them: `system`, a text that becomes the first turn, and `tools`, a list (or its
JSON text) for the template. An assistant's turn with "weight": 0 is read and is not a target.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fedsb.data.rows import Row, errors_at, place_of
from fedsb.data.tasks.base import NO_LOSS, Example, Question, TaskOptions
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.instruction import answer_end, from_template, stop_texts
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.utils.errors import BadRowError, UserError

ASSISTANT = "assistant"
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a conversation's text."""

    text: str
    is_target: bool  # whether the assistant wrote it


class Chat(CausalTask):
    """The assistant's turns of a conversation, by the model's chat template."""

    def __init__(self, *, tokenizer: Tokenizer, options: TaskOptions, max_tokens: int) -> None:
        super().__init__(tokenizer=tokenizer, options=options, max_tokens=max_tokens)
        if tokenizer is not None and not tokenizer.chat_template:
            raise UserError(
                "task.kind = 'chat' needs a tokenizer with a chat template, and this one has none. Choose an instruct "
                "model, save a chat_template with the tokenizer, or set task.kind = 'instruction'."
            )

    @property
    def reads(self) -> list[str]:
        return [self.options.messages]

    @property
    def optional_prompt_columns(self) -> tuple[str, ...]:
        return ("system", "tools")

    @property
    def needs(self) -> list[str]:
        return self.reads

    def questions(self, rows: list[Row]) -> list[Question]:
        """Returns a question for the assistant's next turn of each conversation.

        A conversation that ends with an assistant's turn is asked for that turn again.
        """
        prompts: list[str] = []
        for number, row in enumerate(rows, start=1):
            turns = self._turns(row, number)
            turns = turns[:-1] if turns[-1]["role"] == ASSISTANT else turns
            if not turns:
                raise BadRowError(
                    f"{place_of(row, number)} has no turn before the assistant's, so there is nothing to answer."
                )
            messages, tools = self._conversation(row, number, turns)
            with errors_at(row, number):
                prompts.append(from_template(self.tokenizer, messages, tools, prompt=True))
        return [
            self._question(text, tokens) for text, tokens in zip(prompts, self.encoder.tokenize(prompts), strict=True)
        ]

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """Returns (one example per row, the number of rows that were cut or dropped).

        A row without any target in the window is dropped.
        """
        talks = [self._parts(row, number) for number, row in enumerate(rows, start=1)]
        tokens = iter(self.encoder.tokenize([part.text for part in chain(*talks)]))
        examples: list[Example] = []
        n_cut = 0
        for parts in talks:
            pieces = [(next(tokens), part.is_target) for part in parts]
            whole = [token for piece, _ in pieces for token in piece]
            labels = [token if is_target else NO_LOSS for piece, is_target in pieces for token in piece]
            n_cut += len(whole) > self.max_tokens
            example: Example = {"input_ids": whole[: self.max_tokens], "labels": labels[: self.max_tokens]}
            if self.weight(example):
                examples.append(example)
        if rows and not examples:
            raise UserError(
                f"No assistant's turn begins within {self.max_tokens} tokens. Raise model.max_seq_length. Turns of "
                "weight 0 do not count."
            )
        return examples, n_cut

    def _parts(self, row: Row, number: int) -> list[Part]:
        messages, tools = self._conversation(row, number, self._messages(row, number))
        with errors_at(row, number):
            return parts_of(self.tokenizer, messages, tools)

    def _conversation(self, row: Row, number: int, turns: list[Message]) -> tuple[list[Message], list[Any] | None]:
        """Returns the template's arguments: a row's turns after its system text, and its tools."""
        place, messages, system = place_of(row, number), turns, row.get("system")
        if system:
            if not isinstance(system, str) or messages[0]["role"] == "system":
                why = "which already begin with a system turn" if isinstance(system, str) else "which must be text"
                raise BadRowError(f"{place}: the column 'system' is put before the messages, {why}. Remove one.")
            messages = [{"role": "system", "content": system}, *messages]
        return [_marked(message, self.encoder.as_text) for message in messages], _tools(row.get("tools"), place)

    @property
    def trained_end(self) -> int | None:
        return answer_end(self.tokenizer)

    def stops(self) -> list[str]:
        return stop_texts(self.tokenizer)

    def _turns(self, row: Row, number: int) -> list[Message]:
        """Returns a row's messages. Raises UserError if they are not valid messages."""
        column = self.options.messages
        found = row.get(column)
        place = place_of(row, number)
        if not isinstance(found, list) or not found or not all(map(_is_message, found)):
            raise BadRowError(
                f"{place}: the column {column!r} contains {found!r:.80}, where a list of messages is expected, each "
                'with a "role" and a "content" that are text.'
            )
        return found

    def _messages(self, row: Row, number: int) -> list[Message]:
        """Returns a row's messages. Raises UserError if none is the assistant's, or a weight is invalid."""
        found = self._turns(row, number)
        if not any(message["role"] == ASSISTANT for message in found):
            roles = ", ".join(message["role"] for message in found)
            raise BadRowError(
                f"{place_of(row, number)} has no turn of the role 'assistant', so there is nothing to learn. Its roles "
                f"are: {roles}."
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
    """Returns a conversation's text up to the end of the last assistant's turn, in parts.

    Raises UserError if the template refuses the conversation, or writes a turn differently when more turns follow.
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
                "Choose a model whose template reads tools, or remove the column."
            )
        for head, whole, what in ((done, before, "the turns before it"), (before, after, "its own prompt")):
            if not whole.startswith(head):
                raise UserError(
                    f"the chat template writes turn {i + 1} so that it does not follow {what}: {head[-60:]!r} is not "
                    f"the start of {whole[:400]!r}. Training would differ from use. Give the tokenizer a chat_template "
                    "that writes the same turns the same way whatever follows, or train on single turns with task.kind "
                    "= 'instruction'."
                )
        answer = after[len(before) :].rstrip()  # the model does not write the newline after the end-of-turn token
        parts += [
            Part(text=before[len(done) :], is_target=False),
            Part(text=answer, is_target=message.get("weight") != 0),
        ]
        done = before + answer
    return parts


def _is_message(found: object) -> bool:
    """Returns whether this is a turn: a role and a content that are text, or tool calls without a content."""
    if not isinstance(found, dict) or not isinstance(found.get("role"), str):
        return False
    return isinstance(found.get("content"), str) or (found.get("content") is None and bool(found.get("tool_calls")))


def _marked(message: Message, as_text: Callable[[str], str]) -> Message:
    """Returns a turn for the template, without null values and with special tokens in its content as text."""
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
