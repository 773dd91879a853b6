"""Next-token on plain text: every token but the first of a window is a target.

Reads the column text. A text is cut into consecutive windows of max_tokens, without overlap and with nothing lost
but a last window of one token; each window opens with the begin token where the tokenizer has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedsb.data.rows import Row, place_of
from fedsb.data.tasks.base import NO_LOSS, Example, Question, check_share, start_tokens
from fedsb.data.tasks.causal import CausalTask
from fedsb.utils.errors import BadRowError

NEAR = 0.1  # of a text: how far from the wanted cut a line's end may lie


class Text(CausalTask):
    """The next token of plain text."""

    @property
    def reads(self) -> list[str]:
        return [self.options.text]

    @property
    def needs(self) -> list[str]:
        return self.reads

    def questions(self, rows: list[Row]) -> list[Question]:
        """Returns each text as a prompt to go on from."""
        texts, start = self._texts(rows, self.options.text), start_tokens(self.tokenizer)
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
            if not text.strip():
                place = place_of(row, number)
                raise BadRowError(f"{place}: the column {self.options.text!r} has no text to continue from")
        prompts = self._tokenize(texts, plain=True)
        return [self._question(text, start + prompt) for text, prompt in zip(texts, prompts, strict=True)]

    def encode(self, rows: list[Row]) -> tuple[list[Example], int]:
        """The windows of all rows in order; no text is lost, so the second number is 0."""
        return [{"input_ids": w, "labels": [NO_LOSS, *w[1:]]} for windows in self._windows(rows) for w in windows], 0

    def cut_in_pieces(self, rows: list[Row]) -> int:
        return sum(len(windows) > 1 for windows in self._windows(rows))

    def hold_out(self, rows: list[Row], share: float, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
        """Holds out the tail of every text, for clients have few, long texts; nothing is drawn."""
        return self.split_tail(rows, share)

    def split_tail(self, rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
        """(heads, tails): each text cut near its last `share`, at a line's end, else between words.

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
        """Returns the windows of each row, of two tokens or more."""
        start = start_tokens(self.tokenizer)
        step = self.max_tokens - len(start)
        for tokens in self._tokenize(self._texts(rows, self.options.text), plain=True):
            windows = (start + tokens[at : at + step] for at in range(0, len(tokens), step))
            yield [window for window in windows if len(window) >= 2]


def _cut(text: str, wanted: int) -> int:
    """The place after a line's end (near `wanted`) or after a space, nearest to it; len(text) where there is none."""
    for mark, reach in (("\n", NEAR * len(text)), (" ", len(text))):
        places = [text.rfind(mark, 0, wanted) + 1, text.find(mark, wanted) + 1]
        fit = [at for at in places if abs(at - wanted) <= reach and text[:at].strip() and text[at:].strip()]
        if fit:
            return min(fit, key=lambda at: abs(at - wanted))
    return len(text)
