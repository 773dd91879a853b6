"""The language checker reports bad examples and accepts good ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.language import findings, main, markdown_findings, phrases, python_findings, renamed_settings

BAD = {
    "{path} is no TOML": "is no TOML",
    "The weights are not at hand.": "at hand",
    "Averaged updates can tell of the rows.": "tell",
    "The keys are in the folder beside it.": "beside",
    "Take it up with `fedsb resume`": "Take it up",
    "Resume behind its last round": "behind",
    "So many rows": "So many",
    "Bytes a layer": "Bytes a layer",
    "# The folder is\n# there.": "is # there",
    "1.2 nats a token": "nats a token",
}
GOOD = (
    "There is no file {path}. Did you mean {near}?",
    "It is no longer valid.",
    "The server is behind a TCP proxy.",
    "The bound holds for every sequence of messages.",
    "The rows a client sends per round.",
)


@pytest.mark.parametrize(("text", "phrase"), BAD.items())
def test_a_banned_phrase(text: str, phrase: str) -> None:
    assert [found[1] for found in phrases(text)] == [phrase]


@pytest.mark.parametrize("text", GOOD)
def test_an_allowed_phrase(text: str) -> None:
    assert list(phrases(text)) == []


@pytest.mark.parametrize(
    ("docstring", "is_reported"),
    [
        ("Returns the rows sampled in this step.", False),
        ("Of each row, its length.", True),
        ("The length of each row.", True),
        ("What the row means.", True),
        ("`x` -> y", True),
    ],
)
def test_a_docstring_of_a_function_starts_with_a_verb(docstring: str, is_reported: bool) -> None:
    source = f'def f():\n    """{docstring}"""\n'
    assert bool(list(python_findings(source))) == is_reported
    assert (
        list(python_findings('class C:\n    @property\n    def f(self):\n        """The length of each row."""')) == []
    )
    assert list(python_findings('class C:\n    """A row."""')) == []
    assert list(python_findings('def f():\n    """Print it."""', commands=True)) == []


def test_the_line_of_a_finding() -> None:
    source = 'x = 1\n\n\ndef f():\n    raise ValueError(\n        f"{x} is no run at all"\n    )\n'
    assert list(python_findings(source)) == [(6, "is no run", "is not a (valid) ..., does not ...")]


def test_old_names_and_missing_files_in_markdown() -> None:
    text = "`Promise`, `State.common` and\n`train.steps`; `methods/fed_sb.py`, `federation/link.py`, a common word"
    found = [(line, phrase) for line, phrase, _ in markdown_findings(text, renamed_settings())]
    assert found == [(1, "Promise"), (1, "common"), (2, "train.steps"), (2, "federation/link.py")]


def test_settings_are_checked_in_their_comments_only(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "is no run"\nx = 1  # at hand\n')
    assert [found[:2] for found in findings(path)] == [(2, "at hand")]


def test_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Makefile"]) == 0
    assert capsys.readouterr().out == ""
