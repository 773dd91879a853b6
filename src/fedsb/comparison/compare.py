"""A comparison: every contender is tuned with the same budget, then run with the same seeds.

Each cell runs in its own process, `workers` at a time. The search of one contender is sequential; contenders are tuned
in parallel, and the seeds of a contender start as soon as its rate is known. Every finished cell is stored at once, so
a comparison that is started again resumes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedsb.comparison.cells import (
    Cell,
    CellError,
    Outcome,
    Results,
    current_settings,
    make_cell,
    run_cell,
    visible_gpus,
)
from fedsb.comparison.contenders import Contender, contenders_of
from fedsb.comparison.figures import Entry, comparison_of
from fedsb.comparison.page import write_page
from fedsb.comparison.search import best_rate, next_rate, start_rate
from fedsb.comparison.spent import epsilon_together, planned_epsilon
from fedsb.comparison.table import markdown
from fedsb.config.load import ResolvedConfig
from fedsb.config.nested import difference
from fedsb.config.schema import CompareConfig, Config
from fedsb.data.tasks import TASKS
from fedsb.models.load import choose_device
from fedsb.utils.files import write_atomic
from fedsb.utils.formatting import score_text, seconds_text

Note = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a comparison, known before the first run."""

    options: CompareConfig
    contenders: Sequence[Contender]
    workers: int
    higher_is_better: bool

    @property
    def cells(self) -> int:
        return len(self.contenders) * (self.options.trials + self.options.seeds)


def compare(loaded: ResolvedConfig, folder: Path, note: Note) -> dict[str, Any]:
    """Runs the remaining cells, writes the comparison to `folder`, and returns the content of comparison.json.

    Cells that failed are under "failed", with their error messages; the other cells have run.

    Raises:
        UserError: an invalid configuration, before any cell runs.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP. Running cells are stopped; finished ones are stored.
    """
    plan = plan_of(loaded)
    with Results.open(folder) as results:
        note(
            f"{_count(len(plan.contenders), 'contender')}: {', '.join(contender.name for contender in plan.contenders)}"
        )
        note(
            f"{plan.cells} runs, {plan.workers} at a time: {_count(plan.options.trials, 'learning rate')} on seed 0, "
            f"{_count(plan.options.seeds, 'seed')} per contender; finished runs are in {results.path}"
        )
        if budget := planned_epsilon(plan.contenders, plan.options.trials + plan.options.seeds):
            note(budget)
        work = Work(plan, results, note)
        try:
            entries = asyncio.run(work.all())
        except asyncio.CancelledError:  # SIGTERM or SIGHUP
            raise KeyboardInterrupt from None
    found = comparison_of(entries, loaded, work.failed, higher_is_better=plan.higher_is_better)
    found["privacy"] = epsilon_together(folder, plan.contenders)
    return write(found, folder)


def write(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes comparison.json, table.md and comparison.html."""
    write_atomic(folder / "comparison.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomic(folder / "table.md", markdown(found).encode())
    write_page(found, folder)
    return found


def plan_of(loaded: ResolvedConfig) -> Plan:
    """Returns the plan of a comparison. Raises ConfigError with all errors of all contenders."""
    options = loaded.config.compare
    contenders = contenders_of(loaded)
    workers = _workers(contenders) if options.workers == "auto" else options.workers
    task = contenders[0].config.task
    return Plan(
        options=options,
        contenders=contenders,
        workers=workers,
        higher_is_better=TASKS[task.kind].higher_is_better_by(task.score),
    )


def _workers(contenders: Sequence[Contender]) -> int:
    """Returns one worker per core, or per GPU, because two runs on one GPU would share its memory and time."""
    if any(choose_device(each.config.model.device)[0].type != "cpu" for each in contenders):
        return max(1, len(visible_gpus()))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Work:
    """Runs the cells of a plan."""

    def __init__(self, plan: Plan, results: Results, note: Note) -> None:
        self.plan = plan
        self.results = results
        self.note = note
        self.slots: asyncio.Queue[int] = asyncio.Queue()  # of the workers that are free
        for slot in range(plan.workers):
            self.slots.put_nowait(slot)
        self.failed: dict[str, str] = {}
        self.started = time.monotonic()
        self.ran = self.known = 0  # cells that ran now, cells that were stored

    async def all(self) -> list[Entry]:
        """Returns one entry per contender, in their order."""
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await in_parallel(self.contender(each) for each in self.plan.contenders)

    async def contender(self, contender: Contender) -> Entry:
        """Tunes a contender, then runs its seeds in parallel. A failed cell is noted; the others continue."""
        tried: dict[float, float | None] = {}
        lr: float | None = None
        seeds: list[Outcome | None] = [None] * self.plan.options.seeds
        try:
            lr = await self.tune(contender, tried) if self.plan.options.trials else contender.config.train.lr
            cells = [final(contender, lr, seed) for seed in range(self.plan.options.seeds)]
            seeds = await in_parallel(self.seed(cell) for cell in cells)
        except CellError as error:
            self.fail(f"{contender.name}, tuning", str(error))
        return Entry(
            name=contender.name,
            set=contender.set,
            is_control=contender.is_control,
            control_of=contender.control_of,
            rank=contender.method.total_rank,
            lr=lr,
            tried=tried,
            seeds=seeds,
        )

    async def tune(self, contender: Contender, tried: dict[float, float | None]) -> float:
        """Fills `tried` and returns the best rate. Raises CellError if a trial fails, or if no loss was finite."""
        config = contender.config
        start = start_rate(contender.method.adapter, config.train.lr, contender.set.get("train.lr"))
        for _ in range(self.plan.options.trials):
            lr = next_rate(tried, start, self.plan.higher_is_better)
            tried[lr] = (await self.outcome(trial(contender, lr, self.plan.options.validation_fraction)))["score"]
        if all(score is None for score in tried.values()):
            rates = ", ".join(map(str, tried))
            raise CellError(f"None of the learning rates {rates} gave a finite loss. Start from a lower train.lr.")
        return best_rate(tried, self.plan.higher_is_better)

    async def seed(self, cell: Cell) -> Outcome | None:
        """Returns the outcome of a seed; None if it failed."""
        try:
            outcome = await self.outcome(cell)
        except CellError as error:
            self.fail(cell.name, str(error))
            return None
        if outcome["score"] is None:
            self.fail(cell.name, f"The loss is not finite. {outcome.get('diverged', '')}")
            return None
        return outcome

    async def outcome(self, cell: Cell) -> Outcome:
        """Returns the outcome of a cell: the stored one, or that of a new run."""
        known = self.results.get(cell)
        if known is not None:
            self.known += 1
            return known
        if (stale := self.results.stale(cell)) is not None:
            changed = (
                "; ".join(difference(current_settings(stale["settings"]), cell.portable)) or "the content of its files"
            )
            self.note(f"{cell.name}: a stored run has different settings and is not used ({changed})")
        slot = await self.slots.get()
        try:
            outcome = await run_cell(cell, self.results.path.parent / "ledgers", slot)
        finally:
            self.slots.put_nowait(slot)
        self.results.add(cell, outcome)
        self.ran += 1
        score = "not finite" if outcome["score"] is None else score_text(outcome["metric"])(outcome["score"])
        left = self.plan.cells - self.known - self.ran
        time_left = seconds_text((time.monotonic() - self.started) / self.ran * left)
        more = f"; {left} left, about {time_left}" if left else ""
        self.note(f"{cell.name}: {score} in {seconds_text(outcome['seconds'])}{more}")
        return outcome

    def fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.note(f"{name} failed: {why}")


async def in_parallel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results, in order. If cancelled, or if one raises, waits until the others have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def trial(contender: Contender, lr: float, share: float) -> Cell:
    """Returns the cell of one learning rate: seed 0, scored at the end on held-out training rows, not on test rows."""
    config = contender.config
    settings = settings_of(config, lr, seed=0)
    settings["data"] |= {"validation_fraction": share}
    settings["eval"] |= {"every": config.rounds}
    settings["basis"] |= {"share_samples": 0}
    return make_cell(f"{contender.name} tune lr {lr:g}", settings)


def final(contender: Contender, lr: float, seed: int) -> Cell:
    """Returns the cell of one seed: the best rate, on all training rows."""
    return make_cell(f"{contender.name} seed {seed}", settings_of(contender.config, lr, seed))


def settings_of(config: Config, lr: float, seed: int) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    settings["train"] |= {"lr": lr}
    return settings | {"seed": seed}
