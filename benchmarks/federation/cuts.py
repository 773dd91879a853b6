"""Disconnects parties of a real federation in network namespaces, in every phase. Nothing may be lost.

    python benchmarks/federation/cuts.py [--only NUMBER ...]

opening    before the first round
training   a site is in the middle of a round's steps
up         a site's answer is half-way: its link is slow, so that an answer takes seconds
down       a site's request is half-way
between    a site has answered, others have not; the next round begins while it is offline and nobody knows it yet
finish     sites receive the final model

Afterwards the adapter must be, bit for bit, that of the same run without interruptions, and no site dropped from any
round. Writes cuts.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import adapter, dropped, wait_for_end
from namespaces import Network, why_not
from rig import CO, HERE, SITES, Rig, now, running, tiny_rig

RATE = "8mbit"  # 3.4 MB in three and a half seconds
SLOW_SECONDS = 21  # site-a's, in the round before `between`


@dataclass(frozen=True)
class Pull:
    phase: str
    party: str
    round: int
    seconds: float


PLAN = [
    Pull("opening", "site-b", 0, 30),
    Pull("training", "site-b", 2, 5),
    Pull("training", "site-b", 3, 30),
    Pull("training", CO, 4, 30),
    Pull("up", "site-b", 5, 5),
    Pull("up", "site-b", 6, 30),
    Pull("up", "site-b", 7, 90),
    Pull("down", "site-b", 8, 5),
    Pull("down", "site-b", 9, 30),
    Pull("between", "site-b", 10, 40),
    Pull("up", CO, 12, 30),
    Pull("finish", "site-b", 13, 30),
]
LAST = 13


def carry_out(folder: Path, plan: Sequence[Pull]) -> tuple[Rig, list[dict[str, Any]]]:
    spoils = {"site-a": {f"round {pull.round}": f"slow {SLOW_SECONDS}" for pull in PLAN if pull.phase == "between"}}
    with Network([CO, *SITES]) as net:
        rig = tiny_rig(
            folder,
            spoils,
            net=net,
            shape={"width": 512, "layers": 2},
            rounds=LAST,
            method={"name": "fedit", "rank": 64},
            train={"local_steps": 6},
        )
        net.slow("site-b", RATE)
        with running(rig):
            rows = [pull_one(rig, net, pull) for pull in plan]
            wait_for_end(rig)
    return rig, rows


def pull_one(rig: Rig, net: Network, pull: Pull) -> dict[str, Any]:
    """Waits for the phase, pulls the cable, puts it back, and waits until the round is finished."""
    wait_for(rig, pull)
    begun, at = now(), time.monotonic()
    net.cut(pull.party)
    time.sleep(pull.seconds)
    net.mend(pull.party)
    back = time.monotonic()
    number = pull.round + (pull.phase == "between")
    if pull.phase == "finish":
        wait_for_end(rig)
        end = time.monotonic()
    else:
        end = rig.when(CO, "checkpoint", number, "end")
    row = {**vars(pull), "held_the_round": end > back, "seconds_from_mended_to_finished": round(end - back, 1)}
    print(row, flush=True)
    return {**row, "hit": end > at, "said": rig.said(begun)}


def wait_for(rig: Rig, pull: Pull) -> None:
    if pull.phase == "opening":
        rig.when("site-b", "prepare")
    elif pull.phase == "training":
        rig.when("site-b", "round", pull.round)
    elif pull.phase == "up":
        rig.when("site-b", "round", pull.round, "end")
        time.sleep(1.5)
    elif pull.phase == "down":
        rig.when(CO, "checkpoint", pull.round - 1, "end")
        time.sleep(2.0)
    elif pull.phase == "between":
        rig.when("site-b", "round", pull.round, "end")
        time.sleep(6.0)  # its answer is there
    else:
        rig.when("site-a", "finish")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", type=int, help="of the pulls, these numbers; writes nothing")
    asked = parser.parse_args()
    if reason := why_not():
        sys.exit(f"this machine does not allow network namespaces: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="fedsb-cuts-"))
    rig, rows = carry_out(folder / "cut", [PLAN[i] for i in asked.only] if asked.only else PLAN)
    whole, _ = carry_out(folder / "whole", [])
    found = {
        "rows": rows,
        "dropped": dropped(rig),
        "dropped_unbroken": dropped(whole),
        "sha256": adapter(rig.run)[:16],
        "the same adapter": adapter(rig.run) == adapter(whole.run),
    }
    text = json.dumps(found, indent=1).replace(f"{folder}/", "") + "\n"
    print(text if asked.only else "", folder)
    if not asked.only:
        (HERE / "cuts.json").write_text(text)
    if not found["the same adapter"]:
        sys.exit("the adapters differ")


if __name__ == "__main__":
    main()
