"""A run's settings: TOML <-> frozen pydantic models. Unknown keys get a suggestion; all errors come at once."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedsb.errors import ConfigError, UserError, did_you_mean

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]
OPTIONS: dict[str, Any] = {"rank": Positive, "blocks": Positive, "alpha": Rate | None}  # one meaning everywhere


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A setting as it was resolved, and why it is what it is."""

    key: str
    value: Any
    reason: str


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The base model, which stays frozen and never travels."""

    name: str = Field("minilm", description="a folder, a Hub name, or 'minilm'")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    targets: str | list[str] = Field("blocks", description="'blocks', a regular expression, or name endings")
    max_tokens: Annotated[int, Field(ge=2)] = 128
    activation_checkpointing: bool = False


class TaskConfig(Section):
    """What a row means."""

    kind: Literal["classification", "text", "instruction"] = "classification"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: str = "prompt"
    answer: str = "answer"


class DataConfig(Section):
    """Where the rows come from."""

    train: str = Field("python-docs", description="a file, 'hub:owner/name[:config]', or 'python-docs'")
    test: str | None = Field(None, description="the same; scored every round, never trained on")
    revision: str | None = Field(None, description="of a Hub data set: branch, tag or commit")
    train_split: str = "train"
    test_split: str = "test"
    train_rows: Positive | None = Field(None, description="only the first so many rows")
    test_rows: Positive | None = Field(None, description="only the first so many rows")


class ClientsConfig(Section):
    """Who holds what."""

    split: Literal["iid", "dirichlet", "column", "size"] = "iid"
    count: Positive = Field(8, description="number of clients; 'column' has its own")
    alpha: Rate = Field(0.5, description="of dirichlet: small is uneven")
    column: str = Field("client", description="of the split by column: a client for each value")
    sizes: list[Rate] | None = Field(None, description="of the split by size: relative sizes; default 1, 2, 3, ...")
    min_rows: Positive = Field(1, description="of the split by column: smaller clients are left out; else an error")
    min_characters: Count = Field(0, description="of the split by column: clients with less text are left out")
    held_out: Share = Field(0.0, description="share of each client's rows kept for its own score")
    unseen: Count = Field(0, description="so many clients never take part and are only scored")


class MethodConfig(BaseModel):
    """The method by name; the other keys are the method's own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "fed-sb"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class BasisConfig(Section):
    """Where a core's B and A come from. See adapters/basis.py."""

    kind: Literal["random", "weights", "update", "update-pooled", "core"] = "random"
    side: Literal["leading", "trailing"] = Field("leading", description="of weights, and of core's outer basis")
    outer: Literal["weights", "random"] = Field("weights", description="of core: the data-free basis around it")
    outer_rank: Positive | None = Field(None, description="of core: k; default 8 h r, at most half of min(m, n)")
    samples: Positive = Field(256, description="rows that the gradient is summed over, of all clients together")
    data: str | None = Field(None, description="of update: a file of rows that are declared public")
    R0: Literal["auto", "zero", "step"] = Field("auto", description="start at 0, or one approximate full step ahead")
    eta: Rate | Auto = Field("auto", description="of that step; default: the first local step's learning rate")
    share_samples: Count = Field(64, description="rows to report the captured share of the gradient on; 0: do not")
    budget_mib: Positive = Field(1024, description="memory for gradients of whole weights, a group of layers at a time")

    @model_validator(mode="after")
    def _step_needs_a_gradient(self) -> Self:
        if self.R0 == "step" and self.kind in ("random", "weights"):
            raise ValueError(f"R0 = 'step' is a step along a gradient, kind = {self.kind!r} looks at none")
        return self


class TrainConfig(Section):
    """Local training. See federation/client.py."""

    steps: Positive | None = Field(
        None, description="optimiser steps a client takes in a round; 10 unless epochs is set"
    )
    epochs: Positive | None = Field(None, description="passes over a client's rows in a round, instead of steps")
    batch_size: Positive = 8
    accumulate: Positive = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 0.01
    head_lr: Rate = Field(0.01, description="of the task head")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Share = 0.0
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="L2 over a client's gradients; 0: none")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="over all rounds")
    warmup: Share = 0.0
    dropout: Share = 0.0
    keep_optimizer: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("set steps or epochs, not both; --set train.steps=none takes one back")
        return self


class ServerConfig(Section):
    """Rounds and their average."""

    clients_per_round: Positive | None = Field(None, description="drawn afresh each round; default: all")
    min_clients: Positive = Field(1, description="fewer good updates than this end the run")
    weighting: Literal["samples", "uniform"] = "samples"
    norm_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        30.0, description="an update whose change is so many times the cohort's median is dropped"
    )
    optimizer: Literal["none", "momentum", "adam"] = "none"
    lr: Rate = 1.0
    beta1: Share = 0.9
    beta2: Share = 0.99
    tau: Rate = 1e-3

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise ValueError(f"min_clients = {self.min_clients} of {self.clients_per_round} clients_per_round")
        return self

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """For `ServerOptimizer`."""
        return {"kind": self.optimizer, **self.model_dump(include={"lr", "beta1", "beta2", "tau"})}


class EngineConfig(Section):
    """What runs the clients."""

    name: Literal["embedded"] = "embedded"
    cohort_size: Positive | Auto = Field("auto", description="clients trained in one forward")


class EvalConfig(Section):
    every: Positive = Field(1, description="score the test rows every so many rounds, and after the last")
    batch_size: Positive = 64


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    seed: Count = 0
    rounds: Positive = 10
    out: str = Field("runs", description="the folder for run directories")
    keep_checkpoints: Positive = 2
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    method: MethodConfig = MethodConfig()
    basis: BasisConfig = BasisConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checked configuration, and where each of its values comes from ("my.toml", "--set", or else "default")."""

    config: Config
    origin: Mapping[str, str]

    def choices(self) -> list[Choice]:
        """Every setting with its reason, in the order of the models; the method's own options behind its name."""
        return [
            Choice(key=key, value=value, reason=self.origin.get(key, "default"))
            for key, value in flatten(self.config.model_dump())
        ]


def load_config(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Loaded:
    """Reads a TOML file (or a dict) and `--set key=value` overrides.

    Raises ConfigError with every fault at once: unknown keys and methods with the nearest name, wrong types, values
    out of range.
    """
    raw, label = (_read_toml(source), source.name) if isinstance(source, Path) else (dict(source), "dict")
    origin = {key: label for key, _ in flatten(raw)}
    faults: list[str] = []
    for text in overrides:
        try:
            key, value = parse_override(text)
            raw = set_key(raw, key, value)
            origin[key] = f"--set {key}"
        except UserError as error:
            faults.append(str(error))
    config = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults += _explain(error.errors())
    section = raw.get("method", {})
    if isinstance(section, dict):
        faults += method_faults(section)
    if faults or config is None:
        raise ConfigError(faults)
    return Loaded(config=config, origin=origin)


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
    unknown = [
        f"method.{key}: {name} has no such option; {did_you_mean(key, fields)}" for key in options if key not in fields
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
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
    ]


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
        raise UserError(f"{path} is no TOML: {error}") from error


def _explain(errors: Sequence[Any]) -> list[str]:
    """A line for each key that is at fault."""
    placed = []
    for error in errors:
        where, section = _place(error["loc"])
        if error["type"] == "extra_forbidden":
            key = str(error["loc"][-1])
            elsewhere = [other for other, _ in flatten(Config().model_dump()) if other.endswith(f".{key}")]
            hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(key, section.model_fields)
            error = {**error, "msg": f"there is no such key; {hint}", "input": {}}
        elif error["type"] == "model_type":
            error = {**error, "msg": f"it must be a section, [{where}] with keys below it"}
        placed.append((where, error))
    return _joined(placed)


def _joined(placed: Iterable[tuple[str, Any]]) -> list[str]:
    """`train.lr: it must be greater than 0 (it is -1)`; what each branch of a union asks for is joined by "or"."""
    said: dict[str, tuple[list[str], Any]] = {}
    for where, error in placed:
        message = re.sub("^(Input|String) should", "it must", error["msg"].removeprefix("Value error, "))
        said.setdefault(where, ([], error["input"]))[0].append(message)
    return [
        f"{where}: {' or '.join([first, *(other.removeprefix('it must be ') for other in others)])}"
        + ("" if isinstance(value, dict) else f" (it is {value!r:.80})")
        for where, ((first, *others), value) in said.items()
    ]


def _place(loc: Sequence[Any]) -> tuple[str, type[BaseModel]]:
    """The dotted key of a fault and its section. What pydantic adds behind a key, a union's branches, is left out."""
    section: type[BaseModel] = Config
    keys: list[str] = []
    for part in loc:
        keys.append(str(part))
        inner = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        section = inner
    return ".".join(keys), section
