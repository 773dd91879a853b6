"""Stand-ins for the two ends: a handle that sends back what it gets, and a program that asks for that."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from fedsb.protocol.channel import Channel, Handle, NoResponse
from fedsb.utils.errors import RefusalError


def open_echo(folder: Path) -> Handle:
    """Sends back what it gets; `slow` takes 2 s, `bad` is refused, `bug` fails. Counts what it does in a file."""

    def handle(request: bytes) -> bytes:
        with (folder / "handled.txt").open("a") as handled:
            handled.write(f"{request[:40]!r} {os.getpid()}\n")
        if request.startswith(b"slow"):
            time.sleep(2.0)
        if request == b"bad":
            raise RefusalError("this site does not do that")
        if request == b"bug":
            raise ValueError("a secret of this site")
        return request

    return handle


def run_script(channel: Channel, folder: Path) -> None:
    """Does what step-N.json says, N = 0, 1, ..., and notes in done.jsonl how each went: resumed, it goes on."""
    done = folder / "done.jsonl"
    while True:
        number = len(done.read_text().splitlines()) if done.exists() else 0
        step = folder / f"step-{number}.json"
        if not step.exists():
            time.sleep(0.02)
            continue
        todo = json.loads(step.read_text())
        if todo.get("stop"):
            return
        outcome = _ask(channel, todo)
        with done.open("a") as file:
            file.write(json.dumps({"sites": list(channel.sites), **outcome, "pid": os.getpid()}) + "\n")


def _ask(channel: Channel, todo: dict[str, object]) -> dict[str, object]:
    head, size = str(todo["head"]).encode(), int(str(todo["bytes"]))
    requests = {name: head + os.urandom(max(0, size - len(head))) for name in channel.sites}
    begun = time.monotonic()
    answers: dict[str, str] = {}
    took: dict[str, float] = {}
    for name, answer in channel.ask(requests, todo.get("timeout_s")):  # type: ignore[arg-type]
        took[name] = round(time.monotonic() - begun, 3)
        if isinstance(answer, NoResponse):
            answers[name] = answer.reason
        else:
            answers[name] = "same" if answer == requests[name] else "other"
    return {"answers": answers, "seconds": round(time.monotonic() - begun, 3), "took": took}


def step(folder: Path, number: int, wait_s: float = 180.0, **todo: object) -> Callable[[], dict[str, object]]:
    """Orders a step of `run_script`; what it returns waits for the outcome."""
    (folder / ".step").write_text(json.dumps(todo))
    (folder / ".step").rename(folder / f"step-{number}.json")

    def outcome() -> dict[str, object]:
        done, end = folder / "done.jsonl", time.monotonic() + wait_s
        while time.monotonic() < end:
            lines = done.read_text().splitlines() if done.exists() else []
            if len(lines) > number:
                return json.loads(lines[number])  # type: ignore[no-any-return]
            time.sleep(0.02)
        raise AssertionError(f"step {number} did not end within {wait_s} s")

    return outcome
