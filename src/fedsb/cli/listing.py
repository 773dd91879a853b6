"""Lists methods, recipes, tasks, bases and settings, for `fedsb ls` and for docs/settings.py."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsb.config.section import Section


def methods() -> list[dict[str, Any]]:
    """Returns the methods with the main properties of their specs."""
    from fedsb.config.registry import method_types

    return [
        {
            "method": name,
            "travels": cls.spec.travels,
            "adapter": cls.spec.adapter or "either",
            "exact": cls.spec.exact,
            "secure aggregation": cls.spec.secagg_compatible,
            "client state": cls.spec.client_state,
            "mixed ranks": cls.spec.mixed_ranks,
            "changes base": cls.spec.changes_base,
            "paper": cls.spec.paper,
        }
        for name, cls in sorted(method_types().items())
    ]


def recipes() -> list[dict[str, Any]]:
    """Returns the recipes with their commands."""
    from fedsb.config import RECIPES

    rows = []
    for path in sorted(RECIPES.glob("*.toml")):
        settings = tomllib.loads(path.read_text())
        rows.append(
            {
                "recipe": path.stem,
                "what": _what(path.read_text()),
                "command": path.read_text().splitlines()[0].removeprefix("# "),
                "method": settings["method"]["name"],
                "model": settings["model"]["name"],
                "rounds": settings["rounds"],
            }
        )
    return rows


def _what(recipe: str) -> str:
    """Returns the description of a recipe: the first words of its comment after the command."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in list(comment)[1:])
    return re.split(r" *[:;(]|\.\s", words.strip(), maxsplit=1)[0]


def everything() -> list[dict[str, Any]]:
    """Returns the names of everything that can be listed, by kind."""
    kinds = {"methods": methods, "recipes": recipes, "tasks": tasks, "bases": bases}
    named = {kind: [str(next(iter(row.values()))) for row in of()] for kind, of in kinds.items()}
    return [{"list": kind, "names": ", ".join(names)} for kind, names in named.items()]


def tasks() -> list[dict[str, Any]]:
    """Returns the tasks with their metrics."""
    from fedsb.data.tasks import TASKS

    return [
        {
            "task": name,
            "metric": ", ".join(cls.metrics) or cls.metric,
            "model": cls.auto_class,
            "what": (cls.__doc__ or "").splitlines()[0],
        }
        for name, cls in TASKS.items()
    ]


def settings() -> list[dict[str, Any]]:
    """Returns every key of a TOML, in the order of its sections: its values, its default, and what it does."""
    from fedsb.config.schema import Config
    from fedsb.config.section import Section

    rows = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if name == "method":
            rows += _method_settings()
        elif isinstance(section, type) and issubclass(section, Section):
            rows += [row | {"setting": f"{name}.{row['setting']}"} for row in _fields(section)]
        else:
            rows += [row for row in _fields(Config) if row["setting"] == name]
    return rows


def _method_settings() -> list[dict[str, Any]]:
    """Returns the name, and the options of all methods. Options of the same name are listed once."""
    from fedsb.config.registry import DEFAULT, method_types

    what = "Name of the method, see `fedsb ls methods`. It determines the other keys of this section."
    name = {"setting": "method.name", "value": "text", "default": [json.dumps(DEFAULT)], "what": what}
    rows: dict[str, dict[str, Any]] = {"name": name}
    owners: dict[str, list[str]] = {}
    for method, cls in sorted(method_types().items()):
        for row in _fields(cls):
            key, default = row["setting"], row["default"]
            known = rows.setdefault(key, row | {"setting": f"method.{key}", "default": []})
            known["default"] += [] if default in known["default"] else [default]
            owners.setdefault(key, []).append(method)
    for key, methods in owners.items():
        if len(methods) < len(method_types()):
            rows[key]["what"] += f" Option of {', '.join(methods)}."
    return [row | {"default": " or ".join(row["default"])} for row in rows.values()]


def _fields(section: type[Section]) -> list[dict[str, Any]]:
    """Returns a row for each field of a section."""
    schemas = section.model_json_schema()["properties"]
    rows = []
    for key, field in section.model_fields.items():
        default = schemas[key].get("default")
        shown = "not set" if default is None else json.dumps(default)
        rows.append({"setting": key, "value": _values(schemas[key]), "default": shown, "what": field.description or ""})
    return rows


def _values(schema: dict[str, Any]) -> str:
    """Returns the values that a JSON schema accepts, as text."""
    if "anyOf" in schema:
        return " or ".join(kind for of in schema["anyOf"] if (kind := _values(of)) != "nothing")
    if "enum" in schema or "const" in schema:
        return ", ".join(map(json.dumps, schema.get("enum", [schema.get("const")])))
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    kinds = {"string": "text", "integer": "whole number", "boolean": "true, false", "array": "list", "object": "table"}
    kind = kinds.get(schema.get("type", ""), schema.get("type", "anything")).replace("null", "nothing")
    bounds = [f"{sign} {schema[limit]:g}" for limit, sign in limits.items() if limit in schema]
    return " ".join([kind, *bounds])


def bases() -> list[dict[str, Any]]:
    """Returns the bases with their costs."""
    from fedsb.adapters.basis import BASES

    return [
        {
            "basis": spec.id,
            "reads": spec.looks_at,
            "up per layer": spec.up,
            "down per layer": spec.down,
            "passes": spec.passes,
            "simulation only": spec.simulation_only,
        }
        for spec in BASES.values()
    ]
