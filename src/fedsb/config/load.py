"""From TOML and `--set` to checked settings: unknown keys get a suggestion, and all errors come at once."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config, MethodConfig, Positive, Rate, UsedIf
from fedsb.utils.errors import ConfigError, UserError, did_you_mean

RECIPES = Path(str(files("fedsb.config") / "recipes"))
OPTIONS: dict[str, Any] = {"rank": Positive, "blocks": Positive, "alpha": Rate | None}  # one meaning everywhere


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A checked configuration, and where each of its values comes from.

    That is "my.toml", "recipe trec", "--set rounds", or else "default".
    """

    config: Config
    origin: Mapping[str, str]
    given: Mapping[str, Any] = field(default_factory=dict)  # as the TOML and --set said it, in nested tables
    notices: tuple[str, ...] = ()  # keys and values that have a new name

    def choices(self) -> list[ResolvedSetting]:
        """Every setting with its reason, in the order of the models; the method's own options behind its name."""
        does_nothing = unused_settings(self.config)

        def reason(key: str) -> str:
            given = self.origin.get(key, "default")
            return (
                f"{given}; has no effect: {does_nothing[key]}" if key in self.origin and key in does_nothing else given
            )

        return [
            ResolvedSetting(key=key, value=value, reason=reason(key))
            for key, value in flatten(self.config.model_dump())
        ]


def load_config(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Reads a TOML file (or a dict) and `--set key=value` overrides.

    Raises ConfigError with every fault at once: unknown keys and methods with the nearest name, wrong types, values
    out of range.
    """
    source = Path(source) if isinstance(source, str) else source
    raw, label = (_read_toml(source), _label(source)) if isinstance(source, Path) else (dict(source), "dict")
    raw, notices, faults = with_new_names(raw)
    origin = {key: label for key, _ in flatten(raw)}
    for text in overrides:
        try:
            old, value = parse_override(text)
            if (key := RENAMED.get(old, old)) != old:
                notices.append(f"--set {old} was renamed to {key}. The old name works in this version only")
            value = RENAMED_VALUES.get((key, value), value) if isinstance(value, str) else value
            value = "none" if value is None and _has_choice_none(key) else value
            raw = set_key(raw, key, value)
            origin[key] = f"--set {key}"
        except UserError as error:
            faults.append(str(error))
    origin = {key: where for key, where in origin.items() if not key.startswith("compare.")}  # no settings of a run
    config = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults += explain(error.errors())
    section = raw.get("method", {})
    if isinstance(section, dict):
        faults += method_faults(section)
    if faults or config is None:
        raise ConfigError(faults)
    return ResolvedConfig(config=_with_method_defaults(config), origin=origin, given=raw, notices=tuple(notices))


def _label(path: Path) -> str:
    return f"recipe {path.stem}" if path.parent == RECIPES else path.name


def _with_method_defaults(config: Config) -> Config:
    """Writes the method's own defaults out, so that they are shown, recorded, and the same in a later version."""
    from fedsb.methods import build_method

    built = build_method(config.method.name, config.method.options)
    return config.model_copy(update={"method": MethodConfig(name=config.method.name, **dataclasses.asdict(built))})


def unused_settings(config: Config) -> dict[str, str]:
    """Returns the settings that have no effect with the others, with the reason.

    They are shown where the user has set them. What a setting needs is written beside it, in settings.py (`UsedIf`).
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


PATTERNS = {  # what the settings with a pattern must look like
    "name": "it must begin with a letter or digit and contain only letters, digits, '.', '_' and '-'",
    "model.template_date": "it must be a date such as 2026-01-31",
}
RENAMED = {  # keys of the last version, which still work for this one
    "model.max_tokens": "model.max_seq_length",
    "model.targets": "model.target_modules",
    "model.attention": "model.attn_implementation",
    "model.matmul": "model.float32_matmul_precision",
    "data.tune_share": "data.validation_fraction",
    "data.drop": "data.exclude",
    "clients.split": "clients.partition",
    "clients.alpha": "clients.dirichlet_alpha",
    "clients.held_out": "clients.holdout_fraction",
    "clients.unseen": "clients.holdout_clients",
    "clients.ranks": "clients.total_ranks",
    "train.steps": "train.local_steps",
    "train.epochs": "train.local_epochs",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.clip_norm": "train.max_grad_norm",
    "train.keep_optimizer": "train.persist_optimizer_state",
    "server.secure_sum": "server.secure_aggregation",
    "server.sum_limit": "server.secagg_clip",
    "server.norm_factor": "server.max_norm_ratio",
    "engine.cohort_size": "engine.clients_per_forward",
    "compare.tune_share": "compare.validation_fraction",
}
RENAMED_VALUES = {("engine.name", "embedded"): "in_process"}
KNOWN_ELSEWHERE = {  # the names that other libraries use for a setting
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "num_train_epochs": "train.local_epochs",
    "num_epochs": "train.local_epochs",
    "max_steps": "train.local_steps",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "lora_dropout": "train.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "max_length": "model.max_seq_length",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "torch_dtype": "model.dtype",
    "gradient_checkpointing": "model.activation_checkpointing",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "num_clients": "clients.count",
    "n_clients": "clients.count",
    "num_rounds": "rounds",
    "output_dir": "out",
    "dataset": "data.train",
    "train_file": "data.train",
}


def with_new_names(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Returns the settings with renamed keys and values under their new names, the notices, and the faults.

    A key given under both its old and its new name is a fault.
    """
    now, notices, faults = dict(raw), list[str](), list[str]()
    for old, new in RENAMED.items():
        (section, key), new_key = old.split("."), new.partition(".")[2]
        table = now.get(section)
        if not isinstance(table, Mapping) or key not in table:
            continue
        if new_key in table:
            faults.append(f"{old}: it was renamed to {new}, and both are set. Remove {old}")
            now[section] = {name: value for name, value in table.items() if name != key}
            continue
        now[section] = {new_key if name == key else name: value for name, value in table.items()}
        notices.append(f"{old} was renamed to {new}. The old name works in this version only")
    for (place, old_value), new_value in RENAMED_VALUES.items():
        section, _, key = place.partition(".")
        table = now.get(section)
        if isinstance(table, Mapping) and table.get(key) == old_value:
            now[section] = {**table, key: new_value}
            notices.append(
                f"{place} = {old_value!r} was renamed to {new_value!r}. The old name works in this version only"
            )
    return now, notices, faults


def method_faults(section: Mapping[str, Any]) -> list[str]:
    """What is wrong with a [method] section: an unknown name, unknown options, values of a wrong type."""
    from fedsb.methods import method_type

    options = {key: value for key, value in section.items() if key != "name"}
    name = section.get("name", MethodConfig().name)
    if not isinstance(name, str):
        return []  # Config says it
    try:
        cls = method_type(name)
    except UserError as error:
        return [f"method.name: {error}"]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    meant = {key: KNOWN_ELSEWHERE.get(key, "").removeprefix("method.") for key in options}
    unknown = [
        f"method.{key}: {name} has no such option; {did_you_mean(meant[key] if meant[key] in fields else key, fields)}"
        for key in options
        if key not in fields
    ]
    if unknown:
        return unknown
    faults = [
        f"method.{key}: {name} needs it"
        for key, field in fields.items()
        if key not in options and field.default is field.default_factory is dataclasses.MISSING
    ]
    types = {**get_type_hints(cls), **OPTIONS}
    for key, value in options.items():
        try:
            TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            faults += _joined((f"method.{key}", fault) for fault in error.errors())
    return faults


def parse_override(text: str) -> tuple[str, Any]:
    """`train.lr=0.01` -> ("train.lr", 0.01).

    The value is TOML; what is no TOML value is taken as text, and `none` unsets, which TOML cannot say.
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
    """Returns whether "none" is one of a setting's choices, as of `data.quoting`: `none` is then text."""
    path = key.split(".")
    field = _place(path, Config)[1].model_fields.get(path[-1])
    return field is not None and "none" in get_args(field.annotation)


def set_key(raw: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `raw` with the dotted `key` set."""
    head, dot, rest = key.partition(".")
    if not dot:
        return {**raw, head: value}
    inner = raw.get(head, {})
    if not isinstance(inner, Mapping):
        raise UserError(f"--set {key}: {head!r} is a value, not a section")
    return {**raw, head: set_key(inner, rest, value)}


def flatten(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.lr", 0.01), ... of nested tables."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`train.lr: 0.01 -> 0.02`, a line for each setting that differs."""
    a, b = dict(flatten(old)), dict(flatten(new))

    def shown(settings: Mapping[str, Any], key: str) -> str:
        return repr(settings[key]) if key in settings else "unset"

    keys = sorted(a.keys() | b.keys())
    return [f"{key}: {shown(a, key)} -> {shown(b, key)}" for key in keys if a.get(key) != b.get(key)]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{path} is empty; `fedsb init quickstart > {path}` makes one to start from")
        return tomllib.loads(text)
    except FileNotFoundError:
        near = [other.name for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"there is no file {path}; {did_you_mean(path.name, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def explain(errors: Sequence[Any], top: type[BaseModel] = Config) -> list[str]:
    """A line for each key that is at fault, in a file whose whole is `top`."""
    placed = []
    for error in errors:
        where, section = _place(error["loc"], top)
        if error["type"] == "extra_forbidden":
            key = str(error["loc"][-1])
            elsewhere = [other for other, _ in flatten(top.model_construct().model_dump()) if other.endswith(f".{key}")]
            value = Config.model_fields.get(key)  # not a section: those have headings of their own
            is_value = value is not None and not isinstance(value.default, BaseModel)
            if top is Config and is_value and len(error["loc"]) > 1:
                elsewhere.insert(0, f"{key} at the top of the file, before the first [section]")
            elsewhere += [KNOWN_ELSEWHERE[key]] if top is Config and key in KNOWN_ELSEWHERE else []
            hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(key, section.model_fields)
            error = {**error, "msg": f"there is no such key; {hint}", "input": {}}
        elif error["type"] == "model_type":
            error = {**error, "msg": f"it must be a section, [{where}] with keys below it"}
        elif error["type"] == "string_pattern_mismatch" and where in PATTERNS:
            error = {**error, "msg": PATTERNS[where]}
        elif error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
            text = str(error["input"]).lower() if isinstance(error["input"], bool) else str(error["input"])
            quoted = f"""Write it in quotes: {where} = "{text}" in a TOML, --set '{where}="{text}"' in a shell"""
            error = {**error, "hint": f". {quoted}"}
        placed.append((where, error))
    return _joined(placed)


def _joined(placed: Iterable[tuple[str, Any]]) -> list[str]:
    """`train.lr: it must be greater than 0 (it is -1)`; what each branch of a union asks for is joined by "or"."""
    said: dict[str, tuple[list[str], Any]] = {}
    hints: dict[str, str] = {}
    for where, error in placed:
        message = re.sub("^(Input|String) should", "it must", error["msg"].removeprefix("Value error, "))
        said.setdefault(where, ([], error["input"]))[0].append(message)
        hints[where] = hints.get(where, "") + error.get("hint", "")
    return [
        f"{where}: {' or '.join([first, *(other.removeprefix('it must be ') for other in others)])}"
        + ("" if isinstance(value, dict) else f" (it is {value!r:.80})")
        + hints[where]
        for where, ((first, *others), value) in said.items()
    ]


def _place(loc: Sequence[Any], section: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The dotted key of a fault and its section. What pydantic adds behind a key, a union's branches, is left out."""
    keys: list[str] = []
    for part in loc:
        keys.append(str(part))
        if isinstance(part, int):  # of a list of sections
            continue
        inner = section.model_fields[part].annotation if part in section.model_fields else None
        inner = get_args(inner)[0] if get_origin(inner) is list else inner
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        section = inner
    return ".".join(keys), section
