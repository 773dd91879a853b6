"""What this machine has of what a run reads, for `fedsb check`: what is elsewhere is no fault, and is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsb.config.schema import Config
from fedsb.data.clients import Data, build_task, open_data
from fedsb.data.partition import client_names
from fedsb.data.tables import load_test
from fedsb.data.tasks.base import Task
from fedsb.models.load import resolve_name
from fedsb.models.tokenizer import load_tokenizer
from fedsb.utils.errors import NotAvailableError

UNKNOWN_CLASSES = 2  # that a head is priced for, where nothing says how many there are


@dataclass(frozen=True, kw_only=True)
class Availability:
    """What this machine has of what a run reads."""

    task: Task
    tokenizer: Any | None
    data: Data | None
    clients: list[str]  # who take part: of the data, or as the settings name them
    classes: int
    unknown: tuple[str, ...]  # what is not here and what cannot be said for it, in words


def find_availability(config: Config) -> Availability:
    """Tokenizer and rows where they can be had. Raises UserError for what is there and at fault."""
    unknown: list[str] = []
    tokenizer: Any | None = None
    data: Data | None = None
    try:
        tokenizer = load_tokenizer(config.model)
    except NotAvailableError:
        name = resolve_name(config.model.name)[0]
        unknown.append(f"the tokenizer of {name} is not here, so no row can be read: rows, tokens, time and epsilon")
    at_sites = config.engine.name == "flower"
    served = at_sites and config.data.train is None
    if served:
        unknown += _without_rows(config)
    elif tokenizer is not None or config.data.train is None:  # which is refused there
        try:
            data = open_data(config, tokenizer)
        except NotAvailableError as error:
            unknown.append(f"rows, tokens, time and epsilon: {error}")
    if data is not None:
        if at_sites:
            unknown.append("the sites and their rows: data.train and [clients] stand for them, as in a rehearsal")
        names = [site.name for site in data.participants]
        classes = len(data.task.label_names)
        return Availability(
            task=data.task, tokenizer=tokenizer, data=data, clients=names, classes=classes, unknown=tuple(unknown)
        )
    task, clients = build_task(config, tokenizer), config.clients
    count = clients.count - clients.holdout_clients
    if served or clients.partition == "column":
        count = max(clients.count, config.server.clients_per_round or 1)
        who = "sites there are" if served else f"clients the column {clients.column!r} makes"
        unknown.append(f"how many {who}: priced for {count} (clients.count)")
        if clients.total_ranks is not None or clients.memory_mib is not None:
            unknown.append("which of them has a rank of its own: all are priced at the method's")
    classes = 0
    tested = _classes_of_test(config, task, unknown) if served and tokenizer is not None else 0
    if task.auto_class != "AutoModelForCausalLM":
        single = task.problem_type == "regression"
        classes = 1 if single else config.data.classes or max(tested, UNKNOWN_CLASSES)
        if config.data.classes is None and not single:
            known = ", as many as data.test has" if tested == classes else ""
            unknown.append(f"how many classes there are: the head is priced for {classes}{known}; say data.classes")
    names = client_names(max(count, 1))
    return Availability(
        task=task, tokenizer=tokenizer, data=None, clients=names, classes=classes, unknown=tuple(unknown)
    )


def _without_rows(config: Config) -> list[str]:
    """What cannot be said of a run whose rows are at the sites."""
    privacy = config.privacy
    lines = [
        "the rows: data.train is not set, so this is checked as a run of `fedsb serve`, whose rows are at the sites; "
        "`fedsb run` would refuse it"
    ]
    if privacy.unit == "example" and privacy.epsilon is not None:
        noise = f"calibrated to privacy.epsilon = {privacy.epsilon:g}"
        lines.append(f"how much noise each site adds: it is {noise} when all have said how many rows they hold")
    elif privacy.unit == "example":
        lines.append("epsilon: it follows from privacy.noise_multiplier and from how many rows each site holds")
    return lines


def _classes_of_test(config: Config, task: Task, unknown: list[str]) -> int:
    """How many classes the coordinator's own test rows have; those of the sites may be more."""
    try:
        test = load_test(config, task)
    except NotAvailableError as error:
        unknown.append(f"the test rows: {error}")
        return 0
    return len(task.labels_in(test.rows)) if test else 0
