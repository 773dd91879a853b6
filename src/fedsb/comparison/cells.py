"""One cell of a comparison: a `fedsb run` in its own process, and the file that stores its outcome.

A cell is identified by a hash of its resolved settings, with data files by their content and models by name and size,
independent of folders. So a changed recipe makes new cells, and a comparison that was interrupted finds its own. A
setting that did not exist when a cell was stored counts as its default.

    cells.json    {"cells": {"<key>": {"name": "fed-sb@8 seed 0", "score": 0.93, ...}, ...}}, one line per cell
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedsb.comparison.contenders import dotted
from fedsb.config.load import load_config
from fedsb.config.nested import set_key
from fedsb.models.load import choose_device
from fedsb.reporting.report import summary
from fedsb.reporting.run_directory import read_manifest, read_result, read_rows
from fedsb.utils.errors import ConfigError, RunError, UserError
from fedsb.utils.files import disk_errors, lock, safe_name, write_atomic

PATHS = ("data.train", "data.test", "basis.data", "model.name")  # settings that may name a file or a folder
DIVERGED = re.compile(r"became (nan|-?inf)\b|NaN or infinite")  # in the error of a client or the server

Outcome = dict[str, Any]


class CellError(RunError):
    """A run that failed, with its error message."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run to make: its display name, and all settings by dotted key except `name` and `out`."""

    name: str
    settings: Mapping[str, Any]

    @property
    def portable(self) -> dict[str, Any]:
        """Returns the settings with names instead of paths, as they are stored."""
        return portable(self.settings)

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """Returns the fingerprint of the content at each of those paths."""
        return {key: fingerprint(value) for key, value in self.settings.items() if _on_disk(key, value)}

    @functools.cached_property
    def key(self) -> str:
        """Returns the hash that identifies this cell."""
        return key_of(self.portable, self.content)


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted key, with the names of files and folders instead of their paths."""
    return {key: Path(value).name if _on_disk(key, value) else value for key, value in settings.items()}


def key_of(settings: Mapping[str, Any], content: Mapping[str, str]) -> str:
    """Returns the hash that identifies a cell."""
    return hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode()).hexdigest()[:16]


def make_cell(name: str, settings: Mapping[str, Any]) -> Cell:
    """Returns the cell of a configuration, given as nested settings."""
    return Cell(name=name, settings={k: v for k, v in dotted(settings).items() if k not in ("name", "out")})


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


async def run_cell(cell: Cell, ledgers: Path, slot: int = 0) -> Outcome:
    """Runs a cell and returns the outcome to store. A loss that is not finite gives a score of None.

    `slot` numbers the worker: if the device is "cuda", each worker has its own GPU as long as there are enough.

    The ledgers of a private run stay in `ledgers`, even if the run fails. Raises CellError if the run fails for a
    different reason. If cancelled, ends the run's process first.
    """
    started = time.monotonic()
    with _draft(cell, ledgers) as folder:
        toml = folder / "cell.toml"
        toml.write_text(to_toml({**cell.settings, "name": "cell", "out": str(folder)}), "utf-8")
        device = choose_device(str(cell.settings["model.device"]))[0]
        environment = {"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {}  # cells run in parallel, one per core
        if device == torch.device("cuda") and (gpus := visible_gpus()):
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        code, errors = await call_process(
            sys.executable, "-m", "fedsb", "run", str(toml), "--json", environment=environment
        )
        if code and not (code == 2 and DIVERGED.search(errors)):
            raise CellError(_reason(code, errors))
        facts: Outcome = {"score": None, "diverged": _reason(code, errors)} if code else read_run(folder / "cell")
    seconds = round(time.monotonic() - started, 1)
    return {"name": cell.name, **facts, "seconds": seconds, "settings": cell.portable, "content": cell.content}


@contextmanager
def _draft(cell: Cell, ledgers: Path) -> Iterator[Path]:
    """Makes a folder for a run. At the end, deletes everything but the ledgers of a private run."""
    if cell.settings.get("privacy.unit", "none") == "none":
        with TemporaryDirectory(prefix="fedsb-cell-") as draft:
            yield Path(draft)
        return
    folder = ledgers / f"{safe_name(cell.name)}-{uuid.uuid4().hex[:6]}"  # not its key, a hash of the private rows
    with disk_errors(ledgers):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        kept = set((folder / "cell" / "privacy").glob("*.jsonl"))
        for path in sorted(folder.rglob("*"), reverse=True):  # the content of a folder before the folder
            if path.is_dir():
                with suppress(OSError):  # not empty: it contains ledgers
                    path.rmdir()
            elif path not in kept:
                path.unlink()
        with suppress(OSError):
            folder.rmdir()


def read_run(folder: Path) -> Outcome:
    """Returns the outcome of a finished run. Bytes by round are those of all clients in both directions."""
    found, manifest, rounds = summary(folder), read_manifest(folder), read_rows(folder / "rounds.jsonl")
    result = read_result(folder) or {}
    diverged = any(row["loss"] is not None and not math.isfinite(row["loss"]) for row in rounds)
    return {
        "score": None if diverged else found["score"],
        "extra_metrics": found["extra_metrics"],
        "scores_by_round": [row["score"] for row in rounds],
        "losses_by_round": [row["loss"] if row["loss"] and math.isfinite(row["loss"]) else None for row in rounds],
        "bytes_by_round": [row["up_bytes"] + row["down_bytes"] for row in rounds],
        "test_rows": _test_rows(manifest),
        "metric": found["metric"],
        "before": found["before"],
        "majority": found["majority"],
        "bytes": found["bytes"],
        "captured_share": (manifest["basis"] or {}).get("captured_share"),
        "clients": result["clients"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "fedsb": manifest["fedsb"],
        "git": manifest["git"],
    }


def _test_rows(manifest: Mapping[str, Any]) -> int | None:
    """Returns the number of rows a run was scored on: test rows, else held-out rows; None if not known."""
    if (test := manifest["data"].get("test")) is not None:
        return int(test["rows"])
    return sum(client["held_out_rows"] for client in manifest["clients"] if not client["unseen"]) or None


class Results:
    """The outcomes in cells.json. The folder is locked while it is open."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cells.json"
        self.cells: dict[str, Outcome] = _read(self.path)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Results]:
        """Locks and reads a folder. Raises UserError if it is in use or cells.json cannot be read."""
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)  # locked itself; the system unlocks it when this process ends
        try:
            lock(handle, f"{folder} is in use by a different fedsb process. Wait for it, or stop it.")
            yield cls(folder)
        finally:
            os.close(handle)

    def get(self, cell: Cell) -> Outcome | None:
        """Returns the stored outcome of a cell; None if there is none."""
        return self.cells.get(cell.key)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Stores an outcome. It is on disk when this returns."""
        self.cells[cell.key] = outcome
        lines = [f"{json.dumps(key)}: {json.dumps(self.cells[key])}" for key in sorted(self.cells, key=self._place)]
        write_atomic(self.path, ('{"cells": {\n' + ",\n".join(lines) + "\n}}\n").encode())

    def stale(self, cell: Cell) -> Outcome | None:
        """Returns a stored cell with the same name but different settings, which is not used; None if there is none."""
        same = (known for key, known in self.cells.items() if known["name"] == cell.name and key != cell.key)
        return next(same, None)

    def _place(self, key: str) -> tuple[str, str]:
        return str(self.cells[key]["name"]), key


def to_toml(settings: Mapping[str, Any]) -> str:
    """Returns settings as TOML, one line per dotted key. Leaves out None, which is the default where it is allowed."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{json.dumps(key)} = {text(each)}" for key, each in value.items()) + "}"
        return f"[{', '.join(map(text, value))}]" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)

    return "".join(f"{key} = {text(value)}\n" for key, value in settings.items() if value is not None)


def fingerprint(path: str) -> str:
    """Returns the hash of a file's content, or of the names and sizes of a folder's files."""
    place = Path(path).expanduser()
    return _fingerprint(place, place.stat().st_mtime_ns)


@functools.cache
def _fingerprint(place: Path, changed: int) -> str:
    if place.is_dir():
        listed = sorted((str(file.relative_to(place)), file.stat().st_size) for file in place.rglob("*"))
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_disk(key: str, value: object) -> bool:
    return key in PATHS and isinstance(value, str) and Path(value).expanduser().exists()


def _read(path: Path) -> dict[str, Outcome]:
    try:
        cells = list(json.loads(path.read_text("utf-8"))["cells"].values())
        return {key_of(current_settings(cell["settings"]), cell["content"]): cell for cell in cells}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a valid cells.json ({error}). Restore it, or move it.") from error


def current_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns stored settings under their current names, with the default of new ones.

    They stay unchanged if one of them does not exist any more.
    """
    raw: dict[str, Any] = {}
    for key, value in settings.items():
        raw = set_key(raw, key, value)
    try:
        return make_cell("stored", load_config(raw).config.model_dump(mode="json")).settings
    except ConfigError:
        return settings


async def call_process(*command: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Returns the exit code and stderr of a process in its own session, so that Ctrl-C does not reach it directly."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:  # cancelled
            process.kill()
            await process.wait()
    return process.returncode or 0, errors.decode(errors="replace")


def _reason(code: int, errors: str) -> str:
    """Returns the error message of a failed run, without the advice to resume it, since its folder is deleted."""
    text = errors.rpartition("fedsb: ")[2].strip() or f"exit code {code} without an error message"
    for advice in ("\n  Completed rounds are in", "\n  No run exists in", "\n  The folder "):  # cli/common.py
        text = text.partition(advice)[0]
    return text[-2000:] if code > 0 else f"stopped by signal {-code}, perhaps because the machine is out of memory"
