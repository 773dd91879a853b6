"""Prints the state of a coordinator or a site in a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fedsb.deployment.monitoring import formatting
from fedsb.reporting.terminal import PLAIN
from fedsb.utils.formatting import GLUE, Json

WATCH_SECONDS = 2.0
STYLES = {"faults": "red", "silence": "red", "warnings": "yellow"}


def show(state: Json, *, as_json: bool = False, indent: int | None = 1) -> None:
    """Prints the state once, as text or as JSON."""
    if as_json:
        _console().out(json.dumps(state, indent=indent), highlight=False)
    else:
        _console().print(view(state))


def watch(read: Callable[[], Json], *, as_json: bool = False) -> None:
    """Prints the state every two seconds until Ctrl-C. As JSON, each is one line."""
    while True:
        state = read()
        if not as_json:
            _console().clear()  # does nothing if stdout is not a terminal
        show(state, as_json=as_json, indent=None)
        time.sleep(WATCH_SECONDS)


def view(state: Json) -> Group:
    """Returns the whole state as a rich renderable."""
    parts: list[RenderableType] = [_text(formatting.headline(state), "bold"), _text(formatting.owner(state))]
    for title, content in formatting.sections(state):
        parts += _section(title, content)
    notes = [_text(f"{kind}: {line}", style) for kind, style in STYLES.items() for line in state["health"][kind]]
    return Group(*parts, _text(""), *(notes or [_text("no problems")]))


def _section(title: str, content: formatting.Row | list[formatting.Row] | list[str]) -> list[RenderableType]:
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
    """Returns a text with ordinary spaces, at which a line can break."""
    return Text(text.replace(GLUE, " "), style=style)


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)
