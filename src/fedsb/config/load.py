"""Reads a TOML and `--set` overrides into a checked configuration. All faults are reported together."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedsb.config import RECIPES
from fedsb.config.faults import explain, place_of
from fedsb.config.nested import difference, flatten, set_key
from fedsb.config.renamed import RENAMED, RENAMED_VALUES, notice_of, with_new_names
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.config.section import UsedIf
from fedsb.utils.errors import ConfigError, UserError, did_you_mean

__all__ = ["ResolvedConfig", "difference", "explain", "load_config", "set_key", "unused_settings"]


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A checked configuration, with the origin of each value: "my.toml", "recipe trec", "--set rounds" or "default"."""

    config: Config
    origin: Mapping[str, str]
    given: Mapping[str, Any] = field(default_factory=dict)  # what the TOML and --set contain, in nested tables
    notices: tuple[str, ...] = ()  # keys and values that were renamed

    def choices(self) -> list[ResolvedSetting]:
        """Returns every setting with its value and reason, in the order of the sections."""
        unused = unused_settings(self.config)

        def reason(key: str) -> str:
            origin = self.origin.get(key, "default")
            return f"{origin}; has no effect: {unused[key]}" if key in self.origin and key in unused else origin

        settings = flatten(self.config.model_dump())
        return [ResolvedSetting(key=key, value=value, reason=reason(key)) for key, value in settings]


def load_config(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Reads a TOML file (or a dict) and `--set key=value` overrides.

    Raises ConfigError with every fault: unknown keys and methods, with the nearest name; wrong types; values out of
    range.
    """
    source = Path(source) if isinstance(source, str) else source
    raw, label = (_read_toml(source), _label(source)) if isinstance(source, Path) else (dict(source), "dict")
    raw, notices, faults = with_new_names(raw)
    origin = {key: label for key, _ in flatten(raw)}
    for text in overrides:
        try:
            old, value = parse_override(text)
            if (key := RENAMED.get(old, old)) != old:
                notices.append(notice_of(f"--set {old}", key))
            if isinstance(value, str) and (key, value) in RENAMED_VALUES:
                notices.append(notice_of(f"--set {key}={value}", RENAMED_VALUES[key, value]))
                value = RENAMED_VALUES[key, value]
            value = "none" if value is None and _has_choice_none(key) else value
            raw = set_key(raw, key, value)
            origin[key] = f"--set {key}"
        except UserError as error:
            faults.append(str(error))
    origin = {key: where for key, where in origin.items() if not key.startswith("compare.")}  # not a part of a run
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([*faults, *explain(error.errors())]) from None
    if faults:
        raise ConfigError(faults)
    return ResolvedConfig(config=config, origin=origin, given=raw, notices=tuple(dict.fromkeys(notices)))


def _label(path: Path) -> str:
    return f"recipe {path.stem}" if path.parent == RECIPES else path.name


def unused_settings(config: Config) -> dict[str, str]:
    """Returns the settings that have no effect with the others, each with the reason.

    What a setting depends on is part of its annotation, see `UsedIf`.
    """
    found: dict[str, str] = {}
    for name, section in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            whole = _unused(section, config)
            reasons = ((key, whole or _unused(field, config)) for key, field in type(value).model_fields.items())
            found |= {f"{name}.{key}": why for key, why in reasons if why is not None}
    return found


def _unused(setting: FieldInfo, config: Config) -> str | None:
    """Returns why a setting has no effect; None if it has one."""
    for used in setting.metadata:
        if isinstance(used, UsedIf) and not used.condition(config):
            return used.otherwise.format(config)
    return None


def parse_override(text: str) -> tuple[str, Any]:
    """Returns the key and the value of an override: `train.lr=0.01` -> ("train.lr", 0.01).

    The value is TOML. What is not a TOML value is read as text, and `none` unsets a setting, which TOML cannot express.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r}: write key=value, as in --set train.lr=0.01")
    if value.strip() == "none":
        return key.strip(), None
    try:
        return key.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _has_choice_none(key: str) -> bool:
    """Returns whether "none" is one of a setting's choices, as it is for `data.quoting`. `none` is then text."""
    path = key.split(".")
    field = place_of(path, Config)[1].model_fields.get(path[-1])
    return field is not None and "none" in get_args(field.annotation)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{path} is empty. `fedsb init quickstart > {path}` writes one to start from")
        return tomllib.loads(text)
    except FileNotFoundError:
        near = [other.name for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"there is no file {path}; {did_you_mean(path.name, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
