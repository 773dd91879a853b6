"""The tokenizer and data that are available on this machine, for `fedsb check`. Unavailable parts are reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsb.config.schema import Config
from fedsb.data.clients import Data, build_task, open_data
from fedsb.data.partition import client_names
from fedsb.data.tables import load_test
from fedsb.data.tasks.base import Task
from fedsb.models.names import resolve_name
from fedsb.models.tokenizer import load_tokenizer
from fedsb.privacy.shared import noise_kind
from fedsb.utils.errors import NotAvailableError

UNKNOWN_CLASSES = 2  # of the estimated head, if the number of classes is unknown


@dataclass(frozen=True, kw_only=True)
class Availability:
    """The parts of a run's input that are available on this machine."""

    task: Task
    tokenizer: Any | None
    data: Data | None
    clients: list[str]  # the clients that take part, from the data or else from the settings
    classes: int
    unknown: tuple[str, ...]  # the estimates that are not possible, and why


def find_availability(config: Config) -> Availability:
    """Loads the tokenizer and the data if they are available. Raises UserError for errors in them."""
    unknown: list[str] = []
    tokenizer: Any | None = None
    data: Data | None = None
    try:
        tokenizer = load_tokenizer(config.model)
    except NotAvailableError:
        name = resolve_name(config.model.name)[0]
        unknown.append(f"rows, tokens, time and epsilon: the tokenizer of {name} is not on this machine")
    at_sites = config.engine.name == "flower"
    served = at_sites and config.data.train is None
    if served:
        unknown += _without_rows(config)
    elif tokenizer is not None or config.data.train is None:  # open_data refuses it
        try:
            data = open_data(config, tokenizer)
        except NotAvailableError as error:
            unknown.append(f"rows, tokens, time and epsilon: {error}")
    if data is not None:
        if at_sites:
            unknown.append(
                "the sites and their rows: estimated from data.train and [clients], as in a local federation"
            )
        names = [site.name for site in data.participants]
        classes = len(data.task.label_names)
        return Availability(
            task=data.task, tokenizer=tokenizer, data=data, clients=names, classes=classes, unknown=tuple(unknown)
        )
    if noise_kind(config, config.method)[0] == "shared":
        assumed = f"{config.server.secagg_bits} are assumed"
        unknown.append(f"the bits of a value in a masked update: 12 to 24, by the number of rows; {assumed}")
    task, clients = build_task(config, tokenizer), config.clients
    count = clients.count - clients.holdout_clients
    if served or clients.partition == "column":
        count = max(clients.count, config.server.clients_per_round or 1)
        what = "sites" if served else f"clients in the column {clients.column!r}"
        unknown.append(f"the number of {what}: estimated for {count} (clients.count)")
        if clients.total_ranks is not None or clients.memory_mib is not None:
            unknown.append("the ranks of single clients: all are estimated with the rank of the method")
    classes = 0
    tested = _classes_of_test(config, task, unknown) if served and tokenizer is not None else 0
    if task.auto_class != "AutoModelForCausalLM":
        single = task.problem_type == "regression"
        classes = 1 if single else config.data.classes or max(tested, UNKNOWN_CLASSES)
        if config.data.classes is None and not single:
            known = ", as in data.test" if tested == classes else ""
            unknown.append(f"the number of classes: estimated for {classes}{known}; set data.classes")
    names = client_names(max(count, 1))
    return Availability(
        task=task, tokenizer=tokenizer, data=None, clients=names, classes=classes, unknown=tuple(unknown)
    )


def _without_rows(config: Config) -> list[str]:
    """Returns the estimates that are not possible for a run whose rows are at the sites."""
    privacy = config.privacy
    lines = [
        "the rows: data.train is not set, so this is checked as a run of `fedsb federation serve`, with the rows at "
        "the sites; `fedsb run` needs data.train"
    ]
    if privacy.unit == "example" and privacy.epsilon is not None:
        noise = f"calibrated to privacy.epsilon = {privacy.epsilon:g}"
        lines.append(f"the noise of each site: it is {noise} once all sites have sent their numbers of rows")
    elif privacy.unit == "example":
        lines.append("epsilon: it depends on privacy.noise_multiplier and on the number of rows of each site")
    return lines


def _classes_of_test(config: Config, task: Task, unknown: list[str]) -> int:
    """Returns the number of classes in the coordinator's test rows. The sites may have more."""
    try:
        test = load_test(config, task)
    except NotAvailableError as error:
        unknown.append(f"the test rows: {error}")
        return 0
    return len(task.labels_in(test.rows)) if test else 0
