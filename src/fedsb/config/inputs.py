"""The sections of a TOML that describe what a run reads: the base model, the task, the rows and the clients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedsb.config.section import Count, Positive, Rate, Section, Share, UsedIf, used_if

if TYPE_CHECKING:
    from fedsb.config.schema import Config

HEADS = ("classification", "regression")  # tasks whose models have a head
GRADED = ("arithmetic", "commonsense", "code")  # tasks whose answers are graded
HUB = "hub:"  # the start of the name of a data set on the Hub


def _tables(config: Config) -> list[str]:
    """Returns the sources of the training and test rows."""
    test = None if config.data.validation_fraction else config.data.test
    return [source for source in (config.data.train, test) if source]


def _if_read(*extensions: str) -> UsedIf:
    def is_read(config: Config) -> bool:
        public = config.basis.data if config.basis.kind == "update" else None
        sources = [*_tables(config), *([public] if public else [])]
        return any(source.removesuffix(".gz").lower().endswith(extensions) for source in sources)

    return UsedIf(is_read, f"no {' or '.join(extensions)} file is read here")


def writes_answers(config: Config) -> bool:
    """Returns whether scoring generates text, which is then graded."""
    return config.task.kind in GRADED and config.task.score in ("auto", "answers")


SEPARATED = _if_read(".csv", ".tsv")
TEXTUAL = _if_read(".csv", ".tsv", ".json", ".jsonl")
TESTED = UsedIf(lambda config: not config.data.validation_fraction, "data.validation_fraction takes training rows")
HAS_TEST = UsedIf(lambda c: c.data.test is not None or c.data.train == "python-docs", "data.test is not set")


class ModelConfig(Section):
    """The base model. It stays frozen and is never sent."""

    name: str = "minilm"
    """Folder of the model, its name on the Hub, 'minilm' (an encoder) or 'smollm2' (a chat model)."""
    revision: Annotated[
        str | None, UsedIf(lambda config: not Path(config.model.name).is_dir(), "model.name is a folder")
    ] = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model. Default: bfloat16 if the run starts on a GPU that supports it, else float32."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Quantisation of the blocks' linear layers, by bitsandbytes."""
    device: str = "auto"
    """Device of the model: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."""
    placement: Literal["single", "balanced", "sharded"] = "single"
    """Placement of the weights: one device, all GPUs of this process, or the processes of torchrun, see docs/gpu.md."""
    compile: Annotated[
        bool, UsedIf(lambda config: config.privacy.unit != "example", "steps that protect single rows are not compiled")
    ] = False
    """Whether to compile the forward and backward of training with torch.compile. Pays off in long runs on a GPU."""
    target_modules: str | list[str] = "blocks"
    """Layers to adapt: 'blocks', a regular expression, or a list of name endings."""
    max_seq_length: Annotated[int, Field(ge=2)] = 128
    """Maximum number of tokens per row. Longer rows are truncated."""
    template_date: Annotated[
        Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None,
        used_if("task.kind", "instruction", "chat", *GRADED),
    ] = None
    """Date that chat templates write, such as 2026-01-31. Default: the day on which the run starts."""
    activation_checkpointing: bool = False
    """Whether to recompute activations in the backward pass. Saves memory, costs one forward."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Implementation of attention, as in transformers."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products in training and scoring, as in PyTorch."""


class TaskConfig(Section):
    """The task, and the columns that it reads."""

    kind: Literal[
        "classification", "regression", "text", "instruction", "chat", "arithmetic", "commonsense", "code"
    ] = "classification"
    """Kind of task, see docs/tasks.md."""
    text: Annotated[str, used_if("task.kind", *HEADS, "text")] = "text"
    """Column with the text."""
    text_pair: Annotated[str | None, used_if("task.kind", *HEADS)] = None
    """Column with a second text."""
    label: Annotated[str, used_if("task.kind", *HEADS)] = "label"
    """Column with the class or the number to predict."""
    prompt: Annotated[str, used_if("task.kind", "instruction", *GRADED)] = "prompt"
    """Column with the prompt."""
    answer: Annotated[str, used_if("task.kind", "instruction", *GRADED)] = "answer"
    """Column with the answer."""
    input: Annotated[str, used_if("task.kind", "instruction")] = "input"
    """Column with an additional input. Tables without it are accepted."""
    names: Annotated[dict[str, str], used_if("task.kind", "classification")] = Field({})
    """Name of the class for each label, such as { 0 = 'negative' }."""
    pooling: Annotated[Literal["model", "mean"], used_if("task.kind", *HEADS)] = "model"
    """Pooling before the head: the model's own, or the mean over the tokens."""
    score: Annotated[Literal["auto", "answers", "options", "loss"], used_if("task.kind", *GRADED)] = "auto"
    """What is scored: generated answers, the likeliest option, or the loss. Default: answers."""
    metric: Annotated[
        Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman"], used_if("task.kind", *HEADS)
    ] = "auto"
    """Metric. Default: accuracy for classification, pearson for regression."""
    new_tokens: Annotated[Positive | None, UsedIf(writes_answers, "no answers are written")] = None
    """Maximum number of tokens in a generated answer. Default: depends on the benchmark."""
    messages: Annotated[str, used_if("task.kind", "chat")] = "messages"
    """Column with the conversation."""
    run_code: Annotated[bool, used_if("task.kind", "code")] = False
    """Whether to execute the code that the model writes, in a sandbox, to score it."""


class DataConfig(Section):
    """The rows to train on and to score."""

    train: str | None = None
    """Training rows: a file, 'hub:owner/name[:config]', or 'python-docs'. Not set if the sites have the rows."""
    test: Annotated[str | None, TESTED] = None
    """Test rows: a file or 'hub:owner/name[:config]'. They are never trained on."""
    revision: Annotated[
        str | None,
        UsedIf(lambda c: any(source.startswith(HUB) for source in _tables(c)), "no data set of the Hub is read"),
    ] = None
    """Branch, tag or commit of a data set on the Hub."""
    train_split: Annotated[
        str, UsedIf(lambda c: (c.data.train or "").startswith(HUB), "data.train is not a data set of the Hub")
    ] = "train"
    """Split of the data set on the Hub that contains the training rows."""
    test_split: Annotated[
        str, TESTED, UsedIf(lambda c: (c.data.test or "").startswith(HUB), "data.test is not a data set of the Hub")
    ] = "test"
    """Split of the data set on the Hub that contains the test rows."""
    train_rows: Positive | None = None
    """Number of training rows to use, drawn by the seed. Default: all."""
    test_rows: Annotated[Positive | None, TESTED, HAS_TEST] = None
    """Number of test rows to use, the same for every seed. Default: all."""
    exclude: dict[str, Any] = Field({})
    """Rows to leave out, by column: those with this value, or with one of these values."""
    delimiter: Annotated[str | None, SEPARATED, Field(min_length=1, max_length=1)] = None
    """Delimiter of .csv and .tsv files. Default: the comma, or what the header has; the tab."""
    quoting: Annotated[Literal["auto", "standard", "none"], SEPARATED] = "auto"
    """Whether fields of .csv and .tsv files are quoted. Default: yes in .csv, no in .tsv."""
    encoding: Annotated[str | None, TEXTUAL] = None
    """Encoding of text files. Default: UTF-8."""
    columns: Annotated[list[str], SEPARATED] = Field([])
    """Names of the columns of .csv and .tsv files without a header."""
    classes: Annotated[int, Field(ge=2)] | None = None
    """Expected number of classes. `fedsb check` uses it if the rows are not available."""
    validation_fraction: Share = 0.0
    """Fraction of each client's training rows that is scored instead of the test rows."""


class ClientsConfig(Section):
    """The clients, and how the rows are divided among them."""

    partition: Literal["iid", "dirichlet", "column", "size"] = "iid"
    """How the rows are divided among the clients."""
    count: Annotated[
        Positive,
        UsedIf(lambda config: config.clients.partition != "column", "the column says how many clients there are"),
    ] = 8
    """Number of clients."""
    dirichlet_alpha: Annotated[Rate, used_if("clients.partition", "dirichlet")] = 0.5
    """Concentration of the Dirichlet distribution. Small values give uneven clients."""
    column: Annotated[str, used_if("clients.partition", "column")] = "client"
    """Column with the client's name. Each value is one client."""
    sizes: Annotated[list[Rate] | None, used_if("clients.partition", "size")] = None
    """Relative sizes of the clients. Default: 1, 2, 3, ..."""
    min_rows: Positive = 1
    """Minimum number of rows per client. With a column, smaller clients are left out; else an error."""
    min_characters: Annotated[Count, used_if("clients.partition", "column")] = 0
    """Minimum number of characters per client. Clients with less text are left out."""
    holdout_fraction: Share = 0.0
    """Fraction of each client's rows that is kept for the client's own score."""
    holdout_clients: Count = 0
    """Number of clients that never take part and are only scored."""
    total_ranks: list[Positive] | dict[str, Positive] | None = None
    """Total ranks of clients: by name, or a list that is repeated. Default: the method's."""
    memory_mib: list[Rate] | dict[str, Rate] | None = None
    """Memory for the trained values of a client: sets its total rank to the largest that fits."""
