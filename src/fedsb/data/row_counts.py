"""Counts over the rows of a table: empty texts, repeated rows, contradictory labels, special tokens."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from fedsb.data.rows import Row, place_of
from fedsb.data.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """The findings of one pass over the rows of a table."""

    empty: int  # rows with an empty text
    empty_at: str | None  # the file and line of the first one
    duplicates: int  # rows that repeat an earlier row, with the same target
    contradictions: int  # rows that repeat the text of an earlier row, with a different class
    special: int  # rows with the text of a special token


def text_keys(task: Task, rows: Sequence[Row], columns: Sequence[str]) -> list[Hashable]:
    """Returns what the model reads of each row, as a key. `columns` are those that the task reads, the target last."""
    texts = _text_columns(columns)
    optional = task.optional_prompt_columns
    return [(*(_key(row[name]) for name in texts), *(_key(row.get(name) or "") for name in optional)) for row in rows]


def count_rows(task: Task, rows: Sequence[Row], columns: Sequence[str]) -> RowCounts:
    """Returns the counts of the rows. `columns` are those that the task reads, the target last."""
    duplicates = contradictions = 0
    targets: dict[Hashable, Hashable] = {}  # the target of the first row with a text
    for key, row in zip(text_keys(task, rows, columns), rows, strict=True):
        target = _key(row[columns[-1]]) if len(columns) > 1 else None
        if key not in targets:
            targets[key] = target
        elif targets[key] == target:
            duplicates += 1
        else:
            contradictions += 1
    texts = [[text for name in _text_columns(columns) for text in _texts_in(row[name])] for row in rows]
    empty = [i for i, found in enumerate(texts) if not all(text.strip() for text in found)]
    return RowCounts(
        empty=len(empty),
        empty_at=place_of(rows[empty[0]], empty[0] + 1) if empty else None,
        duplicates=duplicates,
        contradictions=contradictions if task.classes else 0,
        special=sum(any(map(task.encoder.has_special, found)) for found in texts),
    )


def _text_columns(columns: Sequence[str]) -> Sequence[str]:
    return columns[:-1] if len(columns) > 1 else columns


def _key(value: Any) -> Hashable:
    """Returns a key that equal cells have in common."""
    return value if isinstance(value, str | int | None) else json.dumps(value, sort_keys=True, default=str)


def _texts_in(value: Any) -> list[str]:
    """Returns the texts of a cell: the cell itself, or the contents of its messages."""
    if isinstance(value, str):
        return [value]
    turns = value if isinstance(value, list) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict) and not turn.get("tool_calls")]
    return [content for content in contents if isinstance(content, str)]
