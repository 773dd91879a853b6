"""Turns pydantic's errors into one line per key: what is wrong, the value, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from fedsb.config.nested import flatten
from fedsb.config.renamed import KNOWN_ELSEWHERE
from fedsb.config.schema import Config
from fedsb.utils.errors import did_you_mean

PATTERNS = {  # what the settings with a pattern must look like
    "name": "it must begin with a letter or digit and contain only letters, digits, '.', '_' and '-'",
    "model.template_date": "it must be a date such as 2026-01-31",
}


def explain(errors: Sequence[Any], top: type[BaseModel] = Config) -> list[str]:
    """Returns a line for each key that is at fault, in a file whose root is the model `top`."""
    return _joined((place, _reworded(error, place, section, top)) for error, place, section in _placed(errors, top))


def _placed(errors: Sequence[Any], top: type[BaseModel]) -> Iterable[tuple[Any, str, type[BaseModel]]]:
    for error in errors:
        yield error, *place_of(error["loc"], top)


def _reworded(error: Any, place: str, section: type[BaseModel], top: type[BaseModel]) -> Any:
    """Returns the error with a message, and where it helps a hint, for users of the file."""
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        hint = _hint(str(error["loc"][-1]), is_nested=len(error["loc"]) > 1, section=section, top=top)
        return {**error, "msg": f"there is no such key; {hint}", "input": {}}
    if kind == "missing":
        return {**error, "msg": "it is required", "input": {}}
    if kind == "model_type":
        return {**error, "msg": f"it must be a section, [{place}] with keys below it"}
    if kind == "string_pattern_mismatch" and place in PATTERNS:
        return {**error, "msg": PATTERNS[place]}
    if kind == "string_type" and isinstance(value, bool | int | float):
        text = str(value).lower() if isinstance(value, bool) else str(value)
        quoted = f"""Write it in quotes: {place} = "{text}" in a TOML, --set '{place}="{text}"' in a shell"""
        return {**error, "hint": f". {quoted}"}
    return error


def _hint(key: str, *, is_nested: bool, section: type[BaseModel], top: type[BaseModel]) -> str:
    """Returns where an unknown key belongs, or which key of its section has a similar name."""
    elsewhere = [other for other, _ in flatten(top.model_construct().model_dump()) if other.endswith(f".{key}")]
    if top is Config:
        field = Config.model_fields.get(key)
        if is_nested and field is not None and isinstance(field.default, bool | int | str):
            elsewhere.insert(0, f"{key} at the top of the file, before the first [section]")
        elsewhere += [KNOWN_ELSEWHERE[key]] if key in KNOWN_ELSEWHERE else []
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(key, section.model_fields)


def _joined(placed: Iterable[tuple[str, Any]]) -> list[str]:
    """Returns lines such as `train.lr: it must be greater than 0 (it is -1)`.

    The messages for one place, one for each branch of a union, are joined by "or".
    """
    messages: dict[str, tuple[list[str], Any]] = {}
    hints: dict[str, str] = {}
    for place, error in placed:
        message = re.sub("^(Input|String) should", "it must", error["msg"].removeprefix("Value error, "))
        messages.setdefault(place, ([], error["input"]))[0].append(message)
        hints[place] = hints.get(place, "") + error.get("hint", "")
    return [
        (f"{place}: " if place else "")
        + f"{' or '.join([first, *(other.removeprefix('it must be ') for other in others)])}"
        + ("" if isinstance(value, dict) else f" (it is {value!r:.80})")
        + hints[place]
        for place, ((first, *others), value) in messages.items()
    ]


def place_of(loc: Sequence[Any], section: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """Returns the dotted key of a fault and its section, without the branches of unions that pydantic appends."""
    keys: list[str] = []
    for part in loc:
        keys.append(str(part))
        if isinstance(part, int):  # the position in a list of sections
            continue
        inner = section.model_fields[part].annotation if part in section.model_fields else None
        inner = get_args(inner)[0] if get_origin(inner) is list else inner
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        section = inner
    return ".".join(keys), section
