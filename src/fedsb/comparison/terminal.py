"""Prints a comparison in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsb.comparison.table import byte_table, notes, score_table
from fedsb.reporting.terminal import plain_console, print_table


def print_comparison(folder: Path, found: dict[str, Any]) -> None:
    """Prints the scores, the bytes and the notes of a comparison, and where its files are."""
    console = plain_console(soft_wrap=True)
    console.print(f"\n{found['name']}:\n")
    for table in (score_table(found), byte_table(found)):
        print_table(table)
        console.print()
    for line in notes(found):
        console.print(f"  {line}")
    console.print(f"\n  page            {folder / 'comparison.html'}")
    console.print(f"  data            {folder / 'comparison.json'}, {folder / 'cells.json'}")
