"""A prompt and its answer: next-token loss on the answer and the end token only.

Reads the columns prompt and answer, and input if the table has it (Taori et al., "Stanford Alpaca", 2023). The prompt
is that of the chat template if the tokenizer has one, with the input after an empty line in the user's turn; else
Alpaca's, with or without an input. Prompt and answer are tokenised separately and joined, so that the tokens that a
model sees in generation are an exact prefix of those of its training. Special tokens in a row's text are read as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsb.data.rows import Row, with_values
from fedsb.data.tasks.base import NO_LOSS, Example, Question
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.tokens import Tokenizer, start_tokens
from fedsb.utils.errors import UserError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
PROBE = "zebra"  # an answer that no template writes by itself


class Instruction(CausalTask):
    """An answer for a prompt."""

    @property
    def reads(self) -> list[str]:
        return [self.options.prompt]

    @property
    def needs(self) -> list[str]:
        return [*self.reads, self.options.answer]

    def questions(self, rows: list[Row]) -> list[Question]:
        texts = self._texts(rows, self.options.prompt)
        prompts = self.prompts(texts, self.input_texts(rows))
        return [self._question(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]

    @property
    def optional_prompt_columns(self) -> tuple[str, ...]:
        return (self.options.input,)

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """Returns (one example per row, the number of rows that were cut or dropped).

        A row whose prompt alone fills the window is dropped.
        """
        examples: list[Example] = []
        n_cut = 0
        for read, answer in self.tokenize_rows(rows):
            whole = read + answer
            n_cut += len(whole) > self.max_tokens
            if len(read) < self.max_tokens:
                labels = [NO_LOSS] * len(read) + answer
                examples.append({"input_ids": whole[: self.max_tokens], "labels": labels[: self.max_tokens]})
        if rows and not examples:
            raise UserError(f"Every prompt fills the window of {self.max_tokens} tokens. Raise model.max_seq_length.")
        return examples, n_cut

    @property
    def trained_end(self) -> int | None:
        return answer_end(self.tokenizer)

    def stops(self) -> list[str]:
        return stop_texts(self.tokenizer)

    def prompts_and_answers(self, rows: list[Row]) -> tuple[list[str], list[str]]:
        """Returns (prompts, answers) as text. Raises UserError if a column has a value that is not text."""
        return self._texts(rows, self.options.prompt), self._texts(rows, self.options.answer)

    def input_texts(self, rows: list[Row]) -> list[str]:
        """Returns the input of each row, "" for a row without one. Raises UserError if it is not text."""
        column = self.options.input
        if column in self.needs:
            return [""] * len(rows)
        return self._texts([with_values(row, {column: row.get(column) or ""}) for row in rows], column)

    def tokenize_rows(self, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
        """Returns, for each row, the tokens that the model reads and those that it should write, uncut."""
        prompts, answers = self.prompts_and_answers(rows)
        inputs = self.input_texts(rows)
        texts = ([self.encoder.as_text(text) for text in column] for column in (prompts, answers, inputs))
        written = self.encoder.tokenize([answer_text(self.tokenizer, *each) for each in zip(*texts, strict=True)])
        return list(zip(self.prompts(prompts, inputs), written, strict=True))

    def prompts(self, prompts: list[str], inputs: list[str]) -> list[list[int]]:
        """Returns the tokens that the model reads for each prompt and its input."""
        # A chat template writes the begin token itself.
        start = [] if self.tokenizer.chat_template else start_tokens(self.tokenizer)
        texts = ([self.encoder.as_text(text) for text in column] for column in (prompts, inputs))
        whole = [prompt_text(self.tokenizer, *each) for each in zip(*texts, strict=True)]
        return [start + prompt for prompt in self.encoder.tokenize(whole)]


def prompt_text(tokenizer: Tokenizer, prompt: str, input: str = "") -> str:
    """Returns what the model reads before it answers, in training and in use. Tokenise it without special tokens.

    `input` is the text that the prompt is about, if there is one.
    """
    if not tokenizer.chat_template:
        return ALPACA_INPUT.format(prompt=prompt, input=input) if input else ALPACA.format(prompt=prompt)
    return from_template(tokenizer, [_user_turn(prompt, input)], prompt=True)


def answer_text(tokenizer: Tokenizer, prompt: str, answer: str, input: str = "") -> str:
    """Returns what the model should write after `prompt_text`, including the end token.

    Raises UserError if there is no end token, or if the chat template's answer does not follow its own prompt.
    """
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has no end token, so an answer cannot end. Set its eos_token.")
        return f"{_space(tokenizer)}{answer}{tokenizer.eos_token}"
    turns = [_user_turn(prompt, input), {"role": "assistant", "content": answer}]
    whole = from_template(tokenizer, turns, prompt=False)
    before = prompt_text(tokenizer, prompt, input)
    if not whole.startswith(before):
        raise UserError(
            f"the chat template gives {whole[-60:]!r} as answer, which does not follow the prompt {before[-60:]!r}. "
            "Give the tokenizer a chat_template whose prompt is the start of the whole text."
        )
    return whole[len(before) :].rstrip()  # the model does not write the newline after the end-of-turn token


def _user_turn(prompt: str, input: str) -> dict[str, str]:
    return {"role": "user", "content": f"{prompt}\n\n{input}" if input else prompt}


def from_template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None, *, prompt: bool
) -> str:
    """Returns a conversation as the chat template writes it; with `prompt`, up to the start of an answer.

    Raises UserError if the template refuses the conversation.
    """
    more = {"tools": tools} if tools else {}
    turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **more))
    except Exception as error:  # a template may raise anything, mostly jinja2's TemplateError
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses a conversation with the roles {roles or 'none'}: {error}"
        ) from error


def _after_answer(tokenizer: Tokenizer) -> str:
    """Returns the text that follows every answer in training: the end token, or what the chat template writes."""
    if not tokenizer.chat_template:
        return answer_text(tokenizer, "a", PROBE).partition(PROBE)[2]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        whole = from_template(tokenizer, turns, prompt=False)
    except UserError:  # some templates need a system turn
        whole = from_template(tokenizer, [{"role": "system", "content": "a"}, *turns], prompt=False)
    return whole.partition(PROBE)[2].rstrip()


def answer_end(tokenizer: Tokenizer) -> int | None:
    """Returns the token that ends every answer in training; None if the chat template writes none after it."""
    tail = _after_answer(tokenizer)
    if not tail.strip():
        return None  # nothing follows the answer's text
    last = int(tokenizer(PROBE + tail, add_special_tokens=False, verbose=False)["input_ids"][-1])
    return last if last in special_tokens(tokenizer) | {tokenizer.eos_token_id} else None


def stop_texts(tokenizer: Tokenizer) -> list[str]:
    """Returns the texts at which an answer is cut if no end token ended it."""
    if not tokenizer.chat_template:
        return ["### Instruction:"]
    tail = _after_answer(tokenizer).strip()
    return [tail] if tail else []


def special_tokens(tokenizer: Tokenizer) -> set[int]:
    """Returns the ids of the special tokens."""
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _space(tokenizer: Tokenizer) -> str:
    """Returns what separates prompt and answer: a space, or nothing if the tokenizer starts every text with one."""
    return "" if tokenizer.tokenize("a")[0].startswith("▁") else " "
