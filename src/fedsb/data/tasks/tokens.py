"""Tokenises the text of rows, whose special tokens must be read as ordinary text, and of templates, whose must not."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, cast

Tokenizer = Any  # a transformers tokenizer, which has no types
MARK = "\U0010fffd"  # encloses the id of a special token that a row's text contains; see TextEncoder.as_text


class TextEncoder:
    """Tokenises texts that may contain special tokens, from a template or from a row."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> dict[str, int]:
        """The tokenizer's special tokens, as a text contains them, with their ids; the longest first."""
        found = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Matches a special token; nothing if there are none."""
        return re.compile("|".join(map(re.escape, self.special)) or r"(?!)")

    def has_special(self, text: str) -> bool:
        """Returns whether a text contains what this tokenizer would read as a special token."""
        return self._special_pattern.search(text) is not None

    def as_text(self, text: str) -> str:
        """Returns a row's text with its special tokens marked, so that `tokenize` reads them as ordinary text.

        Use it for a text that is inserted between a template's own special tokens.
        """
        return self._special_pattern.sub(lambda found: f"{MARK}{self.special[found.group()]}{MARK}", text)

    def tokenize(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """Returns the tokens of each text, uncut, without special tokens around it.

        Special tokens in a text are recognised, except those that `as_text` marked; with `plain` none is.
        """
        if not texts:
            return []
        made = self.tokenizer(texts, add_special_tokens=False, verbose=False, split_special_tokens=plain)
        found = cast(list[list[int]], list(made["input_ids"]))
        for position, text in enumerate(texts):
            if MARK in text and not plain:
                found[position] = self._tokenize_marked(text)
        return found

    def _tokenize_marked(self, text: str) -> list[int]:
        names = {number: name for name, number in self.special.items()}
        tokens: list[int] = []
        at = 0
        for found in [*self._special_pattern.finditer(text), None]:
            piece = text[at : found.start() if found else None]
            # a row's own text may contain such marks: an id that is not a special token stays as it is
            piece = re.sub(f"{MARK}(\\d{{1,9}}){MARK}", lambda mark: names.get(int(mark[1]), mark[0]), piece)
            tokens += self.tokenize([piece], plain=True)[0] if piece else []
            if found:
                tokens.append(self.special[found.group()])
                at = found.end()
        return tokens


def pad_token(tokenizer: Tokenizer) -> int:
    """Returns the pad token, else the end token, else 0. Any token does, because the attention mask hides it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """Returns the begin-of-text token of a tokenizer that has one, else an empty list."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
