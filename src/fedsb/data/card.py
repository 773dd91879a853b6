"""The data card: what a run's tables contain, in five lines, with warnings about suspicious contents.

`make_card` is a pure function of the tables and of the rows that encoding has cut. In a private run nothing is counted
on private rows except their number and how many are cut or unused, which the run shows anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedsb.data.names import SHOWN, differ_by_case
from fedsb.data.row_counts import RowCounts, count_rows, text_keys
from fedsb.data.rows import Table
from fedsb.data.tasks.base import Task

WARNING = "Warning:"
MANY = 0.05  # the fraction of rows that is worth a warning
CLASSES_SHOWN = 12
MISSING_LIKE = ("null", "none", "n/a", "na", "<na>", "?", "unknown")  # classes that may be empty cells
COLUMNS_OF_OTHER_TOOLS = ("input", "context", "system", "tools", "weight", "weights")


@dataclass(frozen=True, kw_only=True)
class TableCard:
    """One table. None means unknown here, or private."""

    origin: str
    rows: int
    drawn_from: int | None = None  # rows before data.train_rows or data.test_rows drew some
    dropped: int | None = None  # rows that data.exclude left out
    cut: int | None = None  # rows that lose text to model.max_seq_length
    unused: int | None = None  # rows with nothing to learn within model.max_seq_length
    read: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()
    classes: Mapping[str, int] | None = None  # rows of each class, in the order of the classes
    counted: RowCounts | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def all_warnings(self, name: str) -> list[str]:
        """Returns what looks wrong in this table, which is called `name`."""
        found = list(self.warnings)
        what, classes = f"{name} rows", self.classes or {}
        present = [label for label, rows in classes.items() if rows]
        if len(present) == 1:
            found.append(f"All {self.rows:,} {what} have the class {present[0]!r}: a score on them says little.")
        found += [
            f"The class {label!r} ({classes[label]:,} rows) looks like a missing value. If it is one, leave these rows "
            "out with data.exclude."
            for label in present
            if label.strip().lower() in MISSING_LIKE and name == "training"
        ]
        if (counted := self.counted) is None:
            return found
        if counted.empty:
            share = _share(counted.empty, self.rows, what)
            found.append(f"{share} have an empty text, first in {counted.empty_at}. Remove them, or fill them in.")
        least = max(1, MANY * self.rows)
        if counted.duplicates >= least:
            found.append(f"{_share(counted.duplicates, self.rows, what)} repeat an earlier row.")
        if counted.contradictions >= least:
            share = _share(counted.contradictions, self.rows, what)
            found.append(f"{share} repeat the text of an earlier row with a different class.")
        return found


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """A summary of the tables of a run. It leaves out the row counts of a private run."""

    train: TableCard
    test: TableCard | None
    clients: Mapping[str, int]  # rows of each participant
    label_names: tuple[str, ...]
    class_names: tuple[str, ...]  # as label_names, by the names that are shown
    max_tokens: int
    private: bool
    test_in_train: int | None  # test rows whose text is also that of a training row; None: unknown, or private
    alike: tuple[tuple[str, ...], ...] = ()  # names of classes or of clients that differ by case alone

    def headline(self) -> dict[str, str]:
        """Returns the card in five lines, each with its name."""
        sizes = sorted(self.clients.values())
        return {
            "rows": self._train_line(),
            "classes" if self.label_names else "columns": self._classes_line(),
            "clients": f"{len(sizes)}, {_span(sizes)} training examples" if sizes else "none",
            "test": self._test_line(),
            "length": self._length_line(),
        }

    def warnings(self) -> list[str]:
        """Returns what looks wrong, a sentence or two for each warning."""
        found = self.train.all_warnings("training")
        found += self.test.all_warnings("test") if self.test is not None else []
        if unread := [repr(name) for name in self._not_read() if name.lower() in COLUMNS_OF_OTHER_TOOLS]:
            found.append(
                f"The task does not read the column {', '.join(unread)}. docs/tasks.md says which columns each task "
                "reads."
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
        found = [note for table in self._tables() for note in table.notes]
        if special := sum(table.counted.special for table in self._tables() if table.counted):
            found.append(f"{special:,} rows contain a special token of the tokenizer, which is read as ordinary text.")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Returns the card for JSON, with its five lines, warnings and notes."""
        return {**asdict(self), "headline": self.headline(), "warnings": self.warnings(), "notes": self.notes()}

    def _tables(self) -> list[TableCard]:
        return [self.train] if self.test is None else [self.train, self.test]

    def _not_read(self) -> list[str]:
        """Returns the columns of either table that nothing reads."""
        return list(dict.fromkeys(name for table in self._tables() for name in table.not_read))

    def _train_line(self) -> str:
        table = self.train
        more = [f"drawn from {table.drawn_from:,} by the seed"] if table.drawn_from else []
        more += [f"{table.dropped:,} left out by data.exclude"] if table.dropped else []
        return f"{table.rows:,} of {Path(table.origin).name}" + (f" ({', '.join(more)})" if more else "")

    def _classes_line(self) -> str:
        unread = "; not read: " + ", ".join(name or repr(name) for name in self._not_read()) if self._not_read() else ""
        if not self.label_names:
            return f"read: {', '.join(self.train.read) or 'those of the sites'}{unread}"
        counts = self.train.classes
        labels = zip(self.label_names, self.class_names, strict=True)
        named = [f"{name} {counts[label]:,}" if counts else name for label, name in labels]
        more = f" and {len(named) - CLASSES_SHOWN} more" if len(named) > CLASSES_SHOWN else ""
        hidden = " (a private run shows no counts)" if self.private and not counts else ""
        return f"{len(named)}: {', '.join(named[:CLASSES_SHOWN])}{more}{hidden}{unread}"

    def _test_line(self) -> str:
        table = self.test
        if table is None:
            return "none"
        text = f"{table.rows:,} of {Path(table.origin).name}"
        if table.classes:
            label, most = max(table.classes.items(), key=lambda pair: pair[1])
            shown = dict(zip(self.label_names, self.class_names, strict=True)).get(label, label)
            text += f", {shown!r} the most frequent class with {_percent(most, table.rows)}"
        return text + (f", {self.test_in_train:,} also in the training rows" if self.test_in_train else "")

    def _length_line(self) -> str:
        cut, unused, rows = self._lengths()
        if cut is None:
            return f"at most {self.max_tokens} tokens per row; the number of cut rows is unknown"
        text = f"{_share(cut, rows, 'rows')} longer than {self.max_tokens} tokens"
        return text + (f", {unused:,} ({_percent(unused, rows)}) unused" if unused else "")

    def _length_warnings(self) -> list[str]:
        cut, unused, rows = self._lengths()
        limit, found = f"model.max_seq_length = {self.max_tokens}", []
        if unused:
            share = _share(unused, rows, "rows")
            found.append(f"{share} have nothing to learn within {limit} and are not used. Raise it.")
        if cut and cut >= MANY * rows:
            share = _share(cut, rows, "rows")
            found.append(f"{share} are longer than {limit} and lose their end. Raise it if the end matters.")
        return found

    def _lengths(self) -> tuple[int | None, int, int]:
        """Returns (cut, unused, all rows) of the tables for which they are known; cut is None if for neither."""
        known = [table for table in self._tables() if table.cut is not None]
        cut = sum(table.cut or 0 for table in known) if known else None
        return cut, sum(table.unused or 0 for table in known), sum(table.rows for table in known)


def shown_lines(card: Mapping[str, Any]) -> list[str]:
    """Returns the lines to show of a card from `as_dict`: its five lines, then warnings and notes."""
    lines = [f"{name:<9}{text}" for name, text in card["headline"].items()]
    warnings = [f"{WARNING} {text}" for text in card["warnings"]]
    return [*lines, *warnings, *(f"Note: {text}" for text in card["notes"]), ""]


def make_card(
    task: Task,
    train: Table | TableCard,
    test: Table | TableCard | None,
    *,
    clients: Mapping[str, int],
    lost: Mapping[str, tuple[int, int]],
    also_read: Iterable[str] = (),
    private: bool = False,
    held_out: bool = False,
) -> DataCard:
    """Returns the card of tables, or of what is known about tables on other machines.

    Args:
        lost: (rows that are cut, rows that are unused) of "train" and "test".
        also_read: columns that settings read: those of clients and of data.exclude.
        private: nothing is counted on the training rows, nor on test rows that are held out of them.
        held_out: the test rows are rows of the training table that are not trained on.
    """
    columns = set(also_read)
    train_card, trained = _table_card(task, train, columns, lost.get("train"), hidden=private)
    test_card, in_train = None, None
    if test is not None:
        test_card, tested = _table_card(task, test, columns, lost.get("test"), hidden=private and held_out)
        if trained is not None and tested is not None:
            left = Counter(trained) - Counter(tested if held_out else ())
            in_train = sum(left[key] > 0 for key in tested)
    names = tuple(task.classes)
    return DataCard(
        train=train_card,
        test=test_card,
        clients=dict(clients),
        label_names=names,
        class_names=tuple(task.class_names) if names else (),
        max_tokens=task.max_tokens,
        private=private,
        test_in_train=in_train,
        alike=tuple(map(tuple, [*differ_by_case(names), *differ_by_case(clients)])),
    )


def _table_card(
    task: Task, table: Table | TableCard, also_read: set[str], lost: tuple[int, int] | None, *, hidden: bool
) -> tuple[TableCard, list[Hashable] | None]:
    """Returns (the card of a table, the keys of its texts; None if they are hidden or on another machine)."""
    if isinstance(table, TableCard):
        return table, None
    columns = task.columns_of(table)
    read = {*columns, *task.optional_columns}
    card = TableCard(
        origin=table.origin,
        rows=len(table.rows),
        drawn_from=table.total or None,
        dropped=None if hidden else table.dropped,
        cut=lost[0] if lost else None,
        unused=lost[1] if lost else None,
        read=tuple(name for name in table.columns if name in read),
        not_read=tuple(name for name in table.columns if name not in read | also_read),
    )
    if hidden:
        return card, None
    classes = None
    if task.classes:
        rows_of = Counter(str(row[columns[-1]]) for row in table.rows)
        classes = {name: rows_of[name] for name in task.classes}
    counted = count_rows(task, table.rows, columns)
    card = replace(card, notes=table.notes, warnings=table.warnings, counted=counted, classes=classes)
    return card, text_keys(task, table.rows, columns)


def _span(sizes: Sequence[int]) -> str:
    return f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"


def _share(some: int, of: int, what: str) -> str:
    """Returns a share as text.

    >>> _share(58, 200, "rows")
    '58 of 200 rows (29 %)'
    """
    return f"{some:,} of {of:,} {what} ({_percent(some, of)})"


def _percent(some: int, of: int) -> str:
    return f"{100 * some / max(of, 1):.3g} %"
