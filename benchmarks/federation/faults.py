"""Causes every fault on a real federation, and records what was logged, how long it took and what was lost.

    make faults        (half an hour on two cores, ten minutes of it a pause; --only unbroken kills ... for parts)

A coordinator and three sites are separate processes with TLS between them. The model is tiny: a round takes a second.
Writes faults.json and faults.md to the folder of this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from kills import HURT_ROUNDS, break_it
from rig import CO, HERE, SITES, Rig, can_mount, now, running, tiny_rig
from world import OneProcess

from fedsb.config.load import load_config
from fedsb.privacy.ledger import read_ledger
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate

DEADLINE = 8.0
ANSWERS = {  # round -> (site, what it sends); the rounds between are for its return
    2: ("site-a", "nan", "an update of NaN"),
    3: ("site-b", "shape", "a wrong shape"),
    4: ("site-c", "key", "wrong keys"),
    5: ("site-a", "norm", "1000 times the norm"),
    6: ("site-b", "garbage", "random bytes for an answer"),
    7: ("site-c", "garbage inside", "random bytes for an update"),
    8: ("site-a", "earlier", "the answer of the round before"),
    9: ("site-b", "twice", "the same update twice in one answer"),
    10: ("site-c", "samples", "a claim of 10^12 rows"),
    11: ("site-a", "name", "an update under another site's name"),
    12: ("site-b", "no update", "an answer without an update"),
    13: ("site-c", "another answer", "an answer to another question"),
    14: ("site-a", "facts", "an answer whose facts are of wrong types"),
    16: ("site-b", f"slow {2 * DEADLINE:g}", f"{2 * DEADLINE:g} s late (engine.deadline_s = {DEADLINE:g})"),
}
STOPPED, FULL, LAST = 21, 25, 28


LONG = {"local_steps": 60}  # about half a second, so that a kill hits the training


def unbroken(folder: Path) -> dict[str, Any]:
    rig = tiny_rig(folder / "unbroken", rounds=HURT_ROUNDS, train=LONG)
    with running(rig):
        wait_for_end(rig)
    seconds = [row["seconds"] for row in read_rows(rig.run / "rounds.jsonl")]
    return {"adapter": adapter(rig.run), "seconds_a_round": statistics.median(seconds)}


def kills(folder: Path, mount: bool) -> dict[str, Any]:
    rig = tiny_rig(folder / "kills", rounds=HURT_ROUNDS, train=LONG)
    if mount:
        rig.disks[CO] = "64m"
    with running(rig):
        rows = break_it(rig, mount)
    return {"rows": rows, "adapter": adapter(rig.run), "dropped": dropped(rig)}


def answers(folder: Path, mount: bool) -> dict[str, Any]:
    """Runs misbehaving sites, one after another, in one run. site-c's node also sends every answer twice."""
    spoils: dict[str, dict[str, str]] = {name: {} for name in SITES}
    for number, (site, fault, _) in ANSWERS.items():
        spoils[site][f"round {number}"] = fault
    spoils["site-b"]["finish"] = "facts"
    rig = tiny_rig(folder / "answers", spoils, rounds=LAST, train={"local_steps": 4}, engine={"deadline_s": DEADLINE})
    if mount:
        rig.disks["site-b"] = "4m"
    rows = []
    with running(rig, twice="site-c"):
        begun = now()
        rig.when("site-a", "round", STOPPED)
        rig.send(signal.SIGSTOP, "site-a", "node")
        rig.when(CO, "checkpoint", STOPPED, "end")
        rig.send(signal.SIGCONT, "site-a", "node")
        if mount:
            rig.when("site-b", "round", FULL)
            rig.fill("site-b")
            rig.when(CO, "checkpoint", FULL + 1, "begin")
            rig.empty("site-b")
        wait_for_end(rig)
        said = rig.said(begun)
    out = dropped(rig)
    wanted = {number: (site, words) for number, (site, _, words) in ANSWERS.items()}
    wanted[STOPPED] = ("site-a", "its node stopped (SIGSTOP) until the round is over, then SIGCONT")
    if mount:
        wanted[FULL] = ("site-b", "its disk full (a tmpfs of 4 MB, filled) for two rounds")
    for number, (site, words) in wanted.items():
        misses = [n for n in range(number, LAST + 1) if site in out.get(n, {})]
        gone = [n for i, n in enumerate(misses) if n == number + i]
        rows.append(
            {
                "fault": words,
                "site": site,
                "round": number,
                "dropped_in": gone,
                "reason": out.get(number, {}).get(site, "not dropped: counted once"),
                "back_in": number + len(gone),
            }
        )
    rows.append({"fault": "every answer brought twice by its node", "site": "site-c", "said": second(rig)})
    rows.append({"fault": "an answer to finish whose facts are of wrong types", "site": "site-b", "said": last(rig)})
    expected = {(number, site) for number, row in out.items() for site in row}
    surplus = sorted(f"round {n}: {site}" for n, site in expected if not _meant(rows, n, site))
    return {"rows": rows, "unmeant": surplus, "said": said, "same_as_left_out": same_as_left_out(rig, out)}


def private(folder: Path) -> dict[str, Any]:
    """Kills in a run whose sites each keep a ledger: it never shrinks, and the coordinator's copy equals it."""
    privacy = {"unit": "example", "epsilon": 8.0, "clip_norm": 1.0, "delta": 1e-3}
    rig = tiny_rig(
        folder / "private", rounds=8, privacy=privacy, clients={"holdout_fraction": 0.0}, basis={"kind": "core"}
    )
    struck = [(2, "round", "site-b", "worker"), (3, "round", "site-b", "node"), (4, "round", CO, "server")]
    struck += [(5, "round", CO, "superlink"), (6, "round", "site-b", "supervisor"), (7, "round", CO, "supervisor")]
    rows, before = [], dict[str, int]()
    with running(rig):
        rig.when("site-b", "start")
        rig.send(signal.SIGKILL, "site-b", "worker")  # the ledger is made, and no basis is told yet
        rig.when(CO, "checkpoint", 0, "end")
        rows.append({"killed": "site-b's worker", "in": "the opening", **ledgers(rig, before)})
        rows += charged_kills(rig, struck, before)
    spent = [row["epsilon"] for row in read_rows(rig.run / "rounds.jsonl")]
    return {"rows": rows, "epsilon": spent, "dropped": dropped(rig)}


def shared(folder: Path) -> dict[str, Any]:
    """Kills in a run with shared noise, in every exchange of secure aggregation."""
    rig = tiny_rig(
        folder / "shared",
        rounds=15,
        train={"local_steps": 1},
        privacy={"unit": "example", "noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-3},
        clients={"holdout_fraction": 0.0},
        server={"secure_aggregation": True},
    )
    parties = [("site-b", name) for name in ("worker", "node", "supervisor")]
    parties += [(CO, name) for name in ("server", "superlink", "supervisor")]
    struck = [(1, "advert", "site-b", "worker"), (1, "sealed", CO, "server"), (1, "held", "site-c", "supervisor")]
    struck += [(2 + i, "round", *each) for i, each in enumerate(parties)]
    struck += [(8 + i, "shares", *each) for i, each in enumerate(parties)]
    with running(rig):
        rows = charged_kills(rig, struck, {})
    spent = [row["epsilon"] for row in read_rows(rig.run / "rounds.jsonl")]
    return {"rows": rows, "epsilon": spent, "dropped": dropped(rig)}


def charged_kills(rig: Rig, struck: list[tuple[int, str, str, str]], before: dict[str, int]) -> list[dict[str, Any]]:
    """Kills (round, phase, party, process) one after another, and compares the ledgers after each of these rounds."""
    rows, last = [], max(number for number, *_ in struck)
    for i, (number, phase, party, process) in enumerate(struck):
        rig.when("site-b", phase, number)
        time.sleep(0.1 if phase == "round" else 0.01)
        rig.send(signal.SIGKILL, party, process)
        at = time.monotonic()
        if process == "supervisor":
            rig.processes[party].wait()
            rig.start(party)
        if number == last or struck[i + 1][0] > number:
            rig.when(CO, "checkpoint", number, "end", after=at if phase != "round" else 0.0)
        rows.append({"killed": f"{party}'s {process}", "in": f"round {number}, {phase}", **ledgers(rig, before)})
    wait_for_end(rig)
    return [*rows, {"killed": "", "in": "at the end", **ledgers(rig, before)}]


# --- what came of it ---


def wait_for_end(rig: Rig) -> None:
    rig.until(lambda: True if rig.processes[CO].poll() == 0 else None, "the end of the run", 600)


def adapter(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def dropped(rig: Rig) -> dict[int, dict[str, str]]:
    rounds = read_rows(rig.run / "rounds.jsonl")
    return {
        row["round"]: {each["client"]: each["reason"] for each in row["dropped"]} for row in rounds if row["dropped"]
    }


def ledgers(rig: Rig, before: dict[str, int]) -> dict[str, Any]:
    """Compares every site's own ledger with the coordinator's copy. `before` is how long they were."""
    found: dict[str, Any] = {"entries": {}, "equal": True, "never_shorter": True}
    for name in SITES:
        (own,) = (rig.folder / name / "runs").glob(f"*/privacy/{name}.jsonl")
        mine, theirs = read_ledger(own), read_ledger(rig.run / "privacy" / own.name)
        here = [entry for entry in mine if entry.round <= max([0, *(each.round for each in theirs)])]
        found["entries"][name] = len(mine)
        found["equal"] &= here == list(theirs)
        found["never_shorter"] &= len(mine) >= before.get(name, 0)
        before[name] = len(mine)
    return found


def second(rig: Rig) -> str:
    events = [line["event"] for line in read_rows(rig.folder / "site-c" / "logs" / "node.jsonl")]
    refused, taken = events.count("the second was refused"), events.count("brought twice")
    return f"of the second ones Flower refused {refused} and took {taken}; each answer was counted once"


def last(rig: Rig) -> str:
    lines = [line for line in (rig.folder / f"{CO}.out").read_text().splitlines() if "final adapter" in line]
    return " ".join(lines) or "nothing"


def same_as_left_out(rig: Rig, out: dict[int, dict[str, str]]) -> bool:
    """Returns whether the adapter is that of the same rounds in one process, without the dropped clients."""
    loaded = load_config(rig.toml, [f"name={json.dumps('left-out')}", f"out={json.dumps(str(rig.folder))}"])
    sites = OneProcess(rig.folder / "left-out-sites", rig.rows)
    sites.absent = {(name, "round", number) for number, row in out.items() for name in row}
    return adapter(federate(loaded, open_federation=sites.open_federation).folder) == adapter(rig.run)


def _meant(rows: list[dict[str, Any]], number: int, site: str) -> bool:
    return any(row["site"] == site and number in row.get("dropped_in", ()) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["unbroken", "kills", "answers", "private", "shared"])
    parser.add_argument("--out", type=Path, help="keep everything here; default: a folder of the system's")
    asked = parser.parse_args()
    folder = asked.out or Path(tempfile.mkdtemp(prefix="fedsb-faults-"))
    mount = can_mount(folder)
    disk = "a small tmpfs, filled to the last byte" if mount else "not tried: this user may not mount a small disk"
    path = HERE / "faults.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found["full disk"] = disk
    for name in asked.only:
        print(f"{name} ...", flush=True)
        begun = time.monotonic()
        run = {"unbroken": unbroken, "private": private, "shared": shared}.get(name)
        found[name] = run(folder) if run else {"kills": kills, "answers": answers}[name](folder, mount)
        found[name]["minutes"] = round((time.monotonic() - begun) / 60, 1)
        path.write_text(json.dumps(found, indent=1).replace(f"{folder}/", "") + "\n")
    from table import write_table

    write_table(json.loads(path.read_text()), HERE / "faults.md")
    print(f"{HERE / 'faults.md'}; the runs are in {folder}")


if __name__ == "__main__":
    main()
