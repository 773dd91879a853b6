"""The two ends of a federation as faults.py starts them: they say in which phase they are, and a site can misbehave.

    python spoil.py serve FEDERATION TOML HOST   the coordinator, as `fedsb serve` starts it
    python spoil.py join FILE FOLDER [twice]     a site, as `fedsb join` starts it

Each end writes phases.jsonl in its folder. A site reads spoil.json in its own: {"round 3": "nan", "round 9": "slow 8"}.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsb.adapters.layout import Layout
from fedsb.protocol.channel import Handle, Transport
from fedsb.protocol.messages import DescribeReply, Reply, SecAggPhase, Train, read_reply, read_request
from fedsb.protocol.payload import Payload, pack, unpack
from fedsb.utils.errors import RunError, UserError

PAUSE_SECONDS = float(os.environ.get("FEDSB_PAUSE", "0.4"))  # before what would be too short to hit: checkpoint, export


def announcer(folder: Path) -> Callable[..., None]:
    path = folder / "phases.jsonl"

    def announce(what: str, **facts: Any) -> None:
        line = json.dumps({"at": time.monotonic(), "what": what, **facts}) + "\n"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, line.encode())
        except OSError:  # a full disk is one of the faults
            print(line, file=sys.stderr)
        finally:
            os.close(handle)

    return announce


def verb_and_round(request: bytes) -> tuple[str, int]:
    """Returns what a request asks; "round", or a phase of secure aggregation, with the number of the round."""
    asked = read_request(request)
    if isinstance(asked, SecAggPhase):
        return asked.phase, asked.round + 1
    return ("round", unpack(asked.payload).round + 1) if isinstance(asked, Train) else (asked.verb, 0)


# --- a site ---


def open_handle(folder: Path) -> Handle:
    """Opens a real site's handle, whose answers are spoiled as spoil.json says."""
    from fedsb.deployment.site_folder import open_handle as open_real

    real, announce, last = open_real(folder), announcer(folder), [b""]
    wanted = folder / "spoil.json"
    todo: dict[str, str] = json.loads(wanted.read_text()) if wanted.exists() else {}

    def handle(request: bytes) -> bytes:
        verb, number = verb_and_round(request)
        announce(verb, round=number, event="begin")
        fault = todo.get(f"{verb} {number}" if number else verb, "")
        if fault.startswith("slow"):
            time.sleep(float(fault.split()[1]))
        answer = real(request)
        spoiled = spoil(fault, request, answer, last[0]) if fault else answer
        last[0] = answer
        announce(verb, round=number, event="end", bytes=len(answer))
        return spoiled

    return handle


def spoil(fault: str, request: bytes, answer: bytes, before: bytes) -> bytes:
    """Returns what a site sends instead of its answer."""
    reply = read_reply(answer, read_request(request))
    changed: dict[str, Callable[[Payload], Payload]] = {
        "nan": lambda payload: _each(payload, lambda x: np.full_like(x, np.nan)),
        "shape": lambda payload: _renamed(payload, lambda name, shape: (name, (math.prod(shape),))),
        "key": lambda payload: _renamed(payload, lambda name, shape: (f"my.{name}", shape)),
        "norm": lambda payload: _each(payload, lambda x: 1000 * x),
        "samples": lambda payload: replace(payload, samples=10**12),
        "name": lambda payload: replace(payload, client="somebody else"),
    }
    if fault in changed:
        return _with(reply, pack(changed[fault](unpack(reply.payload))))
    if fault == "garbage":
        return os.urandom(3000)
    if fault == "garbage inside":
        return _with(reply, os.urandom(3000))
    if fault == "earlier":
        return before
    if fault == "twice":  # in one answer; `join twice` sends the whole answer twice
        return _with(reply, *reply.parts, *reply.parts)
    if fault == "no update":
        return _with(reply)
    if fault == "another answer":
        return DescribeReply.model_construct(labels=None, rows="many", fingerprint="").pack()
    if fault == "facts":
        wrong = {key: {"not": ["this"]} for key in type(reply).model_fields if key != "parts"}
        return reply.model_construct(parts=reply.parts, **wrong).pack()
    return answer


def _each(payload: Payload, change: Callable[[Any], Any]) -> Payload:
    return replace(payload, vector=change(payload.vector))


def _renamed(payload: Payload, change: Callable[[str, Any], tuple[str, Any]]) -> Payload:
    return replace(payload, layout=Layout(tuple(change(name, shape) for name, shape in payload.layout.shapes)))


def _with(reply: Reply, *parts: bytes) -> bytes:
    return reply.model_copy(update={"parts": parts}).pack()


def node_twice() -> None:
    """Runs a site's node that sends every answer twice."""
    from fedsb.deployment import flower_client

    push = flower_client.FlowerNode._push

    def twice(self: Any, node: Any, reply: Any) -> None:
        push(self, node, reply)
        try:
            push(self, node, reply)
            flower_client.log_event("brought twice")
        except Exception as error:
            flower_client.log_event("the second was refused", reason=repr(error))

    flower_client.FlowerNode._push = twice  # type: ignore[method-assign]
    flower_client.run_child(flower_client.main)


# --- the coordinator ---


def coordinate(transport: Transport, folder: Path) -> None:
    """Runs the coordinator's program, slowed down where a kill would come too late."""
    import fedsb.runs.run
    from fedsb.deployment import coordinate as real
    from fedsb.runs.record import Record

    announce, checkpoint, export = announcer(folder.parent.parent), Record.checkpoint, fedsb.runs.run.export

    def slow_checkpoint(self: Record, state: Any, keep: int) -> None:
        announce("checkpoint", round=state.round, event="begin")
        time.sleep(PAUSE_SECONDS)
        checkpoint(self, state, keep)
        announce("checkpoint", round=state.round, event="end")

    def slow_export(*arguments: Any) -> Path:
        announce("export", round=0, event="begin")
        time.sleep(PAUSE_SECONDS)
        return export(*arguments)

    Record.checkpoint, fedsb.runs.run.export = slow_checkpoint, slow_export  # type: ignore[method-assign]
    announce("program", round=0, event="begin")
    real.coordinate(transport, folder)


def main() -> None:
    from fedsb.deployment import run
    from fedsb.deployment.coordinate import prepare
    from fedsb.deployment.run import join, serve

    try:
        if sys.argv[1] == "serve":
            from fedsb.config.load import load_config

            folder = Path(sys.argv[2])
            serve(folder, "spoil:coordinate", prepare(folder, load_config(Path(sys.argv[3]))), listen=sys.argv[4])
        elif sys.argv[1] == "join":
            if sys.argv[4:] == ["twice"]:
                child = run.Child
                run.Child = lambda **facts: child(  # type: ignore[misc, assignment]
                    **{**facts, "module": "twice" if facts["name"] == "node" else facts["module"]}
                )
            join(Path(sys.argv[2]), Path(sys.argv[3]), "spoil:open_handle")
    except (UserError, RunError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
