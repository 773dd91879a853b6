"""Nested tables and their dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedsb.utils.errors import UserError


def set_key(raw: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Returns a copy of `raw` with the dotted `key` set."""
    head, dot, rest = key.partition(".")
    if not dot:
        return {**raw, head: value}
    inner = raw.get(head, {})
    if not isinstance(inner, Mapping):
        raise UserError(f"--set {key}: {head!r} is a value, not a section")
    return {**raw, head: set_key(inner, rest, value)}


def flatten(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys of nested tables with their values, such as ("train.lr", 0.01)."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns a line such as `train.lr: 0.01 -> 0.02` for each setting that differs."""
    a, b = dict(flatten(old)), dict(flatten(new))

    def shown(settings: Mapping[str, Any], key: str) -> str:
        return repr(settings[key]) if key in settings else "unset"

    keys = sorted(a.keys() | b.keys())
    return [f"{key}: {shown(a, key)} -> {shown(b, key)}" for key in keys if a.get(key) != b.get(key)]
