"""A run from start to end: the federation, the basis, the rounds, and the exported adapter.

`federate` starts a run and `resume` continues one; both use the same loop.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

from fedsb.channels.in_process import open_in_process
from fedsb.config.inputs import ModelConfig
from fedsb.config.load import ResolvedConfig, load_config
from fedsb.config.nested import difference
from fedsb.config.resolved import ResolvedSetting
from fedsb.data.card import shown_lines
from fedsb.methods.base import State
from fedsb.models.load import choose_device, choose_dtype
from fedsb.privacy.mechanism import PrivacyBudgetExceededError
from fedsb.reporting.prices import bytes_line
from fedsb.reporting.run_directory import FORMAT, read_manifest, refuse_existing, refuse_old_format
from fedsb.runs.artifacts import describe_start, export, finish, round_row, why_unchecked
from fedsb.runs.record import Record
from fedsb.runs.scoring import final_scores, score_clients, score_global
from fedsb.server.opened import OpenedFederation, OpenFederation
from fedsb.server.server import Server
from fedsb.training.resolved import batch_warnings
from fedsb.utils.environment import versions
from fedsb.utils.errors import UserError
from fedsb.utils.phases import Phases
from fedsb.utils.signals import Interrupts


class Display(Protocol):
    """The display of a run in progress, such as a terminal or a notebook."""

    def settings(self, settings: Sequence[ResolvedSetting]) -> None: ...
    def note(self, text: str) -> None: ...
    def round(self, row: Mapping[str, Any], rounds: int) -> None: ...


class Silent:
    """Shows nothing."""

    def settings(self, settings: Sequence[ResolvedSetting]) -> None: ...
    def note(self, text: str) -> None: ...
    def round(self, row: Mapping[str, Any], rounds: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run: its folder, its last score, its adapter."""

    folder: Path
    score: float | None
    adapter: Path


def federate(
    resolved: ResolvedConfig, display: Display | None = None, open_federation: OpenFederation = open_in_process
) -> Result:
    """Runs a configuration from the start, in a new run directory.

    Raises:
        UserError: anything wrong with the settings, the data or the model, before any training.
        RunError: a run that cannot continue; its last finished round is on disk.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after what was being written is on disk.
    """
    resolved = _fixed(resolved)
    config = resolved.config
    folder = Path(config.out) / config.name
    refuse_existing(folder)
    run_id = uuid.uuid4().hex[:12]
    phases = Phases(choose_device(config.model.device)[0])
    with phases.measure("load"):
        opened = open_federation(config, config.method, run_id)
    manifest = {
        "format": FORMAT,
        "fedsb": versions()["fedsb"],
        "run": run_id,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "origin": dict(resolved.origin),
    }
    with Record.create(folder, manifest) as record:
        return _run(resolved, opened, record, phases, display or Silent())


def resume(
    folder: Path,
    display: Display | None = None,
    changed: ResolvedConfig | None = None,
    open_federation: OpenFederation = open_in_process,
) -> Result:
    """Resumes a run after its last completed round. The result equals that of an uninterrupted run.

    Raises UserError if `changed`, a configuration to compare with, or the data differ from the run's own, and for a
    run directory of an older version.
    """
    manifest = read_manifest(folder)
    refuse_old_format(folder, manifest)
    resolved = ResolvedConfig(config=load_config(manifest["config"]).config, origin=manifest["origin"])
    if changed is not None:
        changed = _fixed(changed, resolved.config.model)
    if changed is not None and (lines := difference(manifest["config"], changed.config.model_dump(mode="json"))):
        raise UserError(
            f"{folder} was started with other settings. Resume it without them, or start a new run:\n  "
            + "\n  ".join(lines)
        )
    with Record.open(folder) as record:
        phases = Phases(choose_device(resolved.config.model.device)[0])
        with phases.measure("load"):
            opened = open_federation(resolved.config, resolved.config.method, record.run)
        return _run(resolved, opened, record, phases, display or Silent())


def replicate(settings: Mapping[str, Any], folder: Path, resumed: bool, open_federation: OpenFederation) -> Result:
    """Runs what rank 0 of a sharded launch runs, in a temporary folder and without display.

    `resumed`: the folder is a copy of the run directory that rank 0 resumes.
    """
    if resumed:
        return resume(folder, open_federation=open_federation)
    resolved = load_config(settings)
    config = resolved.config.model_copy(update={"out": str(folder)})
    return federate(replace(resolved, config=config), open_federation=open_federation)


def _run(
    resolved: ResolvedConfig, opened: OpenedFederation, record: Record, phases: Phases, display: Display
) -> Result:
    config, method = resolved.config, opened.trainer.method
    server = Server(config, method, record.run, opened, display.note)
    with closing(server.policy), Interrupts().installed() as interrupts:
        settings = _show_start(resolved, server, display)
        tables = _check_same(server, record)
        state = record.latest()
        server.policy.open_ledgers(record.folder, record.run, new=state is None)
        opened.local_clients.start(server.policy, server.secure_sums, record.client_states(state))
        if state is None:
            state = _start(server, record, settings, tables, phases, display)
        else:
            opened.local_clients.resume(state)
        for skipped in record.skipped:
            display.note(skipped)
        record.roll_back(state.round)

        try:
            for _ in range(state.round, config.rounds):
                started = time.monotonic()
                due = config.eval.due(state.round + 1, config.rounds)
                with phases.measure("rounds"):
                    result = server.run_round(state, score=due and config.eval.gap, spool=record.folder)
                state = result.state
                with phases.measure("scores"):
                    scored = server.result(state)
                    score = score_global(server, scored) if due else None
                    clients = score_clients(server, scored) if due and config.eval.gap else {}
                row = round_row(result, score, clients, time.monotonic() - started, server.policy)
                with interrupts.hold():
                    record.commit(
                        result, row, opened.local_clients.client_states(state.round), keep=config.keep_checkpoints
                    )
                display.round(row, config.rounds)
        except PrivacyBudgetExceededError as spent:
            if state.round == 0:
                raise _nothing_finished(spent) from spent
            display.note(f"The run ends after round {state.round}: {spent}.")

        state = server.result(state)
        with phases.measure("scores"):
            scores = final_scores(server, state)
        with phases.measure("export"):
            adapter, fault = export(server, state, record)
        if (why := why_unchecked(server, record.folder)) is not None:
            display.note(f"The adapter was not checked: {why}.")
        score_at_end = finish(record, server, scores, phases, adapter, fault)
        if fault is not None:
            raise fault
    return Result(folder=record.folder, score=score_at_end, adapter=adapter)


def _show_start(resolved: ResolvedConfig, server: Server, display: Display) -> list[ResolvedSetting]:
    """Shows the data, the settings and the warnings. Returns the settings."""
    settings = [*resolved.choices(), *server.settings]
    for line in shown_lines(server.data.card.as_dict()):
        display.note(line)
    display.settings(settings)
    for warning in batch_warnings(server.config, server.local, server.clients):
        display.note(f"Warning: {warning}.")
    return settings


def _check_same(server: Server, record: Record) -> dict[str, Any]:
    """Returns the facts of the tables. Raises UserError if a run would resume with different data or a different
    model."""
    holds_private_rows = server.policy and server.channel.spec.holds_rows  # else each site keys its own fingerprints
    tables = record.keyed(server.data.tables) if holds_private_rows else dict(server.data.tables)
    record.check_same(tables, server.trainer.base.fingerprint)
    return tables


def _start(
    server: Server,
    record: Record,
    settings: list[ResolvedSetting],
    tables: dict[str, Any],
    phases: Phases,
    display: Display,
) -> State:
    """Starts the clients, makes the basis, and writes the first checkpoint.

    Raises PrivacyBudgetExceededError, with advice, if the epsilon does not suffice. An earlier start that was stopped
    while it made a basis from private rows stays charged.
    """
    try:
        with phases.measure("basis"):
            state, basis, traffic = server.start()
    except PrivacyBudgetExceededError as spent:
        raise _nothing_finished(spent) from spent
    with phases.measure("captured share"):
        basis = server.with_captured_share(basis)
    with phases.measure("scores"):
        before = score_global(server, state)
    described = describe_start(server, basis, state, settings, before)
    record.save_manifest(described | {"data": tables})
    display.note(bytes_line(described["prices"]))
    if private := described["privacy"]:
        display.note(f"privacy  {private['says']}")
    display.note("")
    record.start(state, traffic)
    return state


def _fixed(resolved: ResolvedConfig, started: ModelConfig | None = None) -> ResolvedConfig:
    """Returns the configuration with what would otherwise depend on the day and on the machine.

    These are the date that chat templates write and the dtype of the base model, so that a run can be resumed on
    another day and another device, and all sites compute in one dtype. `started`: of the run that is resumed.
    """
    model, changes, origin = resolved.config.model, dict[str, Any](), dict(resolved.origin)
    if model.template_date is None:
        changes["template_date"] = started.template_date if started else date.today().isoformat()
    if model.dtype == "auto":
        if started is None:
            dtype, origin["model.dtype"] = choose_dtype("auto", choose_device(model.device)[0])
        changes["dtype"] = started.dtype if started else str(dtype).removeprefix("torch.")
    config = resolved.config.model_copy(update={"model": model.model_copy(update=changes)})
    return replace(resolved, config=config, origin=origin)


def _nothing_finished(spent: PrivacyBudgetExceededError) -> PrivacyBudgetExceededError:
    """Returns the error with advice, for a run that cannot finish its first round within its epsilon."""
    return PrivacyBudgetExceededError(
        f"{spent}. The run was stopped before its first round was finished. What it released until then stays charged, "
        "so it cannot be resumed within the same epsilon. Start a new run under another name (--set name=other). For "
        "rows that are in both runs the epsilons add up"
    )
