"""From the settings to what each site holds: tables loaded, rows split over clients, held out, and tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsb.data.partition import Partition, split_rows
from fedsb.data.sources import Row, Table, load_table, make_table, require_columns
from fedsb.data.tasks import Example, Task, TaskOptions, Tokenizer, open_task
from fedsb.data.tasks.answers import Answers
from fedsb.draws import generator
from fedsb.errors import UserError
from fedsb.settings import Choice, ClientsConfig, Config


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
    tables: dict[str, dict[str, Any]]  # origin, rows and fingerprint, for the manifest
    choices: tuple[Choice, ...]

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
    share = config.data.tune_share
    for table in (train, test):
        if table is not None:
            task.columns_of(table)
    task.fit_labels(train.rows, test.rows if test else [])
    partition = _partition(config, task, train)
    clients = config.clients
    if clients.unseen >= len(partition.shards):
        raise UserError(f"clients.unseen = {clients.unseen} of {len(partition.shards)} clients: nobody would take part")
    taking_part = len(partition.shards) - clients.unseen
    if config.server.min_clients > taking_part:
        raise UserError(f"server.min_clients = {config.server.min_clients}, but {taking_part} clients take part")
    names = [shard.name for shard in partition.shards]
    unseen = set(generator(config.seed, "unseen").permutation(names)[: clients.unseen].tolist())
    cut = unused = 0
    sites: list[Site] = []
    tune: list[Example] = []
    for shard in partition.shards:
        rows = [train.rows[i] for i in shard.rows]
        kept, held = task.hold_out(rows, clients.held_out, generator(config.seed, "held out", shard.name))
        if shard.name not in unseen:
            kept, scored = task.hold_out(kept, share, generator(config.seed, "tune", shard.name))
            scored_examples, cut_scored = task.encode_test(scored)
            tune, cut, unused = tune + scored_examples, cut + cut_scored, unused + _lost(scored, scored_examples)
        site, cut_here, unused_here = _encoded(config, task, shard.name, kept, held)
        if shard.name in unseen:
            site = replace(site, unseen=True, held_out=site.held_out or task.encode_test(kept)[0], train=[], rows=0)
        sites.append(site)
        cut, unused = cut + cut_here, unused + unused_here
    test_examples, cut_test = task.encode_test(test.rows) if test else ([], 0)
    unused += _lost(test.rows, test_examples) if test else 0
    if share and not tune:
        raise UserError(f"data.tune_share = {share} leaves no row of {len(train.rows):,} to score: raise it")
    if share:
        test_examples = tune
    elif not test:
        test_examples = [example for site in sites if not site.unseen for example in site.held_out]
    pool = [example for site in sites for example in site.train]
    return Data(
        task=task,
        sites=sites,
        test=test_examples,
        test_is=_scored(test, share),
        test_is_public=test is not None,
        baseline=task.baseline(pool, test_examples) if test_examples and not config.privacy.on else None,
        tables={name: table_facts(table) for name, table in (("train", train), ("test", test)) if table is not None},
        choices=_choices(config, cut + cut_test, unused, partition.dropped, unseen),
    )


def _partition(config: Config, task: Task, train: Table) -> Partition:
    """Who holds which rows. The task's classes are known."""
    wanted, found = config.data.classes, len(task.classes)
    if wanted is not None and task.classes and wanted != found:
        raise UserError(
            f"data.classes = {wanted}, but the rows have {found}: {', '.join(task.classes[:12])}. Set it to "
            f"{found}, or leave out rows that have no class with data.drop"
        )
    labels = [row[task.options.label] for row in train.rows] if task.classes else None
    clients = config.clients
    if clients.split == "column":
        require_columns(train, [clients.column])
    partition = split_rows(
        clients.split,
        len(train.rows),
        clients=clients.count,
        seed=config.seed,
        labels=labels,
        column=[row[clients.column] for row in train.rows] if clients.split == "column" else None,
        alpha=clients.alpha,
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
    kept, held = task.hold_out(table.rows, config.clients.held_out, generator(config.seed, "held out", name))
    return _encoded(config, task, name, kept, held)


def _encoded(config: Config, task: Task, name: str, kept: list[Row], held: list[Row]) -> tuple[Site, int, int]:
    if config.privacy.unit == "example":
        _refuse_pieces(task, name, kept)
    (examples, cut_kept), (held_examples, cut_held) = task.encode(kept), task.encode_test(held)
    if not examples:
        raise UserError(f"client {name!r} has no usable row of its {len(kept)}; raise clients.min_rows")
    labels = _count(task, kept, task.options.label)
    site = Site(name=name, rows=len(examples), train=examples, held_out=held_examples, labels=labels)
    return site, cut_kept + cut_held, _lost(kept, examples) + _lost(held, held_examples)


def _refuse_pieces(task: Task, name: str, rows: list[Row]) -> None:
    """Each example is drawn and clipped for itself: a row that becomes several is not protected as one row."""
    if cut := task.cut_in_pieces(rows):
        raise UserError(
            f"privacy.unit = 'example': of the {len(rows)} rows of client {name!r} {cut} "
            f"are longer than model.max_tokens = {task.max_tokens} and would be cut into several examples, so that "
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
) -> Table:
    """A site's own table, with the columns that the task reads. `columns` are the site's names of them.

    Of the columns that are not `allowed` (None: all are) nothing is kept. Which rows there are is the site's to say:
    revision and split of a Hub data set are not the run's.
    """
    table = _load(source, revision, split)
    if allowed is not None:
        table = replace(table, rows=[{key: row[key] for key in row if key in allowed} for row in table.rows])
    require_columns(table, list(columns.values()))
    ours = {theirs: name for name, theirs in columns.items()}
    rows = [{ours.get(key, key): value for key, value in row.items()} for row in table.rows]
    if columns or allowed is not None:
        table = make_table(rows, table.origin)
    table = _dropped(table, config.data.drop)
    task.columns_of(table)
    return table


def load_test(config: Config, task: Task) -> Table | None:
    """The test table of a run whose training rows are elsewhere."""
    data = config.data
    if data.test is None:
        return None
    table = _first(_dropped(_load(data.test, data.revision, data.test_split), data.drop), data.test_rows)
    task.columns_of(table)
    return table


def open_task_of(config: Config, tokenizer: Tokenizer) -> Task:
    """The task of a configuration, its classes not yet fitted."""
    options = TaskOptions(**config.task.model_dump(exclude={"kind"}))
    return open_task(config.task.kind, tokenizer=tokenizer, options=options, max_tokens=config.model.max_tokens)


def load_rows(config: Config, task: Task, source: str | None) -> Table:
    """Rows to score: of `source`, or the run's own test. Raises UserError where there are neither."""
    if source is not None:
        table: Table | None = _load(source, None, config.data.test_split)
    else:
        table = load_test(config, task) if config.data.train is None else _tables(config)[1]
    if table is None:
        raise UserError("this run has no test file of its own: name one with --data PATH")
    task.columns_of(table)
    return table


def load_unlabelled(config: Config, task: Task, source: str) -> Table:
    """Returns rows to predict. Raises UserError where a column that the model reads is missing."""
    table = _load(source, None, config.data.test_split)
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
        train = _load(data.train, data.revision, data.train_split)
    if data.tune_share:
        test = None  # not even read: what is tuned must not see it
    elif data.test is not None:
        test = _load(data.test, data.revision, data.test_split)
    train, test = _dropped(train, data.drop), None if test is None else _dropped(test, data.drop)
    return _first(train, data.train_rows), None if test is None else _first(test, data.test_rows)


def _dropped(table: Table, drop: Mapping[str, Any]) -> Table:
    """The table without the rows that hold one of these values. Raises UserError where nothing is left."""
    if not drop:
        return table
    require_columns(table, list(drop))
    return make_table(
        [row for row in table.rows if all(row[key] != value for key, value in drop.items())], table.origin
    )


def _load(source: str, revision: str | None, split: str) -> Table:
    """Revision and split are a Hub data set's; a local file has none."""
    if source.startswith("hub:"):
        return load_table(source, revision=revision, split=split)
    return load_table(source)


def _first(table: Table, rows: int | None) -> Table:
    return replace(table, rows=table.rows[:rows])


def _enough_text(partition: Partition, train: Table, task: Task, clients: ClientsConfig) -> Partition:
    """Leaves out natural clients whose texts together are shorter than clients.min_characters."""
    if clients.split != "column":
        raise UserError(f"clients.min_characters is of the split by column; this one is {clients.split!r}")
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


def cut_choices(config: Config, cut: int, unused: int) -> list[Choice]:
    """What model.max_tokens costs."""
    choices = [
        Choice(
            key="data.cut",
            value=cut,
            reason=f"counted: rows longer than model.max_tokens = {config.model.max_tokens}, their end is not read",
        )
    ]
    if unused:
        reason = f"counted: of these, rows with nothing to learn within {config.model.max_tokens} tokens, left out"
        choices.append(Choice(key="data.unused", value=unused, reason=reason))
    return choices


def _choices(config: Config, cut: int, unused: int, dropped: dict[str, int], unseen: set[str]) -> tuple[Choice, ...]:
    choices = cut_choices(config, cut, unused)
    if dropped:
        reason = "counted: clients under clients.min_rows or clients.min_characters, left out"
        choices.append(Choice(key="clients.dropped", value=len(dropped), reason=reason))
    if unseen:
        choices.append(Choice(key="clients.unseen", value=", ".join(sorted(unseen)), reason="drawn by the seed"))
    return tuple(choices)
