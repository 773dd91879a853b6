"""A federation whose parties are in separate network namespaces and run the commands that their users type.

Below a folder: coordinator/ with the federation, and a folder for each site with its join file and its rows, split as
one process splits them. During the run it records who is connected to whom, and disconnects parties.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from namespaces import Network
from rig import CO, said

from fedsb.config.load import load_config
from fedsb.data.clients import rows_by_client
from fedsb.models.tokenizer import load_tokenizer
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.find import recipe_path
from fedsb.utils.files import json_lines, write_atomic

RECIPE, LOOK_SECONDS, STOP_SECONDS = "quickstart", 0.2, 60.0


@dataclass(frozen=True)
class Cut:
    """The party's cable is out for so long, from shortly after the end of the round before."""

    party: str
    round: int
    seconds: float


class Apart:
    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self._overrides = folder, list(overrides)
        config = load_config(recipe_path(RECIPE), overrides).config
        self.rows, test = rows_by_client(config, load_tokenizer(config.model))
        self.run = folder / CO / "federation" / "runs" / config.name
        if test and config.data.test is None:  # of the built-in rows
            write_atomic(folder / CO / "test.jsonl", json_lines(test))
            self._overrides.append(f'data.test="{folder / CO / "test.jsonl"}"')
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pairs: dict[str, set[str]] = {}

    def carry_out(self, cuts: Sequence[Cut] = (), *, scan: bool = False) -> dict[str, Any]:
        """Runs a federation from its creation to the adapter. Returns what was seen on the network."""
        with Network([CO, *self.rows]) as net, self._parties(net):
            begun, todo, seen = datetime.now(UTC), list(cuts), dict[str, Any]()
            seen["addresses"], seen["routes"] = net.address, {name: net.routes(name) for name in net.address}
            while (code := self._processes[CO].poll()) is None:
                self._look(net)
                if scan and self._pairs.get(CO):
                    one, other = list(self.rows)[:2]
                    seen["listening"] = {name: net.listening(name) for name in net.address}
                    seen[f"{one} reaches"] = net.reaches(one, CO, other, "127.0.0.1")
                    scan = False
                if todo and self._rounds_done() >= todo[0].round - 1:
                    seen.setdefault("cuts", []).append(self._cut(net, todo.pop(0)))
                time.sleep(LOOK_SECONDS)
            if code or todo:
                raise RuntimeError(f"the coordinator ended with {code}, {todo} not done: see {self.folder / CO}.log")
            seen["bytes at the cards"] = {name: net.card_bytes(name) for name in net.address}
        seen["connections"] = {name: sorted(pairs) for name, pairs in self._pairs.items()}
        seen["said"] = said({CO: self.folder / CO / "federation", **{n: self.folder / n for n in self.rows}}, begun)
        seen["dropped"] = [row["dropped"] for row in read_rows(self.run / "rounds.jsonl") if row["dropped"]]
        return seen

    # --- the parties ---

    @contextlib.contextmanager
    def _parties(self, net: Network) -> Iterator[None]:
        sites = [word for name in self.rows for word in ("--site", name)]
        self._start(net, CO, "federation", "create", "federation", *sites, "--host", net.address[CO])
        if code := self._processes[CO].wait():
            raise RuntimeError(f"federation create ended with {code}: see {self.folder / CO}.log")
        try:
            for name, rows in self.rows.items():
                write_atomic(self.folder / name / "rows.jsonl", json_lines(rows))
                shutil.move(self.folder / CO / "federation" / "joins" / f"{name}.join", self.folder / name)
                self._start(net, name, "site", "join", f"{name}.join", "--data", "rows.jsonl", "--folder", ".")
            given = [word for text in self._overrides for word in ("--set", text)]
            self._start(net, CO, "federation", "serve", "federation", RECIPE, *given)
            yield
        finally:
            for process in self._processes.values():
                process.terminate()
            for process in self._processes.values():
                process.wait(STOP_SECONDS)

    def _start(self, net: Network, party: str, *words: str) -> None:
        here = self.folder / party
        here.mkdir(parents=True, exist_ok=True)
        with here.with_name(f"{party}.log").open("ab") as log:
            self._processes[party] = subprocess.Popen(
                net.inside(party, sys.executable, "-m", "fedsb", *words),
                cwd=here,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # sums of floats depend on how many threads share them
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    # --- the network ---

    def _rounds_done(self) -> int:
        return len(read_rows(self.run / "rounds.jsonl"))

    def _look(self, net: Network) -> None:
        """Returns who is connected: from where, to where, without the random ports of callers."""
        door = f"{net.address[CO]}:9443"
        for party in net.address:
            for here, there in net.connections(party):
                ends = [end if end == door else end.rpartition(":")[0] for end in (here, there)]
                self._pairs.setdefault(party, set()).add(" - ".join(ends))

    def _cut(self, net: Network, cut: Cut) -> dict[str, Any]:
        before = self._rounds_done()
        net.cut(cut.party)
        time.sleep(cut.seconds)
        after = self._rounds_done()
        net.mend(cut.party)
        return {"party": cut.party, "seconds": cut.seconds, "in_round": before + 1, "held_the_round": after == before}
