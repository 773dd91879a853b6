"""From the settings to what each site holds: tables loaded, rows split over clients, held out, and tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import ClientsConfig, Config
from fedsb.data.card import DataCard, make_card
from fedsb.data.names import SHOWN, is_missing, refuse_same_names
from fedsb.data.partition import Partition, split_rows
from fedsb.data.sources import (
    FileFormat,
    Row,
    Table,
    load_table,
    make_table,
    place_of,
    require_columns,
    with_values,
)
from fedsb.data.tasks import Example, Task, TaskOptions, Tokenizer, open_task
from fedsb.data.tasks.answers import Answers
from fedsb.utils.errors import BadRowError, UserError, did_you_mean
from fedsb.utils.rng import generator

TEST_SEED = 0  # runs with other seeds are scored on the same rows


@dataclass(frozen=True, kw_only=True)
class Site:
    """One client's data, on its own machine in a real federation."""

    name: str
    rows: int  # training examples, n_k: rows, or windows of a long text
    train: list[Example]
    held_out: list[Example]  # for this client's own score
    labels: dict[str, int] | None  # rows of each class
    unseen: bool = False  # never takes part, is only scored


def elsewhere(name: str, rows: int, labels: dict[str, int] | None = None) -> Site:
    """A site of which only this is known here."""
    return Site(name=name, rows=rows, train=[], held_out=[], labels=labels)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Everything a run reads."""

    task: Task
    sites: list[Site]
    test: list[Example]
    test_is: str  # in words
    test_is_public: bool  # a table of its own, which is taken as public; else rows of the clients
    baseline: float | None  # the score of a guess that reads no text
    best_guess: float | None  # the best score of predicting one class always, known to who has the test rows
    tables: dict[str, dict[str, Any]]  # origin, rows and fingerprint, for the manifest
    choices: tuple[ResolvedSetting, ...]
    card: DataCard

    @property
    def taking_part(self) -> list[Site]:
        return [site for site in self.sites if not site.unseen]

    def pooled(self) -> Site:
        """All data of those who take part in one place; a control, for simulation only."""
        sites = self.taking_part
        train = [example for site in sites for example in site.train]
        return Site(name="central", rows=sum(site.rows for site in sites), train=train, held_out=[], labels=None)


def open_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Loads, splits and tokenises. Raises UserError with what is wrong in the data and what to do about it."""
    task = open_task_of(config, tokenizer)
    train, test = _tables(config)
    share = config.data.validation_fraction
    for table in (train, test):
        if table is not None:
            task.columns_of(table)
    task.fit_labels(train.rows, test.rows if test else [])
    task.name_classes(train.class_names.get(task.options.label, ()))
    partition = _partition(config, task, train)
    clients = config.clients
    if clients.holdout_clients >= len(partition.shards):
        raise UserError(
            f"clients.holdout_clients = {clients.holdout_clients} of {len(partition.shards)} clients: nobody would "
            f"take part"
        )
    taking_part = len(partition.shards) - clients.holdout_clients
    if config.server.min_clients > taking_part:
        raise UserError(f"server.min_clients = {config.server.min_clients}, but {taking_part} clients take part")
    names = [shard.name for shard in partition.shards]
    unseen = set(generator(config.seed, "unseen").permutation(names)[: clients.holdout_clients].tolist())
    cut = unused = 0
    sites: list[Site] = []
    tune: list[Example] = []
    scored_rows: list[Row] = []  # of the clients, where no test table is
    for shard in partition.shards:
        rows = [train.rows[i] for i in shard.rows]
        kept, held = task.hold_out(rows, clients.holdout_fraction, generator(config.seed, "held out", shard.name))
        if shard.name not in unseen:
            kept, scored = task.hold_out(kept, share, generator(config.seed, "tune", shard.name))
            with _of_client(shard.name):
                scored_examples, cut_scored = task.encode_test(scored)
            scored_rows += scored if share else held
            tune, cut, unused = tune + scored_examples, cut + cut_scored, unused + _lost(scored, scored_examples)
        site, cut_here, unused_here = _encoded(config, task, shard.name, kept, held)
        if shard.name in unseen:
            site = replace(site, unseen=True, held_out=site.held_out or task.encode_test(kept)[0], train=[], rows=0)
        sites.append(site)
        cut, unused = cut + cut_here, unused + unused_here
    test_examples, cut_test = task.encode_test(test.rows) if test else ([], 0)
    unused_test = _lost(test.rows, test_examples) if test else 0
    if share and not tune:
        raise UserError(f"data.validation_fraction = {share} leaves no row of {len(train.rows):,} to score: raise it")
    if share:
        test_examples = tune
    elif not test:
        test_examples = [example for site in sites if not site.unseen for example in site.held_out]
    pool = [example for site in sites for example in site.train]
    scored_table = test
    if test is None and scored_rows:
        scored_table = Table(rows=scored_rows, origin=_scored(None, share), fingerprint=train.fingerprint)
    card = make_card(
        task,
        train,
        scored_table,
        clients={site.name: site.rows for site in sites if not site.unseen},
        lost={"train": (cut, unused), **({"test": (cut_test, unused_test)} if test else {})},
        also_read=_read_by_settings(config),
        private=config.privacy.on,
        held_out=test is None,
    )
    return Data(
        task=task,
        sites=sites,
        test=test_examples,
        test_is=_scored(test, share),
        test_is_public=test is not None,
        baseline=task.baseline(pool, test_examples) if test_examples and not config.privacy.on else None,
        best_guess=task.best_guess(test_examples) if test_examples and (test or not config.privacy.on) else None,
        tables={name: table_facts(table) for name, table in (("train", train), ("test", test)) if table is not None},
        choices=_choices(config, cut + cut_test, unused + unused_test, partition.dropped, unseen),
        card=card,
    )


def _partition(config: Config, task: Task, train: Table) -> Partition:
    """Who holds which rows. The task's classes are known."""
    wanted, found = config.data.classes, len(task.classes)
    if wanted is not None and task.classes and wanted != found:
        raise UserError(
            f"data.classes = {wanted}, but the rows have {found}: {', '.join(task.classes[:12])}. Set it to "
            f"{found}, or leave out rows that have no class with data.exclude"
        )
    labels = [row[task.options.label] for row in train.rows] if task.classes else None
    clients = config.clients
    if clients.partition == "column":
        require_columns(train, [clients.column])
        _refuse_client_names(train, clients.column)
    partition = split_rows(
        clients.partition,
        len(train.rows),
        clients=clients.count,
        seed=config.seed,
        labels=labels,
        column=[row[clients.column] for row in train.rows] if clients.partition == "column" else None,
        alpha=clients.dirichlet_alpha,
        sizes=clients.sizes,
        min_rows=clients.min_rows,
    )
    if clients.min_characters:
        partition = _enough_text(partition, train, task, clients)
    return partition


def rows_by_client(config: Config, tokenizer: Tokenizer) -> tuple[dict[str, list[Row]], list[Row]]:
    """(the rows of each that takes part, the test rows), as they stand in the tables."""
    task = open_task_of(config, tokenizer)
    train, test = _tables(config)
    task.columns_of(train)
    task.fit_labels(train.rows, test.rows if test else [])
    shards = _partition(config, task, train).shards
    return {shard.name: [train.rows[i] for i in shard.rows] for shard in shards}, test.rows if test else []


def open_own(config: Config, task: Task, name: str, table: Table) -> tuple[Site, int, int]:
    """(what a site holds that has a table of its own, its rows that were cut, and those left out).

    The task's classes are known.
    """
    kept, held = task.hold_out(table.rows, config.clients.holdout_fraction, generator(config.seed, "held out", name))
    return _encoded(config, task, name, kept, held)


def _encoded(config: Config, task: Task, name: str, kept: list[Row], held: list[Row]) -> tuple[Site, int, int]:
    if config.privacy.unit == "example":
        _refuse_pieces(task, name, kept)
    with _of_client(name):
        (examples, cut_kept), (held_examples, cut_held) = task.encode(kept), task.encode_test(held)
    if not examples:
        raise UserError(f"client {name!r} has no usable row of its {len(kept)}; raise clients.min_rows")
    labels = _count(task, kept, task.options.label)
    site = Site(name=name, rows=len(examples), train=examples, held_out=held_examples, labels=labels)
    return site, cut_kept + cut_held, _lost(kept, examples) + _lost(held, held_examples)


@contextmanager
def _of_client(name: str) -> Iterator[None]:
    """Names the client in the error of a row."""
    try:
        yield
    except BadRowError as error:
        raise BadRowError(f"client {name!r}: {error}") from error


def _refuse_client_names(train: Table, column: str) -> None:
    """Raises UserError for rows without a client, and for names of clients that differ by spaces alone."""
    for number, row in enumerate(train.rows, start=1):
        if is_missing(row[column]):
            raise BadRowError(
                f"{place_of(row, number)}: the column {column!r} (clients.column) contains {row[column]!r}, which is "
                "not a name. Fill it in, or leave such rows out with data.exclude."
            )
    refuse_same_names(dict.fromkeys(str(row[column]) for row in train.rows), "the clients")


def _refuse_pieces(task: Task, name: str, rows: list[Row]) -> None:
    """Each example is drawn and clipped for itself: a row that becomes several is not protected as one row."""
    if cut := task.cut_in_pieces(rows):
        raise UserError(
            f"privacy.unit = 'example': of the {len(rows)} rows of client {name!r} {cut} "
            f"are longer than model.max_seq_length = {task.max_tokens} and would be cut into several examples, so that "
            "epsilon would be for a part of a row. Raise it; or cut the rows yourself, if a passage is what to protect"
        )


def load_own(
    config: Config,
    task: Task,
    source: str,
    columns: Mapping[str, str],
    *,
    allowed: Collection[str] | None = None,
    revision: str | None = None,
    split: str = "train",
    form: FileFormat | None = None,
) -> Table:
    """A site's own table, with the columns that the task reads. `columns` are the site's names of them.

    Of the columns that are not `allowed` (None: all are) nothing is kept. Which rows there are is the site's to say:
    revision and split of a Hub data set are not the run's.
    """
    table = _load(source, revision, split, form)
    if allowed is not None:
        kept = [with_values(row, {key: row[key] for key in row if key in allowed}) for row in table.rows]
        table = replace(table, rows=kept)
    require_columns(table, list(columns.values()))
    ours = {theirs: name for name, theirs in columns.items()}
    rows = [with_values(row, {ours.get(key, key): value for key, value in row.items()}) for row in table.rows]
    if columns or allowed is not None:
        table = replace(table, rows=rows, fingerprint=make_table(rows, table.origin).fingerprint, class_names={})
    table = _dropped(table, config.data.exclude)[0]
    task.columns_of(table)
    return table


def load_test(config: Config, task: Task) -> Table | None:
    """The test table of a run whose training rows are elsewhere."""
    data = config.data
    if data.test is None:
        return None
    table = _dropped(_load(data.test, data.revision, data.test_split, format_of(config)), data.exclude)[0]
    table = draw_rows(table, data.test_rows, TEST_SEED, "test rows")
    task.columns_of(table)
    return table


def open_task_of(config: Config, tokenizer: Tokenizer) -> Task:
    """The task of a configuration, its classes not yet fitted."""
    options = TaskOptions(**config.task.model_dump(exclude={"kind"}))
    return open_task(config.task.kind, tokenizer=tokenizer, options=options, max_tokens=config.model.max_seq_length)


def load_rows(config: Config, task: Task, source: str | None) -> Table:
    """Rows to score: of `source`, or the run's own test. Raises UserError where there are neither."""
    if source is not None:
        table: Table | None = _load(source, None, config.data.test_split, format_of(config))
    else:
        table = load_test(config, task) if config.data.train is None else _tables(config)[1]
    if table is None:
        raise UserError("this run has no test file of its own: name one with --data PATH")
    task.columns_of(table)
    return table


def load_unlabelled(config: Config, task: Task, source: str) -> Table:
    """Returns rows to predict. Raises UserError where a column that the model reads is missing."""
    table = _load(source, None, config.data.test_split, format_of(config))
    require_read_columns(task, table)
    return table


def require_read_columns(task: Task, table: Table) -> None:
    """Raises UserError where a table lacks a column that the model reads; it needs no labels."""
    if isinstance(task, Answers):
        task.asking_layout(table.columns, table.origin)
    else:
        require_columns(table, task.reads)


def _tables(config: Config) -> tuple[Table, Table | None]:
    data = config.data
    test: Table | None = None
    if data.train is None:
        raise UserError(
            "data.train is not set: name the rows to train on (a file, hub:owner/name, or python-docs). Only "
            "`fedsb serve` goes without, whose rows are at the sites"
        )
    if data.train == "python-docs":
        from fedsb.data import python_docs

        train, test = python_docs.tables()
    else:
        train = _load(data.train, data.revision, data.train_split, format_of(config))
    if data.validation_fraction:
        test = None  # not even read: what is tuned must not see it
    elif data.test is not None:
        test = _load(data.test, data.revision, data.test_split, format_of(config))
    train, test = _drop_from(train, test, data.exclude)
    train = draw_rows(train, data.train_rows, config.seed, "train rows")
    return train, None if test is None else draw_rows(test, data.test_rows, TEST_SEED, "test rows")


def _drop_from(train: Table, test: Table | None, drop: Mapping[str, Any]) -> tuple[Table, Table | None]:
    """The tables without the rows that data.exclude names. Raises UserError for a value that no row has."""
    left, counts = _dropped(train, drop)
    left_test, more = (None, {}) if test is None else _dropped(test, drop)
    for (column, value), rows in counts.items():
        if rows + more.get((column, value), 0) == 0:
            names = list(dict.fromkeys("" if row[column] is None else str(row[column]) for row in train.rows))
            known = did_you_mean(str(value), names) if len(names) <= 4 * SHOWN else f"as {', '.join(names[:SHOWN])} ..."
            raise UserError(
                f"data.exclude leaves out rows with {value!r} in the column {column!r}, and no row has it: {known}. "
                "Correct the value, or remove it from data.exclude."
            )
    return left, left_test


def _dropped(table: Table, drop: Mapping[str, Any]) -> tuple[Table, dict[tuple[str, str], int]]:
    """(the table without the rows that have one of these values, how many rows have each).

    Raises UserError where nothing is left.
    """
    wanted = [(key, value) for key, of in drop.items() for value in (of if isinstance(of, list) else [of])]
    if not wanted:
        return table, {}
    require_columns(table, list(drop))
    counts = {(key, str(value)): 0 for key, value in wanted}
    left = []
    for row in table.rows:
        has = [(key, str(value)) for key, value in wanted if _is_value(row[key], value)]
        for each in has:
            counts[each] += 1
        if not has:
            left.append(row)
    made = make_table(left, table.origin)
    dropped = len(table.rows) - len(left)
    return replace(table, rows=left, fingerprint=made.fingerprint, dropped=dropped), counts


def _is_value(cell: object, value: object) -> bool:
    """Whether a cell has a value of the TOML, whose file may keep numbers and true or false as text; "" is null too."""
    if isinstance(value, bool) or isinstance(cell, bool):
        return str(cell).strip().lower() == str(value).lower()
    if isinstance(value, int | float) and isinstance(cell, int | float | str):
        try:
            return float(cell) == float(value)
        except (ValueError, OverflowError):
            return False
    return str("" if cell is None else cell) == str(value)


def format_of(config: Config) -> FileFormat:
    """Returns how the files of the configuration are read."""
    data = config.data
    return FileFormat(
        delimiter=data.delimiter, quoting=data.quoting, encoding=data.encoding, columns=tuple(data.columns)
    )


def _load(source: str, revision: str | None, split: str, form: FileFormat | None = None) -> Table:
    """Revision and split are a Hub data set's; a local file has none."""
    if source.startswith("hub:"):
        return load_table(source, revision=revision, split=split)
    return load_table(source, form=form)


def draw_rows(table: Table, rows: int | None, seed: int, which: str) -> Table:
    """Returns `rows` rows of the table, drawn by the seed, in their order: a file may be sorted by label."""
    if rows is None or rows >= len(table.rows):
        return table
    drawn = sorted(generator(seed, which).permutation(len(table.rows))[:rows].tolist())
    return replace(table, rows=[table.rows[i] for i in drawn], total=len(table.rows))


def _read_by_settings(config: Config) -> list[str]:
    """The columns that are read for something else than the task."""
    return [*config.data.exclude, *([config.clients.column] if config.clients.partition == "column" else [])]


def _enough_text(partition: Partition, train: Table, task: Task, clients: ClientsConfig) -> Partition:
    """Leaves out natural clients whose texts together are shorter than clients.min_characters."""
    if clients.partition != "column":
        raise UserError(f"clients.min_characters is of the split by column; this one is {clients.partition!r}")
    texts = [name for name in task.columns_of(train) if name != task.options.label]
    length = {
        shard.name: sum(len(str(train.rows[i][name])) for i in shard.rows for name in texts)
        for shard in partition.shards
    }
    kept = [shard for shard in partition.shards if length[shard.name] >= clients.min_characters]
    if not kept:
        raise UserError(
            f"no client has {clients.min_characters} characters of text; the longest has {max(length.values())}: "
            "lower clients.min_characters"
        )
    out = {shard.name: len(shard.rows) for shard in partition.shards if shard not in kept}
    return Partition(shards=kept, dropped={**partition.dropped, **out})


def _scored(test: Table | None, tune_share: float) -> str:
    """The rows that are scored every round, in words."""
    if tune_share:
        return f"{tune_share:g} of the training rows of all who take part, which are not trained on"
    return f"{test.origin}, {len(test.rows):,} rows" if test else "the held-out rows of all who take part"


def _count(task: Task, rows: Sequence[Row], column: str) -> dict[str, int] | None:
    """Rows of each class, in the classes' order."""
    if not task.classes:
        return None
    counted = Counter(str(row[column]) for row in rows)
    return {name: counted[name] for name in task.classes}


def table_facts(table: Table) -> dict[str, Any]:
    return {"origin": table.origin, "rows": len(table.rows), "fingerprint": table.fingerprint}


def _lost(rows: Sequence[Row], examples: Sequence[Example]) -> int:
    """Rows that made no example; of a text, whose windows are examples of their own, none."""
    return max(len(rows) - len(examples), 0)


def cut_choices(config: Config, cut: int, unused: int) -> list[ResolvedSetting]:
    """What model.max_seq_length costs."""
    choices = [
        ResolvedSetting(
            key="data.cut",
            value=cut,
            reason=f"counted: rows longer than model.max_seq_length = {config.model.max_seq_length}, their end is "
            f"not read",
        )
    ]
    if unused:
        reason = f"counted: of these, rows with nothing to learn within {config.model.max_seq_length} tokens, left out"
        choices.append(ResolvedSetting(key="data.unused", value=unused, reason=reason))
    return choices


def _choices(
    config: Config, cut: int, unused: int, dropped: dict[str, int], unseen: set[str]
) -> tuple[ResolvedSetting, ...]:
    choices = cut_choices(config, cut, unused)
    if dropped:
        reason = "counted: clients under clients.min_rows or clients.min_characters, left out"
        choices.append(ResolvedSetting(key="clients.dropped", value=len(dropped), reason=reason))
    if unseen:
        choices.append(
            ResolvedSetting(key="clients.holdout_clients", value=", ".join(sorted(unseen)), reason="drawn by the seed")
        )
    return tuple(choices)
