"""The sections of a TOML that describe how a run computes: basis, training, server, privacy, channel and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fedsb.config.inputs import HEADS
from fedsb.config.section import Auto, Count, Positive, Rate, Section, Share, UsedIf, used_if

if TYPE_CHECKING:
    from fedsb.config.schema import Config

Codec = Literal["float32", "bfloat16", "int8", "int4", "int3", "int2"]
Fraction = Annotated[float, Field(gt=0, lt=1)]
FROM_GRADIENTS = ("update", "update-pooled", "core")  # kinds of basis that look at rows


def _uses_side(config: Config) -> bool:
    basis = config.basis
    return basis.kind == "weights" or (basis.kind == "core" and basis.outer == "weights")


def _reports_share(config: Config) -> bool:
    return config.engine.name == "in_process" and not config.privacy.on


def _needs_gradients(config: Config) -> bool:
    share = _reports_share(config) and config.basis.share_samples != 0
    return share or config.basis.kind in ("update", "update-pooled")


def _sends_values(config: Config) -> bool:
    basis = config.method.adapter == "core" and config.basis.kind in FROM_GRADIENTS
    return basis or config.method.spec.aggregates


PRIVATE = UsedIf(lambda config: config.privacy.on, "privacy.unit is none")
SERVER_STEPS = UsedIf(lambda config: config.server.optimizer != "none", "server.optimizer is none")
TRAVELS = UsedIf(lambda config: not config.method.spec.pools_data, "all data are in one place, nothing travels")
AGGREGATES = UsedIf(lambda config: config.method.spec.aggregates, "{0.method.spec.id} aggregates nothing")


class BasisConfig(Section):
    """The frozen B and A of a core, see adapters/basis.py."""

    kind: Literal["random", "weights", "update", "update-pooled", "core"] = "weights"
    """How B and A are made, see docs/bases.md."""
    side: Annotated[
        Literal["leading", "trailing"], UsedIf(_uses_side, "B and A are not singular vectors of W0 here")
    ] = "leading"
    """Which singular vectors of W0 form the basis, or the outer basis of 'core'."""
    outer: Annotated[Literal["weights", "random"], used_if("basis.kind", "core")] = "weights"
    """Kind of the data-free outer basis in which 'core' searches."""
    outer_rank: Annotated[Positive | None, used_if("basis.kind", "core")] = None
    """Rank k of the outer basis. Default: 4 x total rank, at most half of min(m, n)."""
    samples: Annotated[Positive, used_if("basis.kind", *FROM_GRADIENTS)] = 256
    """Number of rows whose gradient is summed, over all clients together."""
    data: Annotated[str | None, used_if("basis.kind", "update")] = None
    """File of rows that are declared public, for 'update'."""
    cache: Annotated[bool, UsedIf(_uses_side, "B and A are not singular vectors of W0 here")] = True
    """Whether the singular vectors of large models are kept in the user's cache folder for the next run."""
    R0: Annotated[Literal["auto", "zero", "step"], used_if("basis.kind", *FROM_GRADIENTS)] = "auto"
    """Initial R: zero, or one approximate full step. Default: a step for 'update', else zero."""
    eta: Annotated[Rate | Auto, UsedIf(lambda config: config.basis.steps_ahead, "R starts at zero")] = "auto"
    """Learning rate of the initial step. Default: that of the first local step."""
    refresh: Positive | None = None
    """Number of rounds after which the basis is recomputed from the current model. Default: never."""
    share_samples: Annotated[
        Count | Auto, UsedIf(_reports_share, "the captured share is computed in simulations without privacy only")
    ] = "auto"
    """Number of rows on which the captured share of the gradient is reported. 0: none. Default: 16 for small models."""
    budget_mib: Annotated[Positive | Auto, UsedIf(_needs_gradients, "no gradients of whole weights are computed")] = (
        "auto"
    )
    """Memory for gradients of whole weights, one pass for each group of layers. Default: half of what is free."""

    @property
    def steps_ahead(self) -> bool:
        """Returns whether R starts with an approximate full step, not at zero."""
        return self.R0 == "step" or (self.R0 == "auto" and self.kind in ("update", "update-pooled"))

    @model_validator(mode="after")
    def _step_needs_a_gradient(self) -> Self:
        if self.R0 == "step" and self.kind not in FROM_GRADIENTS:
            raise ValueError(
                f"R0 = 'step' follows a gradient, and kind = {self.kind!r} computes none. Set R0 to 'auto', or kind to "
                "'update' or 'core'"
            )
        if self.refresh is not None and self.kind == "weights":
            raise ValueError(
                "refresh has no effect with kind = 'weights': W0 is frozen, so the basis stays the same. Remove "
                "refresh, or set kind to 'random' or 'core'"
            )
        return self


class TrainConfig(Section):
    """Local training, see training/local.py."""

    local_steps: Positive | None = None
    """Optimizer steps per client and round. Default: 10, unless local_epochs is set."""
    local_epochs: Positive | None = None
    """Passes over a client's rows per round. Replaces local_steps."""
    batch_size: Positive = 8
    """Rows per client in one forward."""
    gradient_accumulation_steps: Positive = 1
    """Forwards per optimizer step."""
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """Optimizer of the clients. Muon: of the adapter's matrices, with AdamW for the head."""
    lr: Rate = 0.01
    """Learning rate of the adapter."""
    head_lr: Annotated[Rate, used_if("task.kind", *HEADS)] = 0.01
    """Learning rate of the task head."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, as in AdamW."""
    momentum: Annotated[Share, used_if("train.optimizer", "sgd")] = 0.0
    """Momentum of SGD."""
    max_grad_norm: Annotated[
        Annotated[float, Field(ge=0)],
        UsedIf(lambda config: config.privacy.unit != "example", "privacy.clip_norm bounds each row's gradient"),
    ] = 1.0
    """Maximum L2 norm of a client's gradient. 0: no clipping."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule over all rounds."""
    warmup_ratio: Share = 0.0
    """Fraction of all steps of the run in which the learning rate rises."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    persist_optimizer_state: Annotated[
        bool,
        UsedIf(lambda c: c.train.optimizer != "sgd" or c.train.momentum > 0, "SGD without momentum has no state"),
    ] = False
    """Whether clients keep their optimizer's moments between rounds."""

    @model_validator(mode="before")
    @classmethod
    def _ten_steps(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("local_steps") is None and given.get("local_epochs") is None:
            return {**given, "local_steps": 10}
        return given

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                "local_steps and local_epochs are both set. Remove one of them, as with --set train.local_steps=none"
            )
        return self


class ServerConfig(Section):
    """Rounds and aggregation."""

    clients_per_round: Positive | None = None
    """Number of clients that are sampled in each round. Default: all."""
    min_clients: Annotated[Positive, TRAVELS] = 1
    """Minimum number of valid updates per round. The run ends if there are fewer."""
    weighting: Annotated[Literal["samples", "uniform"], TRAVELS, AGGREGATES] = "samples"
    """Weights of the updates: by number of rows, or all equal."""
    codec: Annotated[Codec, TRAVELS, UsedIf(_sends_values, "{0.method.spec.id} sends nothing")] = "float32"
    """Encoding of the values that are sent: 32, 16, 8, 4, 3 or 2 bits per value."""
    fraction: Annotated[Annotated[float, Field(gt=0, le=1)], TRAVELS, AGGREGATES] = 1.0
    """Fraction of the values that is sent in a round, the same for all clients. The others wait for the next rounds."""
    secure_aggregation: bool = False
    """Whether the server learns only the sum of the clients' changes."""
    secagg_clip: Annotated[Rate, used_if("server.secure_aggregation", True)] = 4.0
    """Largest change of a single value in secure aggregation."""
    secagg_bits: Annotated[
        Annotated[int, Field(ge=12, le=32)],
        used_if("server.secure_aggregation", True),
        used_if("privacy.unit", "none", "example"),
    ] = 32
    """Bits of a value in secure aggregation. Noise that clients add to the sum determines them itself."""
    max_norm_ratio: Annotated[
        Annotated[float, Field(gt=1, allow_inf_nan=False)],
        TRAVELS,
        AGGREGATES,
        used_if("server.secure_aggregation", False),
        used_if("privacy.unit", "none", "example"),
    ] = 30.0
    """An update is dropped if its change is larger than this many times the median."""
    optimizer: Annotated[Literal["none", "momentum", "adam"], AGGREGATES] = "none"
    """Optimizer of the server, which steps along the mean change. 'none' adds the mean change."""
    lr: Annotated[Rate, SERVER_STEPS, AGGREGATES] = 1.0
    """Learning rate of the server's optimizer."""
    beta1: Annotated[Share, SERVER_STEPS, AGGREGATES] = 0.9
    """Decay of the first moment of the server's optimizer."""
    beta2: Annotated[Share, used_if("server.optimizer", "adam"), AGGREGATES] = 0.99
    """Decay of the second moment of the server's Adam."""
    tau: Annotated[Rate, used_if("server.optimizer", "adam"), AGGREGATES] = 1e-3
    """Value that is added to the root of the second moment of the server's Adam."""
    average_last: Annotated[Share, AGGREGATES] = 0.0
    """Fraction of the rounds, the last ones, whose models are averaged. The average is scored and exported."""
    load_base_model: Annotated[bool, used_if("engine.name", "flower")] = True
    """Whether the coordinator loads the base model's weights. Without them it scores nothing, see docs/deploy.md."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise ValueError(
                f"min_clients = {self.min_clients} is above clients_per_round = {self.clients_per_round}. Lower "
                "min_clients"
            )
        return self

    def sum_threshold(self, clients: int, config: PrivacyConfig | None = None) -> tuple[int, int]:
        """Returns (the clients asked to take part in secure aggregation, the number that must stay).

        With shared noise (`config` is then given) the shares of those who may leave are added for nothing, so by
        default at most a tenth may.
        """
        asked = min(self.clients_per_round or clients, clients)
        if config is not None and 2 * self.min_clients <= asked + config.colluding_clients:
            return asked, asked - asked // 10
        return asked, max(self.min_clients, asked // 2 + 1)

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """Returns the arguments of `ServerOptimizer`."""
        return {"kind": self.optimizer, **self.model_dump(include={"lr", "beta1", "beta2", "tau"})}


class PrivacyConfig(Section):
    """Differential privacy, see docs/privacy.md."""

    unit: Literal["none", "example", "client"] = "none"
    """What is protected: one row, or all rows of one client."""
    epsilon: Rate | None = None
    """Target epsilon. The noise is calibrated to it before training."""
    noise_multiplier: Rate | None = None
    """Standard deviation of the noise over the clip norm, instead of a target."""
    delta: Annotated[Fraction | Auto, PRIVATE] = "auto"
    """Delta of the guarantee. Default: 1e-5, or a tenth of 1 / rows."""
    clip_norm: Annotated[Rate, PRIVATE] = 1.0
    """Maximum L2 norm, over all trained tensors, of a row's gradient or of a client's update."""
    noise: Annotated[Literal["auto", "local", "shared"], used_if("privacy.unit", "example")] = "auto"
    """Whether each client adds all of its noise, or a share in secure aggregation. Default: shared if possible."""
    scale_then_privatize: Annotated[bool, used_if("privacy.unit", "example")] = False
    """Whether gradients are clipped, and get noise, in coordinates that Adam's second moments have scaled."""
    colluding_clients: Annotated[Count, used_if("privacy.unit", "example")] = 0
    """Number of clients in league with the server against which shared noise protects as stated."""
    basis_share: Annotated[
        Fraction | Auto,
        PRIVATE,
        UsedIf(lambda config: config.method.adapter == "core", "{0.method.spec.id} has no basis"),
        used_if("basis.kind", "core"),
    ] = "auto"
    """Fraction of epsilon that the basis 'core' spends."""
    release: Annotated[list[Literal["loss", "scores"]], PRIVATE] = Field([])
    """Values computed on private rows that are shown, although epsilon does not cover them."""

    @property
    def on(self) -> bool:
        return self.unit != "none"

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = [key for key in ("epsilon", "noise_multiplier") if getattr(self, key) is not None]
        if self.on and len(given) != 1:
            raise ValueError(
                f"a private run needs epsilon or noise_multiplier, and not both (set: {' and '.join(given) or 'none'})"
            )
        if not self.on and given:
            raise ValueError(
                f"{given[0]} is set, but unit = 'none' means no privacy. Set unit to 'example' or 'client'"
            )
        return self


class EngineConfig(Section):
    """The channel between the server and the clients."""

    name: Literal["in_process", "flower"] = "in_process"
    """All clients in this process, or sites over Flower."""
    clients_per_forward: Annotated[Positive | Auto, used_if("engine.name", "in_process"), TRAVELS] = "auto"
    """Number of clients that are trained in one forward. Default: as many as fit."""
    deadline_s: Annotated[Rate, used_if("engine.name", "flower")] = 3600.0
    """Seconds after which a site that has not answered misses the round."""


class EvalConfig(Section):
    """Evaluation during training."""

    every: Positive = 1
    """Number of rounds between evaluations. The last round is always evaluated."""
    batch_size: Positive = 64
    """Rows per forward in evaluation."""
    gap: bool = False
    """Whether to score each client's own model and the global model on the client's held-out rows."""

    def due(self, round: int, rounds: int) -> bool:
        """Returns whether the model is evaluated after `round` completed rounds out of `rounds`."""
        return round % self.every == 0 or round == rounds
