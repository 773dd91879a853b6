"""Kills every process of a federation by kill -9, in every phase, all in one run.

opening      before the first round: sites read their rows and load the model
training     a site is in the middle of a round's steps
travel       the update is made and its push is on the wire: the SuperLink is held (SIGSTOP) until the kill
checkpoint   the coordinator has added the round to its records, and its checkpoint does not exist yet
finish       sites receive the final model, and the coordinator writes the adapter
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

from rig import CO, SITES, Rig, now

PROCESSES = [
    (CO, "server"),
    (CO, "superlink"),
    (CO, "supervisor"),
    ("site-b", "node"),
    ("site-b", "worker"),
    ("site-b", "supervisor"),
]
PHASES = ("training", "travel", "checkpoint")
# (round, phase, party, process); a coordinator that dies over a checkpoint is waited for until the round behind it
PLAN = [(2 + i, phase, *each) for i, (phase, each) in enumerate((p, e) for p in PHASES[:2] for e in PROCESSES)]
PLAN += [(2 + len(PLAN) + 2 * i, "checkpoint", *each) for i, each in enumerate(PROCESSES)]
FULL = PLAN[-1][0] + 2  # the round in which the coordinator's disk is full
PAUSED = FULL + 1  # the round in which the coordinator is stopped for a while
PAUSE_SECONDS = 600.0
HURT_ROUNDS = PAUSED + 2
FINISH = [("site-a", "node"), ("site-b", "worker"), ("site-c", "supervisor")]


def break_it(rig: Rig, mount: bool) -> list[dict[str, Any]]:
    rows = opening(rig)
    for number, phase, party, process in PLAN:
        rows.append(strike(rig, phase, number, party, process))
    if mount:
        rows.append(full_disk(rig))
    rows.append(pause(rig))
    return rows + finish(rig)


def opening(rig: Rig) -> list[dict[str, Any]]:
    begun, rows = now(), []
    for party, process in FINISH:
        rig.when(party, "describe")
        rows.append(_struck(rig, "opening", party, process))
    after = rig.when("site-a", "prepare")
    rows.append(_struck(rig, "opening", CO, "server"))
    for process in ("superlink", "supervisor"):
        after = rig.when(CO, "program", after=after)
        time.sleep(0.3)
        rows.append(_struck(rig, "opening", CO, process))
        after = time.monotonic()
    end = rig.when(CO, "checkpoint", 0, "end")
    for row in rows:
        row |= {"seconds": round(end - row.pop("at"), 1), "hit": True}
    rows[-1]["said"] = rig.said(begun)
    return rows


def strike(rig: Rig, phase: str, number: int, party: str, process: str) -> dict[str, Any]:
    """Waits for the phase of that round, kills, and waits until the round is finished."""
    begun, held = now(), 0
    if phase == "checkpoint":
        rig.when(CO, "checkpoint", number)
    else:
        rig.when("site-b", "round", number)
        if phase == "travel":
            held = rig.send(signal.SIGSTOP, CO, "superlink")
            rig.when("site-b", "round", number, "end")
        time.sleep(0.4 if phase == "travel" else 0.1)
    row = _struck(rig, phase, party, process, held)
    before = [line for line in rig.phases("site-b") if line["at"] < row["at"] and line["round"] == number]
    checkpoints = [line for line in rig.phases(CO) if (line["what"], line["round"]) == ("checkpoint", number)]
    done = any(line["event"] == "end" for line in before), any(line["at"] < row["at"] for line in checkpoints)
    row["hit"] = done == {"training": (False, False), "travel": (True, False), "checkpoint": (True, True)}[phase]
    row["hit"] &= not any(line["event"] == "end" and line["at"] < row["at"] for line in checkpoints)
    end = rig.when(CO, "checkpoint", number + (phase == "checkpoint"), "end", after=row["at"])
    return {**row, "round": number, "seconds": round(end - row.pop("at"), 1), "said": rig.said(begun)}


def full_disk(rig: Rig) -> dict[str, Any]:
    """Fills the disk: the run ends and states the reason. With free space, the same command continues it."""
    begun = now()
    rig.when("site-b", "round", FULL)
    rig.fill(CO)
    at = time.monotonic()
    code = rig.processes[CO].wait(180)
    words = (rig.folder / f"{CO}.out").read_text().strip().splitlines()[-1]
    rig.empty(CO)
    rig.start(CO)
    end = rig.when(CO, "checkpoint", FULL, "end", after=at)
    row = {"phase": "training", "party": CO, "process": "disk full", "hit": code != 0, "round": FULL}
    return {**row, "seconds": round(end - at, 1), "said": [f"{CO}: {words}", *rig.said(begun)]}


def pause(rig: Rig) -> dict[str, Any]:
    """Sends SIGTERM, waits ten minutes, and runs the same command again."""
    begun = now()
    rig.when("site-b", "round", PAUSED)
    at = time.monotonic()
    rig.processes[CO].terminate()
    rig.processes[CO].wait(60)
    time.sleep(PAUSE_SECONDS)
    rig.start(CO)
    end = rig.when(CO, "checkpoint", PAUSED, "end", after=at)
    row = {"phase": "training", "party": CO, "process": f"stopped for {PAUSE_SECONDS:g} s", "hit": True}
    return {**row, "round": PAUSED, "seconds": round(end - at, 1), "said": rig.said(begun)}


def finish(rig: Rig) -> list[dict[str, Any]]:
    begun, rows = now(), []
    for party, process in FINISH:
        rig.when(party, "finish")
        rows.append(_struck(rig, "finish", party, process))
    after = 0.0
    for process in ("server", "superlink", "supervisor"):
        rig.when(CO, "export", after=after)
        rows.append(_struck(rig, "finish", CO, process))
        after = time.monotonic()
    rig.until(lambda: True if rig.processes[CO].poll() == 0 else None, "the end of the run", 300)
    end = time.monotonic()
    for row in rows:
        row |= {"seconds": round(end - row.pop("at"), 1), "hit": True}
    told = [name for name in SITES if list((rig.folder / name).glob("runs/*/adapter/adapter_model.safetensors"))]
    rows[-1]["said"] = [f"the adapter is at {', '.join(told)}", *rig.said(begun)]
    return rows


def _struck(rig: Rig, phase: str, party: str, process: str, held: int = 0) -> dict[str, Any]:
    """Kills; a supervisor is started again at once, as a service manager does."""
    killed = rig.send(signal.SIGKILL, party, process)
    at = time.monotonic()
    if held and held != killed:
        with suppress(ProcessLookupError):
            os.kill(held, signal.SIGCONT)
    if process == "supervisor":
        rig.processes[party].wait()
        rig.start(party)
    return {"phase": phase, "party": party, "process": process, "at": at}
