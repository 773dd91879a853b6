"""A run's settings as frozen pydantic models: the keys of a TOML with their types, ranges, defaults and descriptions.

The section `[method]` is the method itself. A setting, or a section, that has an effect only together with certain
others states this in its own annotation, by `UsedIf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from fedsb.config.inputs import ClientsConfig, DataConfig, ModelConfig, TaskConfig
from fedsb.config.registry import DEFAULT, build_method, read_method
from fedsb.config.section import Auto, Count, Positive, Rate, Section, UsedIf
from fedsb.config.training import (
    BasisConfig,
    Codec,
    EngineConfig,
    EvalConfig,
    Fraction,
    PrivacyConfig,
    ServerConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from fedsb.methods.base import Method
else:  # methods are found by name, so this package imports none of them
    Method = Annotated[SerializeAsAny[Section], BeforeValidator(read_method)]

__all__ = [
    "BasisConfig",
    "ClientsConfig",
    "Codec",
    "CompareConfig",
    "Config",
    "Count",
    "ModelConfig",
    "Positive",
    "Rate",
    "Section",
    "ServerConfig",
    "TaskConfig",
]


class ContenderConfig(Section):
    """A configuration to compare: a name, and the settings that differ, as in `set = { "method.rank" = 8 }`."""

    name: Annotated[str, Field(min_length=1)]
    """Name of the contender."""
    set: dict[str, Any] = Field({})
    """Settings of the contender, by dotted key."""


class CompareConfig(Section):
    """The contenders of `fedsb compare`. No other command reads this section, see docs/compare.md."""

    methods: list[str] = Field([])
    """Methods to compare: names, or name@rank."""
    ranks: Annotated[list[Positive], UsedIf(lambda c: bool(c.compare.methods), "compare.methods is empty")] = Field([])
    """Ranks of the methods that are given without one. Default: each method's own rank."""
    grid: dict[str, Any] = Field({})
    """Settings with lists of values. Every contender runs with every combination."""
    contenders: list[ContenderConfig] = Field([])
    """Further configurations to compare."""
    seeds: Positive = 3
    """Number of runs per contender, with the seeds 0, 1, ..."""
    trials: Count = 4
    """Number of learning rates tried per contender. 0: every contender uses train.lr."""
    validation_fraction: Annotated[Fraction, UsedIf(lambda c: c.compare.trials > 0, "compare.trials is 0")] = 0.1
    """Value of data.validation_fraction in the trials."""
    target: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Score whose first round and bytes are reported."""
    reference: str | None = None
    """Contender with which the others are compared. Default: the first one."""
    workers: Positive | Auto = "auto"
    """Number of parallel runs. Default: one per core, or one if there is a GPU."""


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run, and of its directory in `out`."""
    seed: Count = 0
    """Seed of every random draw, except for the noise of a private run."""
    rounds: Positive = 10
    """Number of rounds."""
    out: str = "runs"
    """Folder of the run directories."""
    keep_checkpoints: Positive = 2
    """Number of the newest checkpoints that are kept."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    method: Method = Field(default_factory=lambda: build_method(DEFAULT, {}))
    basis: Annotated[
        BasisConfig, UsedIf(lambda config: config.method.adapter == "core", "{0.method.spec.id} has no basis")
    ] = BasisConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    compare: CompareConfig = Field(CompareConfig(), exclude=True)  # not a part of the run itself

    @model_validator(mode="after")
    def _rows_of_8_bit_products_depend_on_each_other(self) -> Self:
        """Refuses LLM.int8() where rows must be independent, because it searches the whole batch for outliers."""
        if self.model.quantize == "8bit":
            if self.engine.clients_per_forward not in ("auto", 1):
                raise ValueError(
                    "model.quantize = '8bit' mixes the rows of a batch. Set engine.clients_per_forward to 1, or "
                    "model.quantize to '4bit'"
                )
            if self.privacy.unit == "example":
                raise ValueError(
                    "model.quantize = '8bit' mixes the rows of a batch, so no single row is protected. Set "
                    "model.quantize to '4bit'"
                )
        return self

    @model_validator(mode="after")
    def _dropout_is_not_compiled(self) -> Self:
        if self.model.compile and self.train.dropout:
            raise ValueError(
                "model.compile = true with train.dropout would compile every step again. Set model.compile to false, "
                "or train.dropout to 0"
            )
        return self

    @model_validator(mode="after")
    def _gap_needs_held_out_rows(self) -> Self:
        if self.eval.gap and not self.clients.holdout_fraction:
            raise ValueError(
                "eval.gap scores clients on held-out rows. Set clients.holdout_fraction, for example to 0.1"
            )
        return self
