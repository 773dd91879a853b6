"""Next-token loss on plain text: every token but the first of a window is a target.

Reads the column text. A text is cut into consecutive windows of max_tokens, without overlap. Nothing is lost except a
last window of one token. Each window starts with the begin token if the tokenizer has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedsb.data.rows import Row, place_of
from fedsb.data.tasks.base import NO_LOSS, Example, Question, check_share
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.tokens import start_tokens
from fedsb.utils.errors import BadRowError

NEAR = 0.1  # the largest distance of a line's end from the desired cut, as a fraction of the text


class Text(CausalTask):
    """The next token of plain text."""

    @property
    def reads(self) -> list[str]:
        return [self.options.text]

    @property
    def needs(self) -> list[str]:
        return self.reads

    def questions(self, rows: list[Row]) -> list[Question]:
        """Returns each text as a prompt to continue."""
        texts, start = self._texts(rows, self.options.text), start_tokens(self.tokenizer)
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
            if not text.strip():
                place = place_of(row, number)
                raise BadRowError(f"{place}: the column {self.options.text!r} has no text to continue from.")
        prompts = self.encoder.tokenize(texts, plain=True)
        return [self._question(text, start + prompt) for text, prompt in zip(texts, prompts, strict=True)]

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """Returns (the windows of all rows in order, 0): no text is lost."""
        return [{"input_ids": w, "labels": [NO_LOSS, *w[1:]]} for windows in self._windows(rows) for w in windows], 0

    def count_split_rows(self, rows: list[Row]) -> int:
        return sum(len(windows) > 1 for windows in self._windows(rows))

    def hold_out(self, rows: list[Row], share: float, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
        """Splits off the tail of every text, because clients have few, long texts. Nothing is drawn."""
        return self.split_tail(rows, share)

    def split_tail(self, rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
        """Returns (heads, tails): each text is cut near its last `share`, at a line's end or else between words.

        A text without such a place stays whole in training.
        """
        check_share(share)
        if share == 0:
            return rows, []
        column = self.options.text
        heads: list[Row] = []
        tails: list[Row] = []
        for row, text in zip(rows, self._texts(rows, column), strict=True):
            cut = _cut(text, round((1 - share) * len(text)))
            heads.append(row | {column: text[:cut]})
            if cut < len(text):
                tails.append(row | {column: text[cut:]})
        return heads, tails

    def _windows(self, rows: list[Row]) -> Iterator[list[list[int]]]:
        """Yields the windows of each row, of two tokens or more."""
        start = start_tokens(self.tokenizer)
        step = self.max_tokens - len(start)
        for tokens in self.encoder.tokenize(self._texts(rows, self.options.text), plain=True):
            windows = (start + tokens[at : at + step] for at in range(0, len(tokens), step))
            yield [window for window in windows if len(window) >= 2]


def _cut(text: str, target: int) -> int:
    """Returns the nearest place after a line's end (close to `target`) or after a space; else len(text)."""
    for mark, reach in (("\n", NEAR * len(text)), (" ", len(text))):
        places = [text.rfind(mark, 0, target) + 1, text.find(mark, target) + 1]
        fit = [at for at in places if abs(at - target) <= reach and text[:at].strip() and text[at:].strip()]
        if fit:
            return min(fit, key=lambda at: abs(at - target))
    return len(text)
