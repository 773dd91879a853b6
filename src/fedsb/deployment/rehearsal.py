"""`fedsb run --engine flower`: a whole federation on this machine, every party a process of its own, as it would be.

The clients' rows are split as the embedded engine splits them and written to a file a site, so that the same seed gives
the same adapter. Everything is below OUT/NAME-federation: coordinator/, and a folder with its rows for each site.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedsb.config.load import ResolvedConfig
from fedsb.data.clients import rows_by_client
from fedsb.data.rows import Row
from fedsb.deployment.coordinate import PROGRAM, prepare, run_folder
from fedsb.deployment.federation import serve_init
from fedsb.deployment.join_file import CARD, make_keys
from fedsb.deployment.run import serve
from fedsb.models.tokenizer import load_tokenizer
from fedsb.utils.errors import UserError
from fedsb.utils.files import json_lines, write_atomic

LOCALHOST = "127.0.0.1"
STOP_SECONDS = 60.0


def rehearse(loaded: ResolvedConfig) -> Path:
    """Carries out a run from making the federation to the adapter; gives back the run's folder.

    Raises UserError where there is one of that name already, and as `serve`.
    """
    config = loaded.config
    folder = Path(config.out) / f"{config.name}-federation"
    if folder.exists():
        raise UserError(f"{folder} is there already: delete it, or give another name (--set name=other)")
    rows, test = rows_by_client(config, load_tokenizer(config.model))
    port = _free_port()
    cards = {name: folder / "sites" / f"{name}{CARD}" for name in sorted(rows)}
    for name, card in cards.items():
        make_keys(card, folder / "sites" / name)
    joins = serve_init(folder / "coordinator", [str(card) for card in cards.values()], [LOCALHOST], port)
    if test and config.data.test is None:  # of built-in rows
        write_atomic(folder / "test.jsonl", json_lines(test))
        data = {**loaded.given.get("data", {}), "test": str(folder / "test.jsonl")}
        loaded = replace(loaded, given={**loaded.given, "data": data})
    with _sites(folder, joins, rows):
        serve(folder / "coordinator", PROGRAM, lambda: prepare(folder / "coordinator", loaded), listen=LOCALHOST)
    return run_folder(folder / "coordinator", loaded)


@contextmanager
def _sites(folder: Path, joins: list[Path], rows: Mapping[str, list[Row]]) -> Iterator[None]:
    """Every site joined, each in a folder of its own by the command that it would type; it speaks to sites/NAME.log."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for join in joins:
            here = folder / "sites" / join.stem
            write_atomic(here / "rows.jsonl", json_lines(rows[join.stem]))
            command = [sys.executable, "-m", "fedsb", "join", str(join.resolve()), "--data", "rows.jsonl"]
            with here.with_suffix(".log").open("ab") as log:
                started.append(
                    subprocess.Popen(
                        [*command, "--folder", "."], cwd=here, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
        yield
    finally:
        for site in started:
            site.terminate()
        for site in started:
            site.wait(STOP_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])
