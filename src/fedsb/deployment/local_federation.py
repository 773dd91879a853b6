"""`fedsb run --engine flower`: a complete federation on this machine, with separate processes for every party.

The rows are partitioned as in a simulated run and written to one file per site, so the same seed gives the same
adapter. Everything is in OUT/NAME-federation: the folder coordinator/, and one folder per site with its rows.
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
from fedsb.deployment.federation import create_federation
from fedsb.deployment.join_file import PUBLIC_KEYS_SUFFIX, make_keys
from fedsb.deployment.run import serve
from fedsb.models.tokenizer import load_tokenizer
from fedsb.protocol.requirements import refuse_what_facts_forbid
from fedsb.utils.errors import UserError
from fedsb.utils.files import json_lines, write_atomic

LOCALHOST = "127.0.0.1"
STOP_SECONDS = 60.0


def run_local_federation(loaded: ResolvedConfig) -> Path:
    """Creates a federation on this machine, runs it to the end, and returns the run directory.

    Raises UserError if a local federation of this name exists, and the errors of `serve`.
    """
    config = loaded.config
    folder = Path(config.out) / f"{config.name}-federation"
    served = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "flower"})})
    refuse_what_facts_forbid(served, config.method)
    if folder.exists():
        raise UserError(f"{folder} already exists. Delete it, or give the run a different name (--set name=other).")
    rows, test = rows_by_client(config, load_tokenizer(config.model))
    port = _free_port()
    keys = {name: folder / "sites" / f"{name}{PUBLIC_KEYS_SUFFIX}" for name in sorted(rows)}
    for name, path in keys.items():
        make_keys(path, folder / "sites" / name)
    joins = create_federation(folder / "coordinator", list(map(str, keys.values())), [LOCALHOST], port)
    if test and config.data.test is None and config.server.load_base_model:  # built-in test rows
        write_atomic(folder / "test.jsonl", json_lines(test))
        data = {**loaded.given.get("data", {}), "test": str(folder / "test.jsonl")}
        loaded = replace(loaded, given={**loaded.given, "data": data})
    with _sites(folder, joins, rows):
        serve(folder / "coordinator", PROGRAM, lambda: prepare(folder / "coordinator", loaded), listen=LOCALHOST)
    return run_folder(folder / "coordinator", loaded)


@contextmanager
def _sites(folder: Path, joins: list[Path], rows: Mapping[str, list[Row]]) -> Iterator[None]:
    """Starts `fedsb site join` for every site, each in its own folder. Their output goes to sites/NAME.log."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for join in joins:
            here = folder / "sites" / join.stem
            write_atomic(here / "rows.jsonl", json_lines(rows[join.stem]))
            command = [sys.executable, "-m", "fedsb", "site", "join", str(join.resolve()), "--data", "rows.jsonl"]
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
