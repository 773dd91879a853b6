"""A comparison, top to bottom: every contender is tuned by the same budget, then run over the same seeds.

Cells run in processes of their own, `workers` at a time. A contender's search is a sequence, the contenders are tuned
side by side, and a contender's seeds start as soon as its rate is known. Every finished cell is on disk at once, so a
comparison that is started again goes on where it stopped.
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

from fedsb.comparison.cells import Cell, CellError, Outcome, Results, make_cell, run_cell
from fedsb.comparison.contenders import Contender, contenders_of
from fedsb.comparison.figures import Entry, comparison_of
from fedsb.comparison.page import write_page
from fedsb.comparison.search import best_rate, next_rate, start_rate
from fedsb.comparison.spent import ahead, together
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
    """What is to be run, known before anything is."""

    asked: CompareConfig
    contenders: Sequence[Contender]
    workers: int
    higher_is_better: bool

    @property
    def cells(self) -> int:
        return len(self.contenders) * (self.asked.trials + self.asked.seeds)


def compare(loaded: ResolvedConfig, folder: Path, note: Note) -> dict[str, Any]:
    """Runs what is left of a comparison, writes its files into `folder`, and gives back comparison.json.

    Cells that failed are under "failed", with what they said; the others have run all the same.

    Raises:
        UserError: anything wrong with what is asked, before any cell.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the running cells are ended, the finished ones are kept.
    """
    plan = plan_of(loaded)
    with Results.open(folder) as results:
        note(
            f"{_count(len(plan.contenders), 'contender')}: {', '.join(contender.name for contender in plan.contenders)}"
        )
        note(
            f"{plan.cells} runs, {plan.workers} at a time: for each {_count(plan.asked.trials, 'learning rate')} on "
            f"seed 0, then {_count(plan.asked.seeds, 'seed')}; what is finished is kept in {results.path}"
        )
        if spends := ahead(plan.contenders, plan.asked.trials + plan.asked.seeds):
            note(spends)
        work = Work(plan, results, note)
        try:
            entries = asyncio.run(work.all())
        except asyncio.CancelledError:  # SIGTERM or SIGHUP
            raise KeyboardInterrupt from None
    found = comparison_of(entries, loaded, work.failed, higher_is_better=plan.higher_is_better)
    found["privacy"] = together(folder, plan.contenders)
    return write(found, folder)


def write(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """comparison.json, table.md and comparison.html."""
    write_atomic(folder / "comparison.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomic(folder / "table.md", markdown(found).encode())
    write_page(found, folder)
    return found


def plan_of(loaded: ResolvedConfig) -> Plan:
    """Raises ConfigError with everything that is wrong with any contender."""
    asked = loaded.config.compare
    contenders = contenders_of(loaded)
    workers = asked.workers
    if workers == "auto":
        on_cpu = all(choose_device(device)[0].type == "cpu" for device in {c.config.model.device for c in contenders})
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = workers if on_cpu else 1  # two runs on one GPU would share its memory and its time
    task = contenders[0].config.task
    return Plan(
        asked=asked,
        contenders=contenders,
        workers=workers,
        higher_is_better=TASKS[task.kind].higher_is_better_by(task.score),
    )


class Work:
    """The cells of a plan on their way."""

    def __init__(self, plan: Plan, results: Results, note: Note) -> None:
        self.plan = plan
        self.results = results
        self.note = note
        self.slots = asyncio.Semaphore(plan.workers)
        self.failed: dict[str, str] = {}
        self.started = time.monotonic()
        self.ran = self.known = 0  # cells that were run now, that were there already

    async def all(self) -> list[Entry]:
        """One entry a contender, in their order."""
        me = asyncio.current_task()
        assert me is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, me.cancel)
        return await side_by_side(self.contender(each) for each in self.plan.contenders)

    async def contender(self, contender: Contender) -> Entry:
        """A contender's search, then its seeds side by side. What fails is noted, and the rest goes on."""
        tried: dict[float, float | None] = {}
        lr: float | None = None
        seeds: list[Outcome | None] = [None] * self.plan.asked.seeds
        try:
            lr = await self.tune(contender, tried) if self.plan.asked.trials else contender.config.train.lr
            cells = [final(contender, lr, seed) for seed in range(self.plan.asked.seeds)]
            seeds = await side_by_side(self.seed(cell) for cell in cells)
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
        """Fills `tried` and gives back the best rate. Raises CellError where a trial fails, or none was finite."""
        config = contender.config
        start = start_rate(contender.method.adapter, config.train.lr, contender.set.get("train.lr"))
        for _ in range(self.plan.asked.trials):
            lr = next_rate(tried, start, self.plan.higher_is_better)
            tried[lr] = (await self.outcome(trial(contender, lr, self.plan.asked.validation_fraction)))["score"]
        if all(score is None for score in tried.values()):
            raise CellError(f"no learning rate of {', '.join(map(str, tried))} gave a finite loss: start from a lower")
        return best_rate(tried, self.plan.higher_is_better)

    async def seed(self, cell: Cell) -> Outcome | None:
        """None where it failed."""
        try:
            outcome = await self.outcome(cell)
        except CellError as error:
            self.fail(cell.name, str(error))
            return None
        if outcome["score"] is None:
            self.fail(cell.name, f"the loss is not finite; {outcome.get('diverged', '')}")
            return None
        return outcome

    async def outcome(self, cell: Cell) -> Outcome:
        """A cell's outcome: the one that is kept, or that of a run."""
        known = self.results.get(cell)
        if known is not None:
            self.known += 1
            return known
        if (stale := self.results.stale(cell)) is not None:
            changed = "; ".join(difference(stale["settings"], cell.portable)) or "its files' content"
            self.note(f"{cell.name}: a kept run has other settings and is not used ({changed})")
        async with self.slots:
            outcome = await run_cell(cell, self.results.path.parent / "ledgers")
        self.results.add(cell, outcome)
        self.ran += 1
        score = "not finite" if outcome["score"] is None else score_text(outcome["metric"])(outcome["score"])
        left = self.plan.cells - self.known - self.ran
        to_come = seconds_text((time.monotonic() - self.started) / self.ran * left)
        more = f"; {left} left, about {to_come}" if left else ""
        self.note(f"{cell.name}: {score} in {seconds_text(outcome['seconds'])}{more}")
        return outcome

    def fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.note(f"{name} failed: {why}")


async def side_by_side(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. Cancelled, or where one raises, it waits until the others have ended their processes."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def trial(contender: Contender, lr: float, share: float) -> Cell:
    """One learning rate on seed 0, scored once, at the end, on rows that it is not trained on; no test row is read."""
    config = contender.config
    settings = settings_of(config, lr, seed=0)
    settings["data"] |= {"validation_fraction": share}
    settings["eval"] |= {"every": config.rounds}
    settings["basis"] |= {"share_samples": 0}
    return make_cell(f"{contender.name} tune lr {lr:g}", settings)


def final(contender: Contender, lr: float, seed: int) -> Cell:
    """A run at the best rate, on all training rows."""
    return make_cell(f"{contender.name} seed {seed}", settings_of(contender.config, lr, seed))


def settings_of(config: Config, lr: float, seed: int) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    settings["train"] |= {"lr": lr}
    return settings | {"seed": seed}
