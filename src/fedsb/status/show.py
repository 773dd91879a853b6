"""The state as text for a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from fedsb.status import words
from fedsb.status.files import Json
from fedsb.terminal import PLAIN

WATCH_SECONDS = 2.0


def show(state: Json, *, as_json: bool = False) -> None:
    """Prints the state once, for people or as JSON."""
    console = _console()
    if as_json:
        console.out(json.dumps(state, indent=1), highlight=False)
    else:
        console.print(view(state))


def watch(read: Callable[[], Json], *, as_json: bool = False) -> None:
    """Shows the state again and again, until Ctrl-C; as JSON, one line each time."""
    console = _console()
    if as_json or not console.is_terminal:
        while True:
            state = read()
            if as_json:
                console.out(json.dumps(state), highlight=False)
            else:
                console.print(view(state), Text(""))
            time.sleep(WATCH_SECONDS)
    with Live(view(read()), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(view(read()), refresh=True)


def view(state: Json) -> Group:
    """All of it, as rich prints it."""
    federation = state["federation"]
    parts: list[RenderableType] = [Text(words.headline(state), style="bold")]
    if state["kind"] == "coordinator":
        parts.append(Text(f"federation {federation['id']}, which sites reach at {federation['address']}"))
        parts += _pairs(words.facts(state)) + _table(words.site_rows(state))
        parts += _lines("dropped", words.dropped_lines(state))
    else:
        parts.append(Text(f"site {state['site']} of federation {federation['id']}"))
        parts += _pairs({**words.facts(state), **words.site_facts(state)})
        parts += _table(words.run_rows(state)) + _table(words.outbox_rows(state))
    return Group(
        *parts,
        *_table(words.process_rows(state)),
        *_lines("lately", words.trouble_lines(state)),
        *_health(state["health"]),
    )


def _health(health: Json) -> list[RenderableType]:
    styles = {"faults": "red", "silence": "red", "warnings": "yellow"}
    lines = [Text(f"{kind}: {line}", style=style) for kind, style in styles.items() for line in health[kind]]
    return [Text(""), *(lines or [Text("all is well")])]


def _table(rows: Sequence[words.Row]) -> list[RenderableType]:
    if not rows:
        return []
    table = Table(*(Column(heading, overflow="fold") for heading in rows[0]), **PLAIN)
    for row in rows:
        table.add_row(*(Text(words.plain(cell)) for cell in row.values()))
    return [Text(""), table]


def _pairs(pairs: words.Row) -> list[RenderableType]:
    table = Table(show_header=False, **PLAIN)
    for name, text in pairs.items():
        table.add_row(Text(f"  {name}"), Text(text))
    return [table] if pairs else []


def _lines(name: str, lines: Sequence[str]) -> list[RenderableType]:
    return [Text(f"\n{name}"), *(Text(f"  {line}") for line in lines)] if lines else []


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)
