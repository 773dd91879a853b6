"""A federation that is ready for a run: a channel to its clients, and the server's own model and data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.card import TableCard, make_card
from fedsb.data.clients import ClientData, Data, build_task, cut_choices, remote_client
from fedsb.data.rows import Table
from fedsb.data.tables import load_test, table_facts
from fedsb.data.tasks.base import Task
from fedsb.methods.base import Method, State
from fedsb.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedsb.privacy.policy import PrivacyPolicy, refuse_what_would_leak
from fedsb.protocol.channel import Channel
from fedsb.protocol.messages import Describe, DescribeReply, Prepare, PrepareReply
from fedsb.protocol.requirements import (
    refuse_what_facts_forbid,
    refuse_what_needs_one_place,
    refuse_what_needs_weights,
)
from fedsb.server.exchange import Exchange
from fedsb.server.labels import label_choices, labels_of
from fedsb.training.trainer import Trainer
from fedsb.utils.environment import versions
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.tensors import Tensors

if TYPE_CHECKING:
    from fedsb.protocol.secure_sum import SecureSums

ClientStates = Mapping[str, Mapping[int, Tensors]]  # client -> round -> its own state after that round


class LocalClients(Protocol):
    """The clients in the server's process, whose state is stored with the run."""

    def start(self, policy: PrivacyPolicy, secure_sums: SecureSums | None, states: ClientStates) -> None:
        """Puts the run's policy in force; `states` are the clients' own, by round, of a run that is resumed."""

    def resume(self, state: State) -> None:
        """Brings every client to the state after its last round."""

    def client_states(self, round: int) -> Mapping[str, Tensors]:
        """Returns the own states that clients have after this round, where they have any."""
        ...

    def client_model(self, method: Method, state: State, client: str) -> Tensors:
        """Returns the model that a client ends with: the global one, or its own."""
        ...


class NoLocalClients:
    """A federation without clients in this process. Remote clients keep their own state."""

    def start(self, policy: PrivacyPolicy, secure_sums: SecureSums | None, states: ClientStates) -> None:
        pass

    def resume(self, state: State) -> None:
        pass

    def client_states(self, round: int) -> Mapping[str, Tensors]:
        return {}

    def client_model(self, method: Method, state: State, client: str) -> Tensors:
        return method.model(state)


@dataclass(frozen=True, kw_only=True)
class OpenedFederation:
    """The parts of a federation that its server needs.

    Args:
        clients: those that take part, with their number of rows.
        data: the card, the task, the test rows; in a simulation also the clients' rows.
        trainer: the server's own model, to score and to export; in one process the clients share it.
        directory: each client's public key, for secure aggregation.
        local_clients: the clients in this process.
    """

    channel: Channel
    clients: Sequence[ClientData]
    data: Data
    trainer: Trainer
    directory: Mapping[str, bytes] = field(default_factory=dict)
    settings: tuple[ResolvedSetting, ...] = ()
    local_clients: LocalClients = field(default_factory=NoLocalClients)


OpenFederation = Callable[[Config, Method, str], OpenedFederation]  # of a configuration, for the run with this id


def open_sites(
    config: Config,
    method: Method,
    run: str,
    channel: Channel,
    directory: Mapping[str, bytes],
    note: Callable[[str], None] = lambda _: None,
    begun: Mapping[str, Any] | None = None,  # the manifest of a run that is resumed: its sites need not be online
) -> OpenedFederation:
    """Describes the run to the sites of a channel, and prepares them.

    Raises UserError if the settings do not fit the federation, RunError if a site refuses or does not answer.
    """
    refuse_what_facts_forbid(config, method)
    refuse_what_would_leak(config, method)
    refuse_what_needs_one_place(config, method)
    refuse_what_needs_weights(config, method)
    exchange = Exchange(channel, run, config.engine.deadline_s, note)
    tokenizer = load_tokenizer(config.model)
    task = build_task(config, tokenizer)
    test = load_test(config, task)
    described = {} if begun else _describe(exchange, config)
    if begun:
        task.take_classes(begun["task"])
    else:
        labels = labels_of(described)
        task.fit_labels([{task.options.label: label} for label in labels], test.rows if test else [])
    task.name_classes(test.class_names.get(task.options.label, ()) if test else ())
    shapes_only = not config.server.load_base_model
    trainer = Trainer(config, method, tokenizer, task, shapes_only=shapes_only)
    prepared: dict[str, PrepareReply] = {}
    if begun:
        clients = [remote_client(site["name"], site["rows"], site["labels"]) for site in begun["clients"]]
        tables = {name: table for name, table in begun["data"].items() if name != "test"}
    else:
        request = Prepare(
            run=run,
            label_names=task.label_names,
            class_names=task.class_names or None,
            model=None if shapes_only else trainer.base.fingerprint,
            tokenizer=tokenizer_fingerprint(tokenizer),
        )
        prepared = exchange.all(request)
        clients = [remote_client(name, site.rows, site.labels) for name, site in prepared.items()]
        tables = {
            name: {"origin": f"the site {name}", "rows": site.rows, "fingerprint": site.fingerprint}
            for name, site in described.items()
        }
    if shapes_only:
        known = begun["model"]["fingerprint"] if begun else _common_base(prepared, trainer.base.head)
        trainer.base = replace(trainer.base, fingerprint=known)
    data = _data(config, task, clients, test, list(prepared.values()), tables)
    data = replace(data, choices=(*label_choices(described), *data.choices))
    trainer.check_rows(data.test)
    return OpenedFederation(channel=channel, clients=clients, data=data, trainer=trainer, directory=directory)


def _describe(exchange: Exchange, config: Config) -> dict[str, DescribeReply]:
    shared = config.model_dump(mode="json", exclude={"out": True, "compare": True, "data": {"train", "test"}})
    sites = exchange.channel.clients
    exchange.note(f"asking {'1 site' if len(sites) == 1 else f'{len(sites)} sites'}: {', '.join(sites)}")
    return exchange.all(Describe(run=exchange.run, config=shared, versions=versions()))


def _common_base(prepared: Mapping[str, PrepareReply], head: Sequence[str]) -> str:
    """Returns the fingerprint of the base model at all sites, for a coordinator without it.

    Raises RunError if sites have different base models, UserError if they train modules that only the checkpoint shows.
    """
    sites = defaultdict[str, list[str]](list)
    for name, site in sorted(prepared.items()):
        sites[site.model].append(name)
    if len(sites) > 1:
        found = sorted(sites.items(), key=lambda item: -len(item[1]))
        raise RunError(
            "The sites have different base models. Their fingerprints are "
            + "; ".join(f"{fingerprint} at {', '.join(names)}" for fingerprint, names in found)
            + ". Set model = 'FOLDER' in site.toml to the right one at each site, and serve again."
        )
    for name, site in sorted(prepared.items()):
        if sorted(site.head) != sorted(head):
            raise UserError(
                f"server.load_base_model = false: {name} trains the modules {', '.join(site.head) or 'none':.200} in "
                f"full, and the coordinator expects {', '.join(head) or 'none'}. Layers that a checkpoint lacks are "
                "trained with the head, and only its weights show which they are. Set server.load_base_model = true."
            )
    (common,) = sites
    return common


def _data(
    config: Config,
    task: Task,
    clients: Sequence[ClientData],
    test: Table | None,
    prepared: Sequence[PrepareReply],
    tables: Mapping[str, Any],
) -> Data:
    """Returns the server's facts about the sites' rows, which stay at the sites."""
    examples, cut_test = task.encode_test(test.rows) if test else ([], 0)
    labels = [site.labels for site in prepared if site.labels is not None]
    all_labels = bool(labels) and len(labels) == len(prepared)
    card = make_card(
        task,
        TableCard(
            origin="1 site" if len(clients) == 1 else f"{len(clients)} sites",
            rows=sum(site.rows for site in clients),
            cut=_sum_of(site.cut for site in prepared),
            unused=_sum_of(site.unused for site in prepared),
            classes={name: sum(own.get(name, 0) for own in labels) for name in task.classes} if all_labels else None,
        ),
        test,
        clients={site.name: site.rows for site in clients},
        lost={"test": (cut_test, len(test.rows) - len(examples) if test else 0)},
        also_read=config.data.exclude,
        private=config.privacy.on,
    )
    cut = cut_test + sum(site.cut or 0 for site in prepared)
    unused = sum(site.unused or 0 for site in prepared)
    return Data(
        task=task,
        clients=list(clients),
        test=examples,
        test_description=f"{test.origin}, {len(test.rows):,} rows" if test else "none",
        test_is_public=True,
        baseline=None,
        best_guess=task.best_guess(examples) if examples else None,
        tables={**tables, **({"test": table_facts(test)} if test else {})},
        choices=tuple(cut_choices(config, cut, unused)),
        card=card,
    )


def _sum_of(counts: Iterable[int | None]) -> int | None:
    """Returns the sum; None if a site keeps its count private, or no site was asked."""
    known = list(counts)
    return sum(count or 0 for count in known) if known and None not in known else None
