"""A prompt and its answer: next-token loss on the answer and the end token only.

Reads the columns prompt and answer, and input where the table has it (Taori et al., "Stanford Alpaca", 2023). The
prompt is the chat template's where the tokenizer has one, with the input behind an empty line in the user's turn; else
Alpaca's, with or without an input. Prompt and answer are tokenised apart and joined, so the tokens that a model sees
when it generates are an exact prefix of those it was trained on. Special tokens in a row's text are read as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsb.data.rows import Row, with_values
from fedsb.data.tasks.base import NO_LOSS, Example, Question, Tokenizer, start_tokens
from fedsb.data.tasks.causal import CausalTask
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
    """The answer to a prompt."""

    @property
    def reads(self) -> list[str]:
        return [self.options.prompt]

    @property
    def needs(self) -> list[str]:
        return [*self.reads, self.options.answer]

    def questions(self, rows: list[Row]) -> list[Question]:
        asked = self._texts(rows, self.options.prompt)
        prompts = self.prompts(asked, self.given(rows))
        return [self._question(text, prompt) for text, prompt in zip(asked, prompts, strict=True)]

    @property
    def prompt_also(self) -> tuple[str, ...]:
        return (self.options.input,)

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """One example a row, fewer where a prompt alone fills the window: those rows are dropped.

        The second number counts the dropped rows and those whose answer was cut.
        """
        examples: list[Example] = []
        n_cut = 0
        for read, answer in self.tokens(rows):
            whole = read + answer
            n_cut += len(whole) > self.max_tokens
            if len(read) < self.max_tokens:
                labels = [NO_LOSS] * len(read) + answer
                examples.append({"input_ids": whole[: self.max_tokens], "labels": labels[: self.max_tokens]})
        if rows and not examples:
            raise UserError(f"every prompt fills the window of {self.max_tokens} tokens. Raise model.max_seq_length.")
        return examples, n_cut

    @property
    def trained_end(self) -> int | None:
        return answer_end(self.tokenizer)

    def stops(self) -> list[str]:
        return stop_texts(self.tokenizer)

    def pairs(self, rows: list[Row]) -> tuple[list[str], list[str]]:
        """(prompts, answers), as text. Raises UserError where a column holds none."""
        return self._texts(rows, self.options.prompt), self._texts(rows, self.options.answer)

    def given(self, rows: list[Row]) -> list[str]:
        """The input of each row, "" where it has none. Raises UserError where it is not text."""
        column = self.options.input
        if column in self.needs:
            return [""] * len(rows)
        return self._texts([with_values(row, {column: row.get(column) or ""}) for row in rows], column)

    def tokens(self, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
        """For each row, what the model reads and what it should write, uncut."""
        asked, told = self.pairs(rows)
        given = self.given(rows)
        texts = ([self.as_text(text) for text in column] for column in (asked, told, given))
        answers = self._tokenize([answer_text(self.tokenizer, *of) for of in zip(*texts, strict=True)])
        return list(zip(self.prompts(asked, given), answers, strict=True))

    def prompts(self, asked: list[str], given: list[str]) -> list[list[int]]:
        """Returns the tokens that the model reads of each prompt and its input."""
        # A chat template writes the begin token itself.
        start = [] if self.tokenizer.chat_template else start_tokens(self.tokenizer)
        texts = ([self.as_text(text) for text in column] for column in (asked, given))
        whole = [prompt_text(self.tokenizer, *of) for of in zip(*texts, strict=True)]
        return [start + prompt for prompt in self._tokenize(whole)]


def prompt_text(tokenizer: Tokenizer, prompt: str, given: str = "") -> str:
    """What the model reads before it answers, in training and in use; tokenise it without special tokens.

    `given` is the input that the prompt is about, where there is one.
    """
    if not tokenizer.chat_template:
        return ALPACA_INPUT.format(prompt=prompt, input=given) if given else ALPACA.format(prompt=prompt)
    return from_template(tokenizer, [_user_turn(prompt, given)], prompt=True)


def answer_text(tokenizer: Tokenizer, prompt: str, answer: str, given: str = "") -> str:
    """What the model should write after `prompt_text`, its end token included.

    Raises UserError: no end token, or a chat template whose answer does not follow its own prompt.
    """
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no end token: set its eos_token, so that an answer can end")
        return f"{_space(tokenizer)}{answer}{tokenizer.eos_token}"
    told = [_user_turn(prompt, given), {"role": "assistant", "content": answer}]
    whole = from_template(tokenizer, told, prompt=False)
    before = prompt_text(tokenizer, prompt, given)
    if not whole.startswith(before):
        raise UserError(
            f"the chat template gives {whole[-60:]!r} as answer, which does not follow the prompt {before[-60:]!r}: "
            "give the tokenizer a chat_template whose prompt is the head of the whole"
        )
    return whole[len(before) :].rstrip()  # the line's end after the end-of-turn token is not the model's to write


def _user_turn(prompt: str, given: str) -> dict[str, str]:
    return {"role": "user", "content": f"{prompt}\n\n{given}" if given else prompt}


def from_template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None, *, prompt: bool
) -> str:
    """Returns a conversation as the chat template writes it; with `prompt`, up to the start of an answer.

    Raises UserError where the template refuses the conversation.
    """
    more = {"tools": tools} if tools else {}
    turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **more))
    except Exception as error:  # a template raises what it likes, mostly jinja2's TemplateError
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses a conversation of the roles {roles or 'none'}: {error}") from error


def _after_answer(tokenizer: Tokenizer) -> str:
    """Returns the text that follows every answer in training: the end token, or what the chat template writes."""
    if not tokenizer.chat_template:
        return answer_text(tokenizer, "a", PROBE).partition(PROBE)[2]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        whole = from_template(tokenizer, turns, prompt=False)
    except UserError:  # some templates ask for a system turn
        whole = from_template(tokenizer, [{"role": "system", "content": "a"}, *turns], prompt=False)
    return whole.partition(PROBE)[2].rstrip()


def answer_end(tokenizer: Tokenizer) -> int | None:
    """Returns the token that ends every answer in training, None where the chat template writes none after it."""
    tail = _after_answer(tokenizer)
    if not tail.strip():
        return None  # the answer's own text is the last
    last = int(tokenizer(PROBE + tail, add_special_tokens=False, verbose=False)["input_ids"][-1])
    return last if last in special_tokens(tokenizer) | {tokenizer.eos_token_id} else None


def stop_texts(tokenizer: Tokenizer) -> list[str]:
    """Returns the texts at which an answer is cut that no end token ended."""
    if not tokenizer.chat_template:
        return ["### Instruction:"]
    tail = _after_answer(tokenizer).strip()
    return [tail] if tail else []


def special_tokens(tokenizer: Tokenizer) -> set[int]:
    """Ids of tokens that are no text."""
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _space(tokenizer: Tokenizer) -> str:
    """Between prompt and answer: a space, or nothing where the tokenizer opens every text with one (SentencePiece)."""
    return "" if tokenizer.tokenize("a")[0].startswith("▁") else " "
