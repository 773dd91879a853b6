"""The contenders of a comparison: methods with ranks, a grid over any settings, and other sets of settings.

    methods = ["fed-sb", "fedit@4"], ranks = [8, 32]         fed-sb@8, fed-sb@32, fedit@4
    methods = ["fedit@4", "central"]                         central with the adapter of fedit@4
    grid = { "basis.kind" = ["random", "weights"] }          fed-sb@8 basis.kind=random, ..., fedit@4

Every contender is a complete, checked configuration before anything runs. All errors are reported together.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fedsb.config.inputs import TaskConfig
from fedsb.config.load import ResolvedConfig, load_config, unused_settings
from fedsb.config.nested import set_key
from fedsb.config.schema import CompareConfig, Config
from fedsb.methods.base import Method
from fedsb.methods.control import control_options
from fedsb.utils.errors import ConfigError, UserError, did_you_mean

RESERVED = ("seed", "name", "out")  # the comparison sets these for each run


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One configuration of a comparison."""

    name: str
    set: Mapping[str, Any]  # its own settings, by dotted key
    config: Config
    control_of: str | None = None  # for a control, the contender whose adapter it trains

    @property
    def method(self) -> Method:
        return self.config.method

    @property
    def is_control(self) -> bool:
        """Returns whether it is `central` or `local`, which send nothing and so are not compared in bytes."""
        return self.method.spec.adapter is None


def contenders_of(loaded: ResolvedConfig) -> list[Contender]:
    """Returns the contenders of a configuration, in the order of [compare].

    A contender that names a method starts from that method's defaults, not from the other keys of [method]. A control
    in `methods` gets the adapter of another method in the list: the first one with the control's rank, else the first
    one. A key of the grid that has no effect on a contender (a basis, for a method without one) is left out.

    Raises ConfigError with all errors of all contenders.
    """
    options = loaded.config.compare
    faults: list[str] = []
    found: list[Contender] = []
    named = list(_named(options, faults))
    for name, what in named:
        own: list[Contender] = []
        for values in _grid(options, faults):
            try:
                contender = _contender(name, what, values, loaded.given)
                if contender.is_control and name not in {each.name for each in options.contenders}:
                    contender = _as_control(name, what, values, named, loaded.given) or contender
                own += [contender] if contender not in own else []  # the grid may not change it
            except ConfigError as error:
                faults += [f"contender {name!r}: {fault}" for fault in error.faults]
            except UserError as error:
                faults.append(f"contender {name!r}: {error}")
        found += own
    if not faults:
        faults += _together(found, options)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return found


def methods_to_price(loaded: ResolvedConfig) -> list[Method]:
    """Returns the methods in [compare] that send something, for `fedsb check`; none if [compare] has errors."""
    if not (loaded.config.compare.methods or loaded.config.compare.contenders):
        return []
    try:
        return [contender.method for contender in contenders_of(loaded) if not contender.is_control]
    except UserError:  # `fedsb compare` reports it
        return []


def _named(options: CompareConfig, faults: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields names and their settings: first the methods, at every rank, then the contenders."""
    for text in options.methods:
        name, at, rank = text.partition("@")
        if at and not re.fullmatch("[1-9][0-9]*", rank):
            faults.append(f"compare.methods: {text!r} is not valid. Write name or name@rank, as in fed-sb@32")
        elif at or not options.ranks:
            yield text, {"method.name": name, **({"method.rank": int(rank)} if at else {})}
        else:
            yield from ((f"{name}@{r}", {"method.name": name, "method.rank": r}) for r in options.ranks)
    for contender in options.contenders:
        yield contender.name, dotted(contender.set)


def _grid(options: CompareConfig, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Yields every combination of the grid's values; one empty combination without a grid."""
    grid = dotted(options.grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            faults.append(f"compare.grid: {key} needs a list of values (it is {values!r})")
            return
    yield from (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _contender(name: str, what: Mapping[str, Any], values: Mapping[str, Any], given: Mapping[str, Any]) -> Contender:
    """Returns a contender. Raises UserError for a reserved setting, ConfigError for invalid settings."""
    for key in (*what, *values):
        if key in RESERVED or key.split(".")[0] == "compare":
            raise UserError(f"{key} cannot be set here, because the comparison sets it for each run")
    if "method.name" in what:
        given = {**given, "method": {}}
    config = _load(given, {**what, **values})
    effective = {key: value for key, value in values.items() if key not in unused_settings(config)}
    shown = [f"{key}={value}" for key, value in effective.items()]
    settings = {**what, **effective}
    return Contender(name=" ".join([name, *shown]), set=settings, config=_load(given, settings))


def _as_control(
    name: str,
    what: Mapping[str, Any],
    values: Mapping[str, Any],
    named: Sequence[tuple[str, Mapping[str, Any]]],
    given: Mapping[str, Any],
) -> Contender | None:
    """Returns the control with the adapter of a contender, at its own rank if `what` has one; None without any."""
    others: list[Contender] = []
    for other, its in named:
        with suppress(UserError):  # reported with that contender
            others += [each for each in [_contender(other, its, values, given)] if not each.is_control]
    if not others:
        return None
    rank = what.get("method.rank")
    chosen = next((each for each in others if each.method.rank == rank), others[0])
    options = {f"method.{key}": value for key, value in control_options(chosen.method).items()}
    return replace(_contender(name, {**options, **what}, values, given), control_of=chosen.name)


def dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted key, from either {"method": {"rank": 8}} or {"method.rank": 8}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "." not in key:
            found |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            found[key] = value
    return found


def _load(given: Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
    raw = {key: value for key, value in given.items() if key != "compare"}
    for key, value in settings.items():
        raw = set_key(raw, key, value)
    return load_config(raw).config


def _together(contenders: list[Contender], options: CompareConfig) -> list[str]:
    """Returns the errors of the contenders as a whole."""
    if not contenders:
        return ["compare: no contenders. Name them with --methods fed-sb@8,fedit@1 or [compare] methods = [...]"]
    faults = []
    names = Counter(contender.name for contender in contenders)
    faults += [
        f"compare: several contenders have the name {name!r}. Rename them" for name, count in names.items() if count > 1
    ]
    for one, other in itertools.combinations(contenders, 2):
        if one.config == other.config and one.name != other.name:
            faults.append(f"compare: {one.name!r} and {other.name!r} have the same settings. Leave one out")
    if options.reference is not None and options.reference not in names:
        faults.append(
            f"compare.reference: no contender is named {options.reference!r}; {did_you_mean(options.reference, names)}"
        )
    kinds = {_scored_by(contender.config.task) for contender in contenders}
    if len(kinds) > 1:
        faults.append(f"compare: scores of different tasks cannot be compared: {', '.join(sorted(kinds))}")
    for contender in contenders:
        data = contender.config.data
        if data.train is None:
            faults.append("compare: no training data. Set data.train")
        elif data.test is None and data.train != "python-docs" and not contender.config.clients.holdout_fraction:
            faults.append("compare: no rows to score. Set data.test or clients.holdout_fraction")
        faults += _private_scores(contender.config, options)
    return faults


def _private_scores(config: Config, options: CompareConfig) -> list[str]:
    """Returns the errors that would stop each private run after epsilon was spent: scores that are not released."""
    if not config.privacy.on or "scores" in config.privacy.release:
        return []
    if options.trials:
        return [
            f"compare.trials = {options.trials}: trials score private rows, which epsilon does not cover. Set "
            "compare.trials = 0 and train.lr, or privacy.release = ['scores']"
        ]
    if config.data.test is None and config.data.train != "python-docs":
        return [
            "compare: a private run does not release scores on its clients' rows. Set data.test to a public file, or "
            "set privacy.release = ['scores']"
        ]
    return []


def _scored_by(task: TaskConfig) -> str:
    """Returns the task and metric of the scores, which must be equal for all contenders."""
    chosen = [value for value in (task.score, task.metric) if value != "auto"]
    return " ".join([task.kind, *chosen])
