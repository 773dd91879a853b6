"""Grades written answers: numbers by value, choices by name. math_check.py grades mathematics.

An answer follows the last "The answer is:", as MetaMathQA writes it (Yu et al., "MetaMath", arXiv 2309.12284). A gold
answer of GSM8K follows "####" (Cobbe et al., arXiv 2110.14168), one of MATH is in the last \\boxed{} (Hendrycks et al.,
arXiv 2103.03874). An answer that cannot be read is wrong. Nothing is rounded or scaled.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

ANSWER = "The answer is:"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An extracted answer, and whether it is correct."""

    right: bool
    extracted: str | None  # None: the text has no answer
    fault: str | None = None  # why it could not be graded; such an answer counts as wrong


def last_answer(text: str) -> str | None:
    """Returns the text after the last "The answer is:", up to an empty line; None if there is none."""
    _, found, after = text.rpartition(ANSWER)
    return (after.strip().split("\n\n")[0].strip() or None) if found else None


def after_hashes(text: str) -> str | None:
    """Returns GSM8K's gold answer: the text after the last "####"; None if there is none."""
    _, found, after = text.rpartition("####")
    return (after.strip() or None) if found else None


def last_boxed(text: str) -> str | None:
    """Returns the content of the last \\boxed{}, with inner braces; None if there is none or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    inside = start + len("\\boxed{")
    depth, skip = 1, False
    for at, letter in enumerate(text[inside:], start=inside):
        if skip or letter == "\\":  # \{ is a printed brace
            skip = not skip
            continue
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[inside:at].strip() or None
    return None


def grade_number(gold: str, text: str) -> Verdict:
    """Compares the text's answer with the gold's exact value. Raises ValueError for a gold that is not a number."""
    value, answer = as_number(gold), last_answer(text)
    if value is None:
        raise ValueError(f"the gold answer {gold!r} is not a single number")
    line = None if answer is None else answer.split("\n")[0].strip()
    return Verdict(right=line is not None and as_number(line) == value, extracted=line)


def grade_choice(gold: str, text: str, names: Sequence[str]) -> Verdict:
    """Compares the first of the `names` in the text, as a word in any case, with the gold."""
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, names))})\b", text, re.IGNORECASE)
    chosen = None if found is None else found.group().lower()
    return Verdict(right=chosen == gold, extracted=chosen)


# --- numbers ---

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_ONE_NUMBER = re.compile(
    rf"(?P<before>(?:[^0-9<>≤≥±√^*/+]*[\s=:(])?)(?P<sign>[-+]?)"
    rf"(?P<whole>[0-9]+\s+(?=[0-9]+\s*/))?(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?"
    r"(?P<after>(?:[^0-9^*/+=<>!:√²³][^0-9^*+=<>!√]*)?|/[^\W0-9][^0-9^*+=<>!√]*)"
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LAYOUT = r"\\(?:text|textbf|mathrm|mathbf|boxed|left|right|quad|displaystyle)(?![A-Za-z])"


def as_number(text: str) -> Fraction | None:
    """Returns the value of a text with one number and at most words, currency, a unit or % around it; else None.

    "$1,080.50 a day." is 1080.5, "-3/4" and "\\frac{-3}{4}" and "1 1/2" are fractions, "50%" is 50, "1.2 million" is
    1200000. Two numbers, a formula, or misplaced thousands separators give None: nothing is guessed.
    """
    line = _plain(text.strip().split("\n")[0])
    found = _ONE_NUMBER.fullmatch(line)
    if found is None or "\\" in line or len(line) > 200:
        return None
    before, sign, whole, top, bottom, after = found.group("before", "sign", "whole", "top", "bottom", "after")
    if before.rstrip().endswith("-"):
        return None  # "x - 5" is a difference, "- 5" alone a negative number
    if re.match(r"[kK]\b", after):
        return None  # "5k" may be a unit or thousands
    value = Fraction(top.replace(",", ""))
    if bottom is not None:
        below = Fraction(bottom.replace(",", ""))
        if below == 0:
            return None
        value /= below
    value += int(whole or 0)
    scale = re.match(rf"\s*({'|'.join(_SCALES)})s?\b", after, re.IGNORECASE)
    if scale is not None:
        value *= _SCALES[scale.group(1).lower()]
    return -value if sign == "-" else value


def _plain(text: str) -> str:
    """Returns a number without typesetting: LaTeX fractions and spaces, currency, emphasis, exponents of units."""
    text = "".join(_vulgar(letter) for letter in text).replace("\u2212", "-")
    text = re.sub(r"\{,\}", ",", text)
    text = re.sub(r"(?<=[0-9])\\[,!](?=[0-9])", "", text)
    text = re.sub(r"\\[,!;: ]", " ", text)
    text = re.sub(r"-\s*\\[dt]?frac", r"-\\frac", text)
    text = re.sub(r"\\[dt]?frac\s*\{\s*(-?)([0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}", r" \1\2/\3 ", text)
    text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])", r" \1/\2 ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)
    text = re.sub(r"\\?([$€£¥%])", r"\1", text)
    text = re.sub(r"([-+])\s*[$€£¥]\s*", r"\1", text)
    text = re.sub(rf"[$€£¥{{}}]|\*\*|\\[()\[\]]|{_LAYOUT}", " ", text)
    text = re.sub(r"(?<=[A-Za-z])\s*\^\s*[0-9](?![0-9])", "", text)  # cm^2
    text = re.sub(r"(?<=[A-Za-z])[²³]", "", text)
    return re.sub(r"^([-+])\s+", r"\1", text.strip())


def _vulgar(letter: str) -> str:
    """Returns " 1/2" for "½", and any other letter unchanged."""
    made = unicodedata.decomposition(letter)
    return (
        " " + unicodedata.normalize("NFKC", letter).replace("\u2044", "/") if made.startswith("<fraction>") else letter
    )
