"""The data of every client: tables are loaded, split over clients, held out and tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fedsb.config.inputs import ClientsConfig
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.card import DataCard, make_card
from fedsb.data.names import is_missing, refuse_same_names
from fedsb.data.partition import Partition, split_rows
from fedsb.data.rows import Row, Table, place_of, require_columns
from fedsb.data.tables import load_tables, table_facts
from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import Example, Task, TaskOptions
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.utils.errors import BadRowError, UserError
from fedsb.utils.rng import keyed_generator


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """One client's data. In a deployed federation each site has only its own."""

    name: str
    rows: int  # training examples, n_k: rows, or windows of a long text
    train: list[Example]
    held_out: list[Example]  # for this client's own score
    labels: dict[str, int] | None  # rows of each class
    unseen: bool = False  # never trains and is only scored


def remote_client(name: str, rows: int, labels: dict[str, int] | None = None) -> ClientData:
    """Returns what the server knows of a client whose rows are on another machine."""
    return ClientData(name=name, rows=rows, train=[], held_out=[], labels=labels)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Everything that a run reads."""

    task: Task
    clients: list[ClientData]
    test: list[Example]
    test_description: str
    test_is_public: bool  # a separate table, which counts as public; otherwise rows of the clients
    baseline: float | None  # the score of a guess that reads no text
    best_guess: float | None  # the best score of always predicting the same class, computed from the test rows
    tables: dict[str, dict[str, Any]]  # origin, rows and fingerprint, for the manifest
    choices: tuple[ResolvedSetting, ...]
    card: DataCard

    @property
    def participants(self) -> list[ClientData]:
        """The clients that train."""
        return [client for client in self.clients if not client.unseen]

    def pooled(self) -> ClientData:
        """Returns the data of all participants as one client: a control, for simulation only."""
        clients = self.participants
        train = [example for client in clients for example in client.train]
        rows = sum(client.rows for client in clients)
        return ClientData(name="central", rows=rows, train=train, held_out=[], labels=None)


@dataclass(kw_only=True)
class _Encoded:
    """The examples of all clients."""

    clients: list[ClientData] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)  # of the rows that data.validation_fraction sets aside
    scored: list[Row] = field(default_factory=list)  # the clients' rows that are scored if there is no test table
    cut: int = 0
    unused: int = 0

    def count(self, rows: Sequence[Row], examples: Sequence[Example], cut: int) -> None:
        self.cut, self.unused = self.cut + cut, self.unused + count_unused(rows, examples)


def build_task(config: Config, tokenizer: Tokenizer) -> Task:
    """Returns the task of a configuration. Its classes are not known yet."""
    options = TaskOptions(**config.task.model_dump(exclude={"kind"}))
    return open_task(config.task.kind, tokenizer=tokenizer, options=options, max_tokens=config.model.max_seq_length)


def open_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Loads, splits and tokenises all tables. Raises UserError with what is wrong in the data and how to fix it."""
    task = build_task(config, tokenizer)
    train, test = load_tables(config)
    for table in (train, test):
        if table is not None:
            task.columns_of(table)
    task.fit_labels(train.rows, test.rows if test else [])
    task.name_classes(train.class_names.get(task.options.label, ()))
    partition = _partition(config, task, train)
    unseen = _draw_unseen(config, [shard.name for shard in partition.shards])
    encoded = _encode_clients(config, task, train, partition, unseen)
    fraction = config.data.validation_fraction
    if fraction and not encoded.validation:
        raise UserError(
            f"data.validation_fraction = {fraction} sets aside none of the {len(train.rows):,} rows. Raise it."
        )
    examples, cut = task.encode_test(test.rows) if test else ([], 0)
    unused = count_unused(test.rows, examples) if test else 0
    scored_table = test
    if test is None and encoded.scored:
        origin = _describe_test(None, fraction)
        scored_table = Table(rows=encoded.scored, origin=origin, fingerprint=train.fingerprint)
    card = make_card(
        task,
        train,
        scored_table,
        clients={client.name: client.rows for client in encoded.clients if not client.unseen},
        lost={"train": (encoded.cut, encoded.unused), **({"test": (cut, unused)} if test else {})},
        also_read=_columns_of_settings(config),
        private=config.privacy.on,
        held_out=test is None,
    )
    if fraction:
        examples = encoded.validation
    elif not test:
        examples = [example for client in encoded.clients if not client.unseen for example in client.held_out]
    pool = [example for client in encoded.clients for example in client.train]
    private = config.privacy.on
    return Data(
        task=task,
        clients=encoded.clients,
        test=examples,
        test_description=_describe_test(test, fraction),
        test_is_public=test is not None,
        baseline=task.baseline(pool, examples) if examples and not private else None,
        best_guess=task.best_guess(examples) if examples and (test or not private) else None,
        tables={name: table_facts(table) for name, table in (("train", train), ("test", test)) if table is not None},
        choices=(
            *cut_choices(config, encoded.cut + cut, encoded.unused + unused),
            *_client_choices(partition.dropped, unseen),
        ),
        card=card,
    )


def rows_by_client(config: Config, tokenizer: Tokenizer) -> tuple[dict[str, list[Row]], list[Row]]:
    """Returns (each client's rows, the test rows) as the tables contain them."""
    task = build_task(config, tokenizer)
    train, test = load_tables(config)
    task.columns_of(train)
    task.fit_labels(train.rows, test.rows if test else [])
    shards = _partition(config, task, train).shards
    return {shard.name: [train.rows[i] for i in shard.rows] for shard in shards}, test.rows if test else []


def prepare_client_data(config: Config, task: Task, name: str, table: Table) -> tuple[ClientData, int, int]:
    """Returns (a client's data, its rows that are cut, its rows that are not used) from the client's own table.

    The task's classes must be known.
    """
    rng = keyed_generator(config.seed, "held out", name)
    kept, held = task.hold_out(table.rows, config.clients.holdout_fraction, rng)
    encoded = _Encoded()
    return _encode_client(config, task, name, (kept, held), encoded), encoded.cut, encoded.unused


def count_unused(rows: Sequence[Row], examples: Sequence[Example]) -> int:
    """Returns how many rows became no example. It is 0 for long texts, each of which becomes several."""
    return max(len(rows) - len(examples), 0)


def cut_choices(config: Config, cut: int, unused: int) -> list[ResolvedSetting]:
    """Returns what model.max_seq_length costs, as resolved settings."""
    limit = config.model.max_seq_length
    reason = f"counted: rows longer than model.max_seq_length = {limit}, whose end is not read"
    choices = [ResolvedSetting(key="data.cut", value=cut, reason=reason)]
    if unused:
        reason = f"counted: of these, rows with nothing to learn within {limit} tokens, left out"
        choices.append(ResolvedSetting(key="data.unused", value=unused, reason=reason))
    return choices


def _draw_unseen(config: Config, names: Sequence[str]) -> set[str]:
    """Returns the clients that clients.holdout_clients keeps out of the training."""
    held_out, needed = config.clients.holdout_clients, config.server.min_clients
    left = len(names) - held_out
    if left < 1:
        raise UserError(
            f"clients.holdout_clients = {held_out} of {len(names)} clients leaves none to train. Set it to at most "
            f"{len(names) - 1}."
        )
    if needed > left:
        raise UserError(f"server.min_clients = {needed}, but only {left} clients take part. Set it to at most {left}.")
    return set(keyed_generator(config.seed, "unseen").permutation(names)[:held_out].tolist())


def _partition(config: Config, task: Task, train: Table) -> Partition:
    """Returns which client has which rows. The task's classes must be known."""
    expected, found = config.data.classes, len(task.classes)
    if expected is not None and task.classes and expected != found:
        raise UserError(
            f"data.classes = {expected}, but the rows have {found}: {', '.join(task.classes[:12])}. Set it to "
            f"{found}, or leave out rows that have no class with data.exclude."
        )
    clients = config.clients
    values = [row[task.options.label] for row in train.rows] if task.classes else None
    if clients.partition == "column":
        require_columns(train, [clients.column])
        _check_client_names(train, clients.column)
        values = [row[clients.column] for row in train.rows]
    partition = split_rows(
        clients.partition,
        len(train.rows),
        clients=clients.count,
        seed=config.seed,
        values=values,
        alpha=clients.dirichlet_alpha,
        sizes=clients.sizes,
        min_rows=clients.min_rows,
    )
    return _drop_short_clients(partition, train, task, clients) if clients.min_characters else partition


def _drop_short_clients(partition: Partition, train: Table, task: Task, clients: ClientsConfig) -> Partition:
    """Leaves out natural clients whose texts together are shorter than clients.min_characters."""
    if clients.partition != "column":
        raise UserError(
            f"clients.min_characters = {clients.min_characters} applies to partition = 'column' only, not to "
            f"{clients.partition!r}. Leave it out."
        )
    texts = [name for name in task.columns_of(train) if name != task.options.label]
    length = {
        shard.name: sum(len(str(train.rows[i][name])) for i in shard.rows for name in texts)
        for shard in partition.shards
    }
    kept = [shard for shard in partition.shards if length[shard.name] >= clients.min_characters]
    if not kept:
        raise UserError(
            f"No client has {clients.min_characters} characters of text. The longest has {max(length.values())}. "
            "Lower clients.min_characters."
        )
    out = {shard.name: len(shard.rows) for shard in partition.shards if shard not in kept}
    return Partition(shards=kept, dropped={**partition.dropped, **out})


def _encode_clients(config: Config, task: Task, train: Table, partition: Partition, unseen: set[str]) -> _Encoded:
    encoded, fraction = _Encoded(), config.data.validation_fraction
    for shard in partition.shards:
        name, rows = shard.name, [train.rows[i] for i in shard.rows]
        rng = keyed_generator(config.seed, "held out", name)
        kept, held = task.hold_out(rows, config.clients.holdout_fraction, rng)
        if name not in unseen:
            kept, validation = task.hold_out(kept, fraction, keyed_generator(config.seed, "tune", name))
            with _naming_client(name):
                examples, cut = task.encode_test(validation)
            encoded.validation += examples
            encoded.count(validation, examples, cut)
            encoded.scored += validation if fraction else held
        client = _encode_client(config, task, name, (kept, held), encoded)
        if name in unseen:
            scored = client.held_out or task.encode_test(kept)[0]
            client = replace(client, unseen=True, held_out=scored, train=[], rows=0)
        encoded.clients.append(client)
    return encoded


def _encode_client(
    config: Config, task: Task, name: str, split: tuple[list[Row], list[Row]], counts: _Encoded
) -> ClientData:
    """Returns a client's data from (training rows, held-out rows), and counts the rows that are cut or not used."""
    kept, held = split
    if config.privacy.unit == "example":
        _check_one_example_per_row(task, name, kept)
    with _naming_client(name):
        (train, cut), (held_out, cut_held) = task.encode(kept), task.encode_test(held)
    if not train:
        raise UserError(f"Client {name!r} has no usable row among its {len(kept)} rows. Raise clients.min_rows.")
    counts.count(kept, train, cut)
    counts.count(held, held_out, cut_held)
    labels = _count_labels(task, kept)
    return ClientData(name=name, rows=len(train), train=train, held_out=held_out, labels=labels)


@contextmanager
def _naming_client(name: str) -> Iterator[None]:
    """Adds the client's name to the error of a row."""
    try:
        yield
    except BadRowError as error:
        raise BadRowError(f"client {name!r}: {error}") from error


def _check_client_names(train: Table, column: str) -> None:
    """Raises UserError for a row without a client, and for client names that differ by spaces alone."""
    for number, row in enumerate(train.rows, start=1):
        if is_missing(row[column]):
            raise BadRowError(
                f"{place_of(row, number)}: the column {column!r} (clients.column) contains {row[column]!r}, which is "
                "not a name. Fill it in, or leave such rows out with data.exclude."
            )
    refuse_same_names(dict.fromkeys(str(row[column]) for row in train.rows), "the clients")


def _check_one_example_per_row(task: Task, name: str, rows: list[Row]) -> None:
    """Raises UserError if a row becomes several examples.

    Each example is sampled and clipped separately, so that such a row would not be protected as one row.
    """
    if cut := task.count_split_rows(rows):
        raise UserError(
            f"privacy.unit = 'example': {cut} of the {len(rows)} rows of client {name!r} are longer than "
            f"model.max_seq_length = {task.max_tokens} and would be cut into several examples. Epsilon would then "
            "cover a part of a row only. Raise model.max_seq_length, or cut the rows yourself if a passage is what "
            "must be protected."
        )


def _count_labels(task: Task, rows: Sequence[Row]) -> dict[str, int] | None:
    """Returns the number of rows of each class, in the order of the classes."""
    if not task.classes:
        return None
    counted = Counter(str(row[task.options.label]) for row in rows)
    return {name: counted[name] for name in task.classes}


def _columns_of_settings(config: Config) -> list[str]:
    """Returns the columns that are read for another purpose than the task."""
    return [*config.data.exclude, *([config.clients.column] if config.clients.partition == "column" else [])]


def _describe_test(test: Table | None, fraction: float) -> str:
    """Returns a description of the rows that are scored every round."""
    if fraction:
        return f"{fraction:g} of the training rows of all participants, which are not trained on"
    return f"{test.origin}, {len(test.rows):,} rows" if test else "the held-out rows of all participants"


def _client_choices(dropped: dict[str, int], unseen: set[str]) -> list[ResolvedSetting]:
    choices = []
    if dropped:
        reason = "counted: clients below clients.min_rows or clients.min_characters, left out"
        choices.append(ResolvedSetting(key="clients.dropped", value=len(dropped), reason=reason))
    if unseen:
        names = ", ".join(sorted(unseen))
        choices.append(ResolvedSetting(key="clients.holdout_clients", value=names, reason="drawn by the seed"))
    return choices
