"""Names of classes and of clients in cells: missing names, and names that are meant to be the same."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable

from fedsb.utils.errors import UserError

SHOWN = 5  # names per message


def is_missing(label: object) -> bool:
    """Returns whether a cell is empty: null, blank, or NaN as spreadsheets and pandas write it."""
    if isinstance(label, str):
        return label.strip().lower() in ("", "nan")
    return label is None or (isinstance(label, float) and math.isnan(label))


def refuse_same_names(names: Iterable[str], what: str) -> None:
    """Raises UserError for names that differ only by spaces or by the encoding of an accent."""
    groups = alike(names, lambda name: " ".join(unicodedata.normalize("NFC", name).split()))
    if groups:
        said = "; ".join(" and ".join(map(repr, group)) for group in groups[:SHOWN])
        said += f"; and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
        raise UserError(f"{what} {said} differ only by spaces or invisible characters. Write them the same way.")


def differ_by_case(names: Iterable[str]) -> list[list[str]]:
    """Returns the groups of names that differ only by case."""
    return alike(names, str.casefold)


def alike(names: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """Returns the groups of two or more names that have the same key."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
