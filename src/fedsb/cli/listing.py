"""Lists methods, recipes, tasks and bases with their facts, for `fedsb ls` and for tests. Loads a recipe by name."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from typing import Any


def methods() -> list[dict[str, Any]]:
    from fedsb.methods import method_types

    rows = []
    for name, cls in sorted(method_types().items()):
        facts = cls.spec
        rows.append(
            {
                "method": name,
                "travels": facts.travels,
                "adapter": facts.adapter or "either",
                "exact": facts.exact,
                "sum only": facts.secagg_compatible,
                "client keeps": facts.client_state,
                "mixed ranks": facts.mixed_ranks,
                "changes base": facts.changes_base,
                "paper": facts.paper,
            }
        )
    return rows


def recipes() -> list[dict[str, Any]]:
    from fedsb.config.load import RECIPES

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
    """Returns what a recipe is, from its comment: the first words under its command."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in list(comment)[1:])
    return re.split(r" *[:;(]|\.\s", words.strip(), maxsplit=1)[0]


def everything() -> list[dict[str, Any]]:
    """Returns the names of all that can be listed, kind by kind."""
    kinds = {"methods": methods, "recipes": recipes, "tasks": tasks, "bases": bases}
    named = {kind: [str(next(iter(row.values()))) for row in of()] for kind, of in kinds.items()}
    return [{"list": kind, "names": ", ".join(names)} for kind, names in named.items()]


def tasks() -> list[dict[str, Any]]:
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
    """Returns every key of a TOML, in the order of its sections: what it may be, its default, what it does."""
    from pydantic import BaseModel

    from fedsb.config.schema import Config

    schema = Config.model_json_schema()
    rows = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            of = schema["$defs"][section.__name__]["properties"]
            rows += [
                _setting(f"{name}.{key}", of[key], inner.description) for key, inner in section.model_fields.items()
            ]
        else:
            rows.append(_setting(name, schema["properties"][name], field.description))
    return rows


def _setting(key: str, schema: dict[str, Any], description: str | None) -> dict[str, Any]:
    default = schema.get("default")
    shown = "not set" if default is None else json.dumps(default)
    return {"setting": key, "value": _values(schema), "default": shown, "what": description or ""}


def _values(schema: dict[str, Any]) -> str:
    """Returns what a value may be, from its JSON schema."""
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
    from fedsb.adapters.basis import BASES

    return [
        {
            "basis": facts.id,
            "looks at": facts.looks_at,
            "up, a layer": facts.up,
            "down, a layer": facts.down,
            "passes": facts.passes,
            "simulation only": facts.simulation_only,
        }
        for facts in BASES.values()
    ]
