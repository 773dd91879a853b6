"""Lists methods, recipes, tasks and bases with their facts, for `fedsb ls` and for tests. Loads a recipe by name."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsb.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fedsb.config import Loaded


def methods() -> list[dict[str, Any]]:
    from fedsb.methods import method_types

    rows = []
    for name, cls in sorted(method_types().items()):
        facts = cls.facts
        rows.append(
            {
                "method": name,
                "travels": facts.travels,
                "adapter": facts.adapter or "either",
                "exact": facts.exact,
                "sum only": facts.sum_only,
                "client keeps": facts.client_state,
                "mixed ranks": facts.mixed_ranks,
                "changes base": facts.changes_base,
                "paper": facts.paper,
            }
        )
    return rows


def recipes() -> list[dict[str, Any]]:
    rows = []
    for path in sorted(_folder().glob("*.toml")):
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

    from fedsb.settings import Config

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


def recipe_path(name: str) -> Path:
    """The TOML of a recipe. Raises UserError with the nearest name."""
    path = _folder() / f"{name}.toml"
    if not path.is_file():
        names = [recipe.stem for recipe in _folder().glob("*.toml")]
        raise UserError(f"there is no file and no recipe {name!r}; {did_you_mean(name, names)}")
    return path


def load(config: str, overrides: Sequence[str]) -> Loaded:
    """Reads a TOML file, a run directory's settings, or a recipe by its name. Raises ConfigError with all faults."""
    from fedsb.config import load_config
    from fedsb.models.hub import stay_offline_without_network

    stay_offline_without_network()
    path = Path(config)
    if (path / "manifest.json").is_file():
        return _settings_of(path, overrides)
    if path.suffix == ".toml" or path.is_file():
        return load_config(path, overrides)
    if Path(f"{config}.toml").is_file() and not (_folder() / f"{config}.toml").is_file():
        raise UserError(f"there is no recipe {config!r}. For the file, write {config}.toml")
    return load_config(recipe_path(config), overrides)


def _settings_of(run: Path, overrides: Sequence[str]) -> Loaded:
    from fedsb.config import load_config
    from fedsb.record import read_manifest

    manifest = read_manifest(run)
    loaded = load_config(manifest["config"], overrides)
    asked = {key: where for key, where in loaded.origin.items() if where.startswith("--set ")}
    return replace(loaded, origin={**manifest["origin"], **asked})


def _folder() -> Path:
    return Path(str(files("fedsb") / "recipes"))
