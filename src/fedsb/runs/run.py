"""A run, top to bottom: the clients, the basis, the rounds, and the adapter at the end.

`federate` starts a run and `resume` takes one up again; both are the same loop, started at another round.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

from fedsb.adapters.basis import Basis
from fedsb.channels.in_process import EmbeddedEngine
from fedsb.config.load import ResolvedConfig, difference, load_config
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config, method_of
from fedsb.data.card import shown_lines
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import Method
from fedsb.privacy.mechanism import PrivacyBudgetExceededError
from fedsb.protocol import schedule
from fedsb.protocol.traffic import TrafficRecord
from fedsb.reporting.prices import bytes_line
from fedsb.reporting.run_directory import read_manifest
from fedsb.runs.artifacts import RunEngine, describe_start, export, finish, round_row
from fedsb.runs.record import Record, refuse_existing
from fedsb.server.rounds import play, renew
from fedsb.server.spool import Spool
from fedsb.server.types import Engine
from fedsb.training.resolved import batch_warnings
from fedsb.utils.environment import versions
from fedsb.utils.errors import UserError
from fedsb.utils.signals import Interrupts


class Display(Protocol):
    """Who watches a run: the terminal, a notebook, nobody."""

    def settings(self, choices: Sequence[ResolvedSetting]) -> None: ...
    def note(self, text: str) -> None: ...
    def round(self, row: Mapping[str, Any], rounds: int) -> None: ...


class Silent:
    """Watches without a word."""

    def settings(self, choices: Sequence[ResolvedSetting]) -> None: ...
    def note(self, text: str) -> None: ...
    def round(self, row: Mapping[str, Any], rounds: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """Where a finished run is, and its last score."""

    folder: Path
    score: float | None
    adapter: Path


OpenEngine = Callable[[Config, Method, str], RunEngine]


def open_embedded(config: Config, method: Method, run: str) -> RunEngine:
    """All clients in this process. Raises UserError for a configuration of a real federation, and as the engine."""
    if config.engine.name != "in_process":
        raise UserError(
            f"engine.name = {config.engine.name!r}: a coordinator starts it, with `fedsb serve`; to simulate it in one "
            "process, --set engine.name=in_process"
        )
    return EmbeddedEngine(config, method, run)


def federate(loaded: ResolvedConfig, display: Display | None = None, open_engine: OpenEngine = open_embedded) -> Result:
    """Runs a configuration from the start, in a new run directory.

    Raises:
        UserError: anything wrong with the settings, the data or the model, before any training.
        RunError: a run that cannot go on; its last finished round is on disk.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after what was being written is on disk.
    """
    loaded = _dated(loaded)
    config = loaded.config
    folder = Path(config.out) / config.name
    refuse_existing(folder)
    run_id = uuid.uuid4().hex[:12]
    engine = open_engine(config, method_of(config), run_id)
    manifest = {
        "fedsb": versions()["fedsb"],
        "run": run_id,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "origin": dict(loaded.origin),
    }
    with Record.create(folder, manifest) as record:
        return _carry_out(loaded, engine, record, display or Silent())


def resume(
    folder: Path,
    display: Display | None = None,
    changed: ResolvedConfig | None = None,
    open_engine: OpenEngine = open_embedded,
) -> Result:
    """Takes up a run behind its last finished round; the outcome is that of a run that was never cut off.

    Raises UserError where `changed`, a configuration to compare with, or the data differ from the run's own.
    """
    manifest = read_manifest(folder)
    loaded = ResolvedConfig(config=load_config(manifest["config"]).config, origin=manifest["origin"])
    if changed is not None:
        changed = _dated(changed, loaded.config.model.template_date)
    if changed is not None and (lines := difference(manifest["config"], changed.config.model_dump(mode="json"))):
        raise UserError(
            f"{folder} was started with other settings. Resume it without them, or start a new run:\n  "
            + "\n  ".join(lines)
        )
    with Record.open(folder) as record:
        engine = open_engine(loaded.config, method_of(loaded.config), record.run)
        return _carry_out(loaded, engine, record, display or Silent())


def _carry_out(loaded: ResolvedConfig, engine: RunEngine, record: Record, display: Display) -> Result:
    config, method = loaded.config, engine.method
    server = ServerOptimizer(**config.server.optimizer_settings)
    with closing(engine.policy), Interrupts().installed() as interrupts:
        own_rows = engine.policy and config.engine.name == "in_process"  # a site keys the fingerprint of its own
        tables = record.keyed(engine.data.tables) if own_rows else engine.data.tables
        record.check_same(tables, engine.base.fingerprint)
        choices = [*loaded.choices(), *engine.choices]
        for line in shown_lines(engine.data.card.as_dict()):
            display.note(line)
        display.settings(choices)
        for warning in batch_warnings(config, engine.local, engine.sites):
            display.note(f"Warning: {warning}.")

        state = record.latest()
        engine.policy.open_ledgers(record.folder, record.run, new=state is None)
        if state is None:
            basis, sent = _first_basis(engine)
            state = method.start(engine.shapes, basis, engine.head, config.seed)
            before = engine.score(method, state, {})
            described = describe_start(config, method, engine, basis, state, choices, before)
            record.save_manifest(described | {"data": tables})
            display.note(bytes_line(described["prices"]) + "\n")
            record.start(state, sent)
        for torn in record.skipped:
            display.note(torn)
        renewals = schedule.refreshes(config, method)  # rounds that start with a new basis
        since = max((round for round in renewals if round < state.round), default=0)
        kept = record.take_up(state.round, since)  # what clients keep to themselves

        try:
            for round in range(state.round, config.rounds):
                started, sent = time.monotonic(), list[TrafficRecord]()
                if round in renewals:
                    (state, sent), kept = renew(engine, state), {}
                cohort = sample(engine, round, config)
                late = set(cohort) - set(sample(engine, round - 1, config)) if round else set()
                played = play(engine, state, cohort, late, kept, server, spool=Spool(record.folder))
                state, kept = played.state, kept | played.kept
                due = config.eval.due(state.round, config.rounds)
                score = engine.score(method, state, kept) if due else None
                sites = engine.score_sites(method, state, kept) if due and config.eval.gap else {}
                row = round_row(played, cohort, score, sites, time.monotonic() - started, engine.policy)
                with interrupts.hold():
                    record.round(state, row, [*sent, *played.replies.sent], played.kept, keep=config.keep_checkpoints)
                display.round(row, config.rounds)
        except PrivacyBudgetExceededError as spent:
            if state.round == 0:
                raise _nothing_finished(spent) from spent
            display.note(f"The run ends after round {state.round}: {spent}.")

        sites = engine.score_sites(method, state, kept)
        adapter, fault = export(config, method, engine, state, kept, record)
        score_at_end = finish(record, engine, sites, adapter, fault)
        if fault is not None:
            raise fault
    return Result(folder=record.folder, score=score_at_end, adapter=adapter)


def _dated(loaded: ResolvedConfig, day: str | None = None) -> ResolvedConfig:
    """The configuration with the date that chat templates write, today where none is given."""
    config = loaded.config
    if config.model.template_date is not None:
        return loaded
    model = config.model.model_copy(update={"template_date": day or date.today().isoformat()})
    return replace(loaded, config=config.model_copy(update={"model": model}))


def _first_basis(engine: RunEngine) -> tuple[Basis | None, list[TrafficRecord]]:
    """Raises PrivacyBudgetExceededError with advice if a run was stopped while its basis was made from private rows."""
    try:
        return engine.build_basis(engine.method)
    except PrivacyBudgetExceededError as spent:
        raise _nothing_finished(spent) from spent


def _nothing_finished(spent: PrivacyBudgetExceededError) -> PrivacyBudgetExceededError:
    """Returns the error with advice, for a run that cannot finish its first round within its epsilon."""
    return PrivacyBudgetExceededError(
        f"{spent}. The run was stopped before its first round was finished. What it released until then stays charged, "
        "so it cannot be resumed within the same epsilon. Start a new run under another name (--set name=other). For "
        "rows that are in both runs the epsilons add up"
    )


def sample(engine: Engine, round: int, config: Config) -> list[str]:
    """The clients of a round: all, or a draw keyed by (seed, round)."""
    return schedule.sample([site.name for site in engine.sites], round, config)
