"""The state as text for a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fedsb.deployment.monitoring import formatting as words
from fedsb.reporting.terminal import PLAIN
from fedsb.utils.formatting import GLUE, Json

WATCH_SECONDS = 2.0
STYLES = {"faults": "red", "silence": "red", "warnings": "yellow"}


def show(state: Json, *, as_json: bool = False, indent: int | None = 1) -> None:
    """Prints the state once, for people or as JSON."""
    if as_json:
        _console().out(json.dumps(state, indent=indent), highlight=False)
    else:
        _console().print(view(state))


def watch(read: Callable[[], Json], *, as_json: bool = False) -> None:
    """Shows the state again and again, until Ctrl-C; as JSON, one line each time."""
    while True:
        state = read()
        if not as_json:
            _console().clear()  # nothing, where this is no terminal
        show(state, as_json=as_json, indent=None)
        time.sleep(WATCH_SECONDS)


def view(state: Json) -> Group:
    """All of it, as rich prints it."""
    parts: list[RenderableType] = [_text(words.headline(state), "bold"), _text(words.whose(state))]
    for title, content in words.sections(state):
        parts += _section(title, content)
    notes = [_text(f"{kind}: {line}", style) for kind, style in STYLES.items() for line in state["health"][kind]]
    return Group(*parts, _text(""), *(notes or [_text("all is well")]))


def _section(title: str, content: words.Row | list[words.Row] | list[str]) -> list[RenderableType]:
    if isinstance(content, dict):
        table = Table(show_header=False, **PLAIN)
        for name, text in content.items():
            table.add_row(_text(f"  {name}"), _text(text))
        return [table]
    if isinstance(content[0], str):
        return [_text(f"\n{title.lower()}"), *(_text(f"  {line}") for line in content)]
    table = Table(*(Column(heading, overflow="fold") for heading in content[0]), **PLAIN)
    for row in content:
        table.add_row(*map(_text, row.values()))
    return [_text(""), table]


def _text(text: str, style: str = "") -> Text:
    """As it is, with spaces that may break over a line."""
    return Text(text.replace(GLUE, " "), style=style)


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)
