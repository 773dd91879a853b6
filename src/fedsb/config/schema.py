"""A run's settings as frozen pydantic models: what a TOML may say, with defaults and ranges. `config.py` reads it.

A setting, or a section, that has an effect only with certain others says so in its own annotation, by `UsedIf`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedsb.protocol.codec import Codec

if TYPE_CHECKING:
    from fedsb.methods.base import Method

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]


@dataclass(frozen=True)
class UsedIf:
    """Says when a setting has an effect. It stands in the annotation of the setting."""

    condition: Callable[[Config], bool]
    otherwise: str  # why it has none where the condition is false; the configuration is {0}


def method_of(config: Config) -> Method:
    """Returns the method of a checked configuration."""
    from fedsb.methods import build_method

    return build_method(config.method.name, config.method.options)


def _if_kind(*kinds: str) -> UsedIf:
    return UsedIf(lambda config: config.task.kind in kinds, "task.kind is {0.task.kind}")


def _writes_answers(config: Config) -> bool:
    from fedsb.data.tasks import TASKS

    score = config.task.score
    return (TASKS[config.task.kind].scorings[0] if score == "auto" else score) == "answers"


def _if_split(*splits: str) -> UsedIf:
    return UsedIf(lambda config: config.clients.partition in splits, "clients.partition is {0.clients.partition}")


def _if_basis(*kinds: str) -> UsedIf:
    return UsedIf(lambda config: config.basis.kind in kinds, "basis.kind is {0.basis.kind}")


def _if_read(*extensions: str) -> UsedIf:
    def is_read(config: Config) -> bool:
        public = config.basis.data if config.basis.kind == "update" else None
        names = [name.removesuffix(".gz") for name in (config.data.train, config.data.test, public) if name]
        return any(name.lower().endswith(extensions) for name in names)

    return UsedIf(is_read, f"no {' or '.join(extensions)} file is read here")


ENCODES = ("classification", "regression")
GRADES = ("arithmetic", "commonsense", "code")
SEPARATED = _if_read(".csv", ".tsv")
TEXTUAL = _if_read(".csv", ".tsv", ".json", ".jsonl")
TESTED = UsedIf(lambda config: not config.data.validation_fraction, "data.validation_fraction takes training rows")
PRIVATE = UsedIf(lambda config: config.privacy.on, "privacy.unit is none")
SERVER_STEPS = UsedIf(lambda config: config.server.optimizer != "none", "server.optimizer is none")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The base model, which stays frozen and never travels."""

    name: str = Field("minilm", description="a folder, a Hub name, or 'minilm'")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the frozen base; default: bfloat16 on a GPU that computes in it, else float32"
    )
    quantize: Literal["none", "4bit", "8bit"] = Field("none", description="the blocks' layers, by bitsandbytes")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    target_modules: str | list[str] = Field("blocks", description="'blocks', a regular expression, or name endings")
    max_seq_length: Annotated[int, Field(ge=2)] = Field(128, description="rows are cut to this many tokens")
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = Field(
        None, description="the date that a chat template writes, as 2026-01-31; default: the day the run starts"
    )
    activation_checkpointing: bool = Field(
        False, description="keeps one block's activations only, for one more forward"
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="who computes it"
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", description="torch's precision of float32 products while training and scoring"
    )


class TaskConfig(Section):
    """What a row means."""

    kind: Literal[
        "classification", "regression", "text", "instruction", "chat", "arithmetic", "commonsense", "code"
    ] = Field("classification", description="what a row means, see docs/tasks.md")
    text: Annotated[str, _if_kind(*ENCODES, "text")] = Field("text", description="the column with the text")
    text_pair: Annotated[str | None, _if_kind(*ENCODES)] = Field(None, description="the column with a second text")
    label: Annotated[str, _if_kind(*ENCODES)] = Field("label", description="the column with the class or the number")
    prompt: Annotated[str, _if_kind("instruction", *GRADES)] = Field("prompt", description="the column with the prompt")
    answer: Annotated[str, _if_kind("instruction", *GRADES)] = Field("answer", description="the column with the answer")
    input: Annotated[str, _if_kind("instruction")] = Field(
        "input", description="of instruction: a column with more to read, where the table has it"
    )
    names: Annotated[dict[str, str], _if_kind("classification")] = Field(
        {}, description="of classification: a class's name for its label, as 0 = 'negative'"
    )
    pooling: Annotated[Literal["model", "mean"], _if_kind(*ENCODES)] = Field(
        "model", description="of classification: the model's own, or the tokens'"
    )
    score: Literal["auto", "answers", "options", "loss"] = Field(
        "auto", description="of graded answers: those written, the likeliest option, or the loss; default: written"
    )
    metric: Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman"] = Field(
        "auto", description="of classification and regression; default: accuracy, pearson"
    )
    new_tokens: Annotated[Positive | None, UsedIf(_writes_answers, "no answers are written")] = Field(
        None, description="of a written answer; default: the family's own"
    )
    messages: Annotated[str, _if_kind("chat")] = Field("messages", description="the column with the conversation")
    run_code: Annotated[bool, _if_kind("code")] = Field(
        False, description="of code: run what the model writes, in a sandbox, to score it"
    )


class DataConfig(Section):
    """Where the rows come from."""

    train: str | None = Field(
        None,
        description="a file, 'hub:owner/name[:config]', or 'python-docs'; none where the sites have the rows",
    )
    test: Annotated[str | None, TESTED] = Field(
        None, description="a file or 'hub:...'; scored every round, never trained on"
    )
    revision: str | None = Field(None, description="of a Hub data set: branch, tag or commit")
    train_split: str = Field("train", description="of a Hub data set")
    test_split: Annotated[str, TESTED] = Field("test", description="of a Hub data set")
    train_rows: Positive | None = Field(None, description="use only this many rows, drawn by the seed")
    test_rows: Annotated[Positive | None, TESTED] = Field(
        None, description="use only this many rows, drawn; the same for each seed"
    )
    exclude: dict[str, Any] = Field(
        {}, description="rows left out: those that have this value, or one of these values, in this column"
    )
    delimiter: Annotated[str | None, SEPARATED, Field(min_length=1, max_length=1)] = Field(
        None, description="of .csv and .tsv; default: a comma (or what the header has instead), a tab"
    )
    quoting: Annotated[Literal["auto", "standard", "none"], SEPARATED] = Field(
        "auto", description="of .csv and .tsv: whether fields are quoted; default: of .csv yes, of .tsv no"
    )
    encoding: Annotated[str | None, TEXTUAL] = Field(None, description="of text files; default: UTF-8")
    columns: Annotated[list[str], SEPARATED] = Field(
        [], description="the names of the columns of .csv and .tsv files without a header"
    )
    classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="how many classes the rows must have; also prices a head without them"
    )
    validation_fraction: Share = Field(
        0.0, description="share of each client's training rows scored instead of the test rows"
    )


class ClientsConfig(Section):
    """Who holds what."""

    partition: Literal["iid", "dirichlet", "column", "size"] = Field(
        "iid", description="how the rows are divided among clients"
    )
    count: Annotated[
        Positive,
        UsedIf(lambda config: config.clients.partition != "column", "the column says how many clients there are"),
    ] = Field(8, description="number of clients; 'column' has its own")
    dirichlet_alpha: Annotated[Rate, _if_split("dirichlet")] = Field(0.5, description="of dirichlet: small is uneven")
    column: Annotated[str, _if_split("column")] = Field(
        "client", description="of the split by column: a client for each value"
    )
    sizes: Annotated[list[Rate] | None, _if_split("size")] = Field(
        None, description="of the split by size: relative sizes; default 1, 2, 3, ..."
    )
    min_rows: Positive = Field(1, description="of the split by column: smaller clients are left out; else an error")
    min_characters: Count = Field(0, description="of the split by column: clients with less text are left out")
    holdout_fraction: Share = Field(0.0, description="share of each client's rows kept for its own score")
    holdout_clients: Count = Field(0, description="so many clients never take part and are only scored")
    total_ranks: list[Positive] | dict[str, Positive] | None = Field(
        None, description="of clients whose rank is not the method's: by name, or in turn"
    )
    memory_mib: list[Rate] | dict[str, Rate] | None = Field(
        None, description="for what a client trains, by name or in turn: its rank is the largest that fits"
    )


class MethodConfig(BaseModel):
    """The method by name; the other keys are the method's own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(
        "fed-sb",
        description="`fedsb ls methods` lists them; the method's own options, as rank, are set in the same section",
    )

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class BasisConfig(Section):
    """Where a core's B and A come from. See adapters/basis.py."""

    kind: Literal["random", "weights", "update", "update-pooled", "core"] = Field(
        "weights", description="how B and A are made, see docs/bases.md"
    )
    side: Annotated[Literal["leading", "trailing"], _if_basis("weights", "core")] = Field(
        "leading", description="of weights, and of core's outer basis"
    )
    outer: Annotated[Literal["weights", "random"], _if_basis("core")] = Field(
        "weights", description="of core: the data-free basis around it"
    )
    outer_rank: Annotated[Positive | None, _if_basis("core")] = Field(
        None, description="of core: k; default 4 h r, at most half of min(m, n)"
    )
    samples: Positive = Field(256, description="rows that the gradient is summed over, of all clients together")
    data: Annotated[str | None, _if_basis("update")] = Field(
        None, description="of update: a file of rows that are declared public"
    )
    R0: Literal["auto", "zero", "step"] = Field("auto", description="start at 0, or one approximate full step ahead")
    eta: Rate | Auto = Field("auto", description="of that step; default: the first local step's learning rate")
    refresh: Positive | None = Field(None, description="a new one every so many rounds, from where the run has come")
    share_samples: Count = Field(16, description="rows to report the captured share of the gradient on; 0: do not")
    budget_mib: Positive = Field(1024, description="memory for gradients of whole weights, a group of layers at a time")

    @model_validator(mode="after")
    def _step_needs_a_gradient(self) -> Self:
        if self.R0 == "step" and self.kind in ("random", "weights"):
            raise ValueError(f"R0 = 'step' is a step along a gradient, kind = {self.kind!r} looks at none")
        if self.refresh is not None and self.kind == "weights":
            raise ValueError("refresh would make the same basis again: kind = 'weights' looks at W0, which is frozen")
        return self


class TrainConfig(Section):
    """Local training. See federation/client.py."""

    local_steps: Positive | None = Field(
        None, description="optimiser steps a client takes in a round; 10 without epochs"
    )
    local_epochs: Positive | None = Field(None, description="passes over a client's rows in a round, instead of steps")
    batch_size: Positive = Field(8, description="rows in one forward of a client")
    gradient_accumulation_steps: Positive = Field(1, description="forwards in one optimiser step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of a client")
    lr: Rate = Field(0.01, description="of the adapter")
    head_lr: Rate = Field(0.01, description="of the task head")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled, as in AdamW")
    momentum: Annotated[
        Share, UsedIf(lambda config: config.train.optimizer == "sgd", "train.optimizer is {0.train.optimizer}")
    ] = Field(0.0, description="of sgd")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="L2 over a client's gradients; 0: none")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="over all rounds")
    warmup: Share = Field(0.0, description="share of all steps of all rounds")
    dropout: Share = Field(0.0, description="on the adapter's input")
    persist_optimizer_state: bool = Field(
        False, description="a client carries its optimiser's moments from round to round"
    )

    @model_validator(mode="before")
    @classmethod
    def _ten_steps(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("local_steps") is None and given.get("local_epochs") is None:
            return {**given, "local_steps": 10}
        return given

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("set local_steps or local_epochs, not both; --set train.local_steps=none takes one back")
        return self


class ServerConfig(Section):
    """Rounds and their average."""

    clients_per_round: Positive | None = Field(None, description="drawn afresh each round; default: all")
    min_clients: Positive = Field(1, description="fewer good updates than this end the run")
    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="how updates are averaged: by rows, or all alike"
    )
    codec: Annotated[
        Codec,
        UsedIf(lambda config: not method_of(config).spec.pools_data, "all data are in one place, nothing travels"),
    ] = Field("float32", description="of what travels in a round: 4, 2, 1 or half a byte a value")
    secure_aggregation: bool = Field(False, description="the server learns the sum of the clients' changes only")
    secagg_clip: Annotated[
        Rate, UsedIf(lambda config: config.server.secure_aggregation, "server.secure_aggregation is false")
    ] = Field(4.0, description="of a secure sum: the largest change of a single value")
    max_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        30.0, description="an update whose change is so many times the cohort's median is dropped"
    )
    optimizer: Literal["none", "momentum", "adam"] = Field(
        "none", description="what the server does with the mean change; none: it adds it"
    )
    lr: Annotated[Rate, SERVER_STEPS] = Field(1.0, description="of the server's optimiser")
    beta1: Annotated[Share, SERVER_STEPS] = Field(0.9, description="of the server's optimiser")
    beta2: Annotated[Share, SERVER_STEPS] = Field(0.99, description="of adam")
    tau: Annotated[Rate, SERVER_STEPS] = Field(
        1e-3, description="of adam: what is added to the root of the second moment"
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise ValueError(f"min_clients = {self.min_clients} of {self.clients_per_round} clients_per_round")
        return self

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """For `ServerOptimizer`."""
        return {"kind": self.optimizer, **self.model_dump(include={"lr", "beta1", "beta2", "tau"})}


class PrivacyConfig(Section):
    """A differential-privacy policy, kept by noise. See docs/privacy.md."""

    unit: Literal["none", "example", "client"] = Field(
        "none", description="what is protected: a row, or all of a client's"
    )
    epsilon: Rate | None = Field(None, description="the target; the noise is calibrated to it before any work")
    noise_multiplier: Rate | None = Field(None, description="instead of a target: the noise over the clip")
    delta: Annotated[Annotated[float, Field(gt=0, lt=1)] | Auto, PRIVATE] = Field(
        "auto", description="default: 1e-5, or a tenth of 1 / rows"
    )
    clip: Annotated[Rate, PRIVATE] = Field(
        1.0, description="L2 over all trained tensors: of a row's gradient, or of a client's update"
    )
    basis_share: Annotated[Annotated[float, Field(gt=0, lt=1)] | Auto, PRIVATE] = Field(
        "auto", description="of epsilon, for a core basis"
    )
    release: Annotated[list[Literal["loss", "scores"]], PRIVATE] = Field(
        [], description="computed on private rows, shown, and not covered"
    )

    @property
    def on(self) -> bool:
        return self.unit != "none"

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = [key for key in ("epsilon", "noise_multiplier") if getattr(self, key) is not None]
        if self.on and len(given) != 1:
            raise ValueError("a private run needs epsilon, or noise_multiplier, and not both")
        if not self.on and given:
            raise ValueError(
                f"{given[0]} says how private, unit = 'none' says not at all: set unit to example or client"
            )
        return self


class EngineConfig(Section):
    """What runs the clients."""

    name: Literal["in_process", "flower"] = Field(
        "in_process", description="all clients in this process, or sites over Flower"
    )
    clients_per_forward: Annotated[
        Positive | Auto, UsedIf(lambda config: config.engine.name == "in_process", "engine.name is {0.engine.name}")
    ] = Field("auto", description="of in_process: clients trained in one forward")
    deadline_s: Annotated[
        Rate, UsedIf(lambda config: config.engine.name == "flower", "engine.name is {0.engine.name}")
    ] = Field(3600.0, description="of flower: a site that has not answered by then misses the round")


class EvalConfig(Section):
    every: Positive = Field(1, description="score the test rows every so many rounds, and after the last")
    batch_size: Positive = Field(64, description="rows in one forward while scoring")
    gap: bool = Field(False, description="score each client's own model and the global one on its held-out rows too")

    def due(self, round: int, rounds: int) -> bool:
        """Whether scores are wanted after so many `round`s of `rounds`."""
        return round % self.every == 0 or round == rounds


class ContenderConfig(Section):
    """Something to compare: a name, and what is set for it (`set = { "method.rank" = 8 }`)."""

    name: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = {}


class CompareConfig(Section):
    """What `fedsb compare` runs; no other verb reads it. See comparison/."""

    methods: list[str] = Field([], description="names, or name@rank")
    ranks: list[Positive] = Field([], description="of the methods given without one; default: the method's own rank")
    grid: dict[str, Any] = Field({}, description="a setting and its values: every contender at each of them")
    contenders: list[ContenderConfig] = Field([], description="anything else to compare")
    seeds: Positive = Field(3, description="runs of each contender, with the seeds 0, 1, ...")
    trials: Count = Field(4, description="learning rates tried for each contender; 0: train.lr as it stands")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="data.validation_fraction of the trials"
    )
    target: Annotated[float, Field(allow_inf_nan=False)] | None = Field(None, description="a score to reach")
    reference: str | None = Field(None, description="a contender that the others are compared with; default: the first")
    workers: Positive | Auto = Field("auto", description="runs at a time; default: one a core, or one on a GPU")


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run", description="the run's name, and that of its directory below `out`"
    )
    seed: Count = Field(0, description="every random draw follows from it, but the noise of a private run")
    rounds: Positive = Field(10, description="rounds of the federation")
    out: str = Field("runs", description="the folder for run directories")
    keep_checkpoints: Positive = Field(2, description="how many of the newest checkpoints are kept")
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    method: MethodConfig = MethodConfig()
    basis: Annotated[
        BasisConfig, UsedIf(lambda config: method_of(config).adapter == "core", "{0.method.name} has no basis")
    ] = BasisConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    compare: CompareConfig = Field(CompareConfig(), exclude=True)  # no part of a run's own settings

    @model_validator(mode="after")
    def _eight_bits_mix_rows(self) -> Self:
        """LLM.int8() looks for outliers in the whole batch: one row's gradient depends on the others'."""
        if self.model.quantize == "8bit":
            if self.engine.clients_per_forward not in ("auto", 1):
                raise ValueError(
                    "model.quantize = '8bit' mixes a batch's rows: engine.clients_per_forward must be 1, or 4bit"
                )
            if self.privacy.unit == "example":
                raise ValueError("model.quantize = '8bit' mixes a batch's rows, so none is protected: take 4bit")
        return self

    @model_validator(mode="after")
    def _rows_for_the_gap(self) -> Self:
        if self.eval.gap and not self.clients.holdout_fraction:
            raise ValueError("eval.gap scores clients on rows of their own: set clients.holdout_fraction, say to 0.1")
        return self
