"""The data card: what a run's tables contain, in five lines, with what looks wrong in them.

`make_card` is a pure function of the tables and of what encoding them has cost. In a private run nothing is counted on
private rows but what is shown of them anyway: how many there are, and how many are cut or unused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsb.data.names import SHOWN, differ_by_case
from fedsb.data.rows import Row, Table, place_of
from fedsb.data.tasks.base import Task

WARNING = "Warning:"
MANY = 0.05  # a share of rows that is worth a warning
CLASSES_SHOWN = 12
MISSING_LIKE = ("null", "none", "n/a", "na", "<na>", "?", "unknown")  # classes that may be empty cells
MEANT_TO_BE_READ = ("input", "context", "system", "tools", "weight", "weights")  # columns that other tools read


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a pass over the rows of a table finds."""

    empty: int  # rows with an empty text
    empty_at: str | None  # the file and line of the first
    duplicates: int  # rows that repeat an earlier one, with the same target
    contradictions: int  # rows that repeat the text of an earlier one, with a different class
    special: int  # rows with the text of a special token


@dataclass(frozen=True, kw_only=True)
class TableCard:
    """One table. None: not known here, or private."""

    origin: str
    rows: int
    drawn_from: int | None = None  # rows before data.train_rows or data.test_rows drew some
    dropped: int | None = None  # rows that data.exclude left out
    cut: int | None = None  # rows that lose text to model.max_seq_length
    unused: int | None = None  # rows with nothing to learn within model.max_seq_length
    read: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()
    classes: Mapping[str, int] | None = None  # rows of each class, in the classes' order
    counted: Counted | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What a run reads. The counts of a private run's own rows are left out."""

    train: TableCard
    test: TableCard | None
    clients: Mapping[str, int]  # rows of each that takes part
    label_names: tuple[str, ...]
    class_names: tuple[str, ...]  # as label_names, by the names that are shown
    max_tokens: int
    private: bool
    test_in_train: int | None  # test rows whose text is also a training row's; None: not known, or private
    alike: tuple[tuple[str, ...], ...] = field(default=())  # names of classes or of clients that differ by case alone

    def headline(self) -> dict[str, str]:
        """Returns the card in five lines, each with its name."""
        sizes = sorted(self.clients.values())
        of_clients = f"{len(sizes)}, {_span(sizes)} training examples" if sizes else "none"
        return {
            "rows": self._train_line(),
            "classes" if self.label_names else "columns": self._classes_line(),
            "clients": of_clients,
            "test": self._test_line(),
            "length": self._length_line(),
        }

    def warnings(self) -> list[str]:
        """Returns what looks wrong, a sentence or two for each."""
        found: list[str] = []
        for name, table in (("training", self.train), ("test", self.test)):
            if table is not None:
                found += [*table.warnings, *_table_warnings(name, table)]
        forgotten = [name for name in self._not_read() if name.lower() in MEANT_TO_BE_READ]
        if forgotten:
            found.append(
                f"The task does not read the column {', '.join(map(repr, forgotten))}. docs/tasks.md says which "
                "columns each task reads."
            )
        found += self._length_warnings()
        if self.test is not None and self.test_in_train:
            found.append(
                f"{_share(self.test_in_train, self.test.rows, 'test rows')} have a text that is also in the training "
                "rows. The score on them says nothing about new texts. Remove them from one of the tables."
            )
        found += [
            f"{' and '.join(map(repr, group))} differ only by case. Write them the same way if they are the same."
            for group in self.alike[:SHOWN]
        ]
        if len(self.alike) > SHOWN:
            found.append(f"{len(self.alike) - SHOWN} more groups of names differ only by case.")
        return found

    def notes(self) -> list[str]:
        """Returns what is good to know and needs no action."""
        found = [note for table in (self.train, self.test) if table is not None for note in table.notes]
        special = sum(table.counted.special for table in (self.train, self.test) if table and table.counted)
        if special:
            found.append(f"{special:,} rows contain a special token of the tokenizer, which is read as ordinary text.")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Returns the card for JSON, with its five lines, warnings and notes."""
        return {**asdict(self), "headline": self.headline(), "warnings": self.warnings(), "notes": self.notes()}

    def _train_line(self) -> str:
        table = self.train
        more = [f"drawn from {table.drawn_from:,} by the seed"] if table.drawn_from else []
        more += [f"{table.dropped:,} left out by data.exclude"] if table.dropped else []
        return f"{table.rows:,} of {Path(table.origin).name}" + (f" ({', '.join(more)})" if more else "")

    def _classes_line(self) -> str:
        not_read = ", ".join(name or repr(name) for name in self._not_read())
        unread = f"; not read: {not_read}" if not_read else ""
        if not self.label_names:
            return f"read: {', '.join(self.train.read) or 'those of the sites'}{unread}"
        counts = self.train.classes
        labels = zip(self.label_names, self.class_names, strict=True)
        named = [f"{name} {counts[label]:,}" if counts else name for label, name in labels]
        shown = ", ".join(named[:CLASSES_SHOWN])
        more = f" and {len(named) - CLASSES_SHOWN} more" if len(named) > CLASSES_SHOWN else ""
        hidden = " (a private run shows no counts)" if self.private and not counts else ""
        return f"{len(named)}: {shown}{more}{hidden}{unread}"

    def _not_read(self) -> list[str]:
        """The columns of either table that nothing reads."""
        return list(dict.fromkeys([*self.train.not_read, *(self.test.not_read if self.test else ())]))

    def _test_line(self) -> str:
        table = self.test
        if table is None:
            return "none"
        text = f"{table.rows:,} of {Path(table.origin).name}"
        if table.classes:
            name, most = max(table.classes.items(), key=lambda pair: pair[1])
            shown = dict(zip(self.label_names, self.class_names, strict=True)).get(name, name)
            text += f", {shown!r} the most frequent class with {_percent(most, table.rows)}"
        if self.test_in_train:
            text += f", {self.test_in_train:,} also in the training rows"
        return text

    def _length_line(self) -> str:
        cut, unused, rows = self._lengths()
        if cut is None:
            return f"at most {self.max_tokens} tokens a row; how many are cut is not known here"
        text = f"{_share(cut, rows, 'rows')} longer than {self.max_tokens} tokens"
        return text + (f", {unused:,} ({_percent(unused, rows)}) unused" if unused else "")

    def _length_warnings(self) -> list[str]:
        cut, unused, rows = self._lengths()
        found = []
        if unused:
            found.append(
                f"{_share(unused, rows, 'rows')} have nothing to learn within model.max_seq_length = {self.max_tokens} "
                "and are not used. Raise it."
            )
        if cut and cut >= MANY * rows:
            found.append(
                f"{_share(cut, rows, 'rows')} are longer than model.max_seq_length = {self.max_tokens} and lose "
                f"their end. "
                "Raise it if the end matters."
            )
        return found

    def _lengths(self) -> tuple[int | None, int, int]:
        """(cut, unused, rows) of the tables of which it is known."""
        known = [table for table in (self.train, self.test) if table is not None and table.cut is not None]
        cut = sum(table.cut or 0 for table in known) if known else None
        return cut, sum(table.unused or 0 for table in known), sum(table.rows for table in known)


def shown_lines(card: Mapping[str, Any]) -> list[str]:
    """Returns a card, as `as_dict` gives it, as a person reads it: five lines, then warnings and notes."""
    lines = [f"{name:<9}{text}" for name, text in card["headline"].items()]
    warnings = [f"{WARNING} {text}" for text in card["warnings"]]
    return [*lines, *warnings, *(f"Note: {text}" for text in card["notes"]), ""]


def make_card(
    task: Task,
    train: Table | TableCard,
    test: Table | TableCard | None,
    *,
    clients: Mapping[str, int],
    lost: Mapping[str, tuple[int, int]],  # "train" and "test": rows that are cut, and unused
    also_read: Iterable[str] = (),  # columns that the settings read: of clients, of data.exclude
    private: bool = False,
    held_out: bool = False,  # the test rows are some of the training table's, which are not trained on
) -> DataCard:
    """Makes the card of tables, or of what is known of a table that is not here.

    With `private`, nothing is counted on the training rows, nor on test rows that are held out of them.
    """
    also = set(also_read)
    card, seen = _of_table(task, train, also, lost.get("train"), hidden=private)
    test_card, in_train = None, None
    if test is not None:
        test_card, tested = _of_table(task, test, also, lost.get("test"), hidden=private and held_out)
        if seen is not None and tested is not None:
            trained = Counter(seen)
            if held_out:
                trained -= Counter(tested)
            in_train = sum(trained[key] > 0 for key in tested)
    names = tuple(task.classes)
    alike = [*differ_by_case(names), *differ_by_case(clients)]
    return DataCard(
        train=card,
        test=test_card,
        clients=dict(clients),
        label_names=names,
        class_names=tuple(task.class_names) if names else (),
        max_tokens=task.max_tokens,
        private=private,
        test_in_train=in_train,
        alike=tuple(map(tuple, alike)),
    )


def _of_table(
    task: Task, table: Table | TableCard, also: set[str], lost: tuple[int, int] | None, *, hidden: bool
) -> tuple[TableCard, list[Any] | None]:
    """(the card of a table, the text of each of its rows as a key; None where that is hidden or not here)."""
    if isinstance(table, TableCard):
        return table, None
    read = task.columns_of(table)
    unread = [name for name in table.columns if name not in {*read, *task.optional_columns, *also}]
    card = TableCard(
        origin=table.origin,
        rows=len(table.rows),
        drawn_from=table.total or None,
        dropped=None if hidden else table.dropped,
        cut=lost[0] if lost else None,
        unused=lost[1] if lost else None,
        read=tuple(name for name in table.columns if name in {*read, *task.optional_columns}),
        not_read=tuple(unread),
    )
    if hidden:
        return card, None
    card = replace(card, notes=table.notes, warnings=table.warnings)
    counted, keys = count(task, table.rows, read)
    of_class = Counter(str(row[read[-1]]) for row in table.rows) if task.classes else None
    classes = {name: of_class[name] for name in task.classes} if of_class else None
    return replace(card, counted=counted, classes=classes), keys


def count(task: Task, rows: Sequence[Row], read: Sequence[str]) -> tuple[Counted, list[Any]]:
    """(what a pass over the rows finds, the text of each row as a key).

    `read` are the columns that the task reads, the last of several being what is to be predicted.
    """
    target = read[-1] if len(read) > 1 else None
    texts = list(read[:-1]) if target else list(read)
    seen: dict[Any, Any] = {}
    keys = []
    empty = duplicates = contradictions = special = 0
    empty_at = None
    for number, row in enumerate(rows, start=1):
        values = [_key(row[name]) for name in texts] + [
            _key(row.get(name) or "") for name in task.optional_prompt_columns
        ]
        key = values[0] if len(values) == 1 else tuple(values)
        keys.append(key)
        wanted = _key(row[target]) if target else None
        if key not in seen:
            seen[key] = wanted
        elif seen[key] == wanted:
            duplicates += 1
        else:
            contradictions += 1
        found = [text for name in texts for text in _texts_in(row[name])]
        if not all(text.strip() for text in found):
            empty += 1
            empty_at = empty_at or place_of(row, number)
        special += any(task.encoder.has_special(text) for text in found)
    counted = Counted(
        empty=empty,
        empty_at=empty_at,
        duplicates=duplicates,
        contradictions=contradictions if task.classes else 0,
        special=special,
    )
    return counted, keys


def _table_warnings(name: str, table: TableCard) -> list[str]:
    """Returns what looks wrong in one table."""
    found = []
    what, classes = f"{name} rows", table.classes or {}
    present = [label for label, rows in classes.items() if rows]
    if len(present) == 1:
        found.append(f"All {table.rows:,} {what} have the class {present[0]!r}: a score on them says little.")
    for label in present:
        if label.strip().lower() in MISSING_LIKE and name == "training":
            found.append(
                f"The class {label!r} ({classes[label]:,} rows) looks like a missing value. If it is one, leave these "
                "rows out with data.exclude."
            )
    counted = table.counted
    if counted is None:
        return found
    if counted.empty:
        said = f"{_share(counted.empty, table.rows, what)} have an empty text"
        found.append(f"{said}, first in {counted.empty_at}. Remove them, or fill them in.")
    if counted.duplicates >= max(1, MANY * table.rows):
        found.append(f"{_share(counted.duplicates, table.rows, what)} repeat an earlier row.")
    if counted.contradictions >= max(1, MANY * table.rows):
        said = f"{_share(counted.contradictions, table.rows, what)} repeat the text of an earlier row"
        found.append(f"{said} with a different class.")
    return found


def _key(value: Any) -> Any:
    """Returns what two equal cells share, and can be a key."""
    return value if isinstance(value, str | int | None) else json.dumps(value, sort_keys=True, default=str)


def _texts_in(value: Any) -> list[str]:
    """Returns the texts of a cell: itself, or the contents of its messages."""
    if isinstance(value, str):
        return [value]
    turns = value if isinstance(value, list) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict) and not turn.get("tool_calls")]
    return [content for content in contents if isinstance(content, str)]


def _span(sizes: Sequence[int]) -> str:
    return f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"


def _share(some: int, of: int, what: str) -> str:
    """`_share(58, 200, "rows")` -> "58 of 200 rows (29 %)"."""
    return f"{some:,} of {of:,} {what} ({_percent(some, of)})"


def _percent(some: int, of: int) -> str:
    return f"{100 * some / max(of, 1):.3g} %"
