"""The run directory: manifest, ledgers, atomic checkpoints, and how a run resumes.

    manifest.json  rounds.jsonl  traffic.jsonl  shared.safetensors  checkpoints/round-0007/  clients/<name>/  adapter/

A checkpoint is a folder written under a temporary name, flushed to disk, and renamed, so that it is never partial. The
rename completes a round. If a run was interrupted, the ledgers' rows and the clients' states of a later round are
dropped when it resumes. Everything is safetensors or JSON; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedsb.adapters.basis import basis_hash
from fedsb.methods.base import State
from fedsb.protocol.tensors import storable, under, within
from fedsb.protocol.traffic import TrafficRecord
from fedsb.reporting.run_directory import read_manifest, read_rows, refuse_existing
from fedsb.server.server import RoundResult
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import disk_errors, flush, json_lines, keyed_fingerprint, lock, safe_name, write, write_atomic
from fedsb.utils.tensors import Tensors

PREFIX = "round-"


class Record:
    """A run directory, which only this process can use while it is open."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = dict(manifest)
        self.skipped: list[str] = []  # torn or foreign checkpoints, with the reason
        self._shared: Tensors = {}  # as in shared.safetensors: a checkpoint holds what has changed in it since
        self._stateful: set[str] = set()  # clients with a state of their own after the last round that used them
        self._lock: IO[str] | None = None
        self._new = False

    @property
    def run(self) -> str:
        """The run's id, which its messages and checkpoints contain."""
        return str(self.manifest["run"])

    @classmethod
    def create(cls, folder: Path, manifest: Mapping[str, Any]) -> Record:
        """Creates the directory. Raises UserError if it cannot be created, or already contains a run."""
        with disk_errors(folder):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
                raise UserError(
                    f"cannot make the run's folder {folder} ({error.strerror}). Choose another place: --set out=FOLDER"
                ) from error
            record = cls(folder, manifest)
            record._hold()
            try:
                refuse_existing(folder)
                record._new = True
                record.save_manifest({})
            except BaseException:
                record._release()
                raise
        return record

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Opens an existing directory. Raises UserError if it does not exist, or another process uses it."""
        record = cls(folder, read_manifest(folder))
        record._hold()
        return record

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._new and kind is not None and issubclass(kind, UserError) and not self._checkpoints():
                self._undo()
        finally:
            self._release()

    # --- the life of a run ---

    def start(self, state: State, sent: Sequence[TrafficRecord]) -> None:
        """Writes the state before the first round."""
        write_atomic(self.folder / "traffic.jsonl", json_lines([asdict(each) for each in sent]))
        write_atomic(self.folder / "shared.safetensors", save(storable(state.shared)))
        self._shared = state.shared
        self.checkpoint(state, keep=1)

    def commit(
        self, result: RoundResult, row: Mapping[str, Any], client_states: Mapping[str, Tensors], *, keep: int
    ) -> None:
        """Completes a round. The checkpoint is written last, and the round counts only if it exists.

        `client_states` are the own states of clients after the round. Those whose update was not used keep what they
        had before. Raises RunError if the directory was deleted, because writing would recreate a part of it.
        """
        state = result.state
        if not (self.folder / "manifest.json").exists():
            raise RunError(
                f"{self.folder} was deleted or moved during the run. If it was moved, put it back and resume it"
            )
        used = {name for name, round in state.accepted.items() if round == state.round}
        self._stateful = (self._stateful - used) | (used & client_states.keys())
        for name, tensors in client_states.items():
            if name in used:
                path = self.folder / "clients" / safe_name(name) / f"{PREFIX}{state.round:04d}.safetensors"
                write_atomic(path, save(storable(tensors), metadata={"client": name}))
        self.append("traffic.jsonl", [asdict(each) for each in result.traffic])
        self.append("rounds.jsonl", [row])
        self.checkpoint(state, keep)

    def keyed(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the facts of private tables with their fingerprints under a key of this run.

        With a plain hash, anyone who knows all rows but one could test candidates for it. The key is in the run
        directory, and in nothing that is published. Raises UserError if it is missing.
        """
        path = self.folder / "privacy" / "tables.key"
        if not path.exists():
            if "data" in self.manifest:
                raise UserError(
                    f"{path} does not exist, so it is not known whether the data have changed. Restore the file, or "
                    "start a new run"
                )
            write_atomic(path, os.urandom(32), private=True)
        key = path.read_bytes()
        return {
            name: {**facts, "fingerprint": keyed_fingerprint(key, facts["fingerprint"])}
            for name, facts in tables.items()
        }

    def check_same(self, tables: Mapping[str, Any], model: str) -> None:
        """Raises UserError if a run would resume with different data or a different base model."""
        if self.manifest.get("model", {}).get("fingerprint", model) != model:
            raise UserError(
                f"the base model of {self.folder} has changed since the run was started (its weights' fingerprint is "
                f"{model}, it was {self.manifest['model']['fingerprint']}); put it back, or start a new run"
            )
        for name, table in self.manifest.get("data", {}).items():
            if table["fingerprint"] != tables.get(name, {}).get("fingerprint"):
                raise UserError(
                    f"the {name} data of {self.folder} have changed since the run was started (they were "
                    f"{table['rows']} rows of {table['origin']}); put them back, or start a new run"
                )

    # --- writing ---

    def save_manifest(self, more: Mapping[str, Any]) -> None:
        self.manifest |= more
        write_atomic(self.folder / "manifest.json", json.dumps(self.manifest, indent=1, default=str).encode())

    def append(self, ledger: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to rounds.jsonl or traffic.jsonl, on disk when this returns."""
        with disk_errors(self.folder), (self.folder / ledger).open("ab") as file:
            file.write(json_lines(rows))
            file.flush()
            os.fsync(file.fileno())

    def checkpoint(self, state: State, keep: int) -> None:
        """Completes a round, after which the run can resume. Keeps the newest `keep` checkpoints."""
        parts = {name: getattr(state, name) for name in ("tensors", "server", "shared_delta", "client_view", "average")}
        parts["shared"] = {key: x for key, x in state.shared.items() if not _same(x, self._shared.get(key))}
        content = save(storable({key: x for name, part in parts.items() for key, x in under(name, part).items()}))
        facts = {"run": self.run, "round": state.round, "sha256": hashlib.sha256(content).hexdigest()}
        facts |= {
            "ranks": dict(state.total_ranks),
            "accepted": dict(state.accepted),
            "stateful": sorted(self._stateful),
        }
        final = self.folder / "checkpoints" / f"{PREFIX}{state.round:04d}"
        temporary = final.with_name(f".{final.name}.{os.getpid()}")
        with disk_errors(self.folder):
            try:
                temporary.mkdir(parents=True)
                write(temporary / "state.safetensors", content)
                write(temporary / "state.json", json.dumps(facts).encode())
                flush(temporary)
                shutil.rmtree(final, ignore_errors=True)  # one that was skipped
                temporary.rename(final)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            flush(final.parent)
            for old in [path for path in self._checkpoints() if _round_of(path) <= state.round][keep:]:
                shutil.rmtree(old)
            self._thin_clients(state.round, keep)

    # --- reading ---

    def latest(self) -> State | None:
        """Returns the state after the last completed round, or None if there is none.

        Damaged or foreign checkpoints are skipped and named in `skipped`. Raises RunError if checkpoints exist but
        none can be used.
        """
        found = self._checkpoints()
        for folder in found:
            try:
                facts = json.loads((folder / "state.json").read_text())
                content = (folder / "state.safetensors").read_bytes()
                if facts["run"] != self.run:
                    raise ValueError(f"it is of the run {facts['run']!r}, this is {self.run!r}")
                if facts["round"] != _round_of(folder):
                    raise ValueError(f"it was written as that of round {facts['round']}")
                if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                    raise ValueError("its sha256 differs from the one it was written with")
                tensors = load(content)
                start_shared = load((self.folder / "shared.safetensors").read_bytes())
                ranks, accepted = (
                    {str(client): int(number) for client, number in facts[name].items()}
                    for name in ("ranks", "accepted")
                )
                if basis_hash(start_shared) != self.manifest["basis_hash"]:
                    raise ValueError("shared.safetensors, the basis, is not the one that the run was started with")
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                self.skipped.append(f"checkpoint {folder.name} was skipped: {error}")
                continue
            self._shared, self._stateful = start_shared, set(facts["stateful"])
            return State(
                round=facts["round"],
                tensors=within("tensors", tensors),
                server=within("server", tensors),
                shared={**start_shared, **within("shared", tensors)},
                shared_delta=within("shared_delta", tensors),
                client_view=within("client_view", tensors),
                average=within("average", tensors),
                total_ranks=ranks,
                accepted=accepted,
            )
        if found:
            raise RunError(f"no checkpoint in {self.folder} can be used:\n  " + "\n  ".join(self.skipped))
        return None

    def client_states(self, state: State | None) -> dict[str, dict[int, Tensors]]:
        """Returns the clients' own states that a run resumed from `state` needs, by client and round."""
        found: dict[str, dict[int, Tensors]] = {}
        for name, round in (state.accepted if state is not None else {}).items():
            path = self.folder / "clients" / safe_name(name) / f"{PREFIX}{round:04d}.safetensors"
            try:
                found[name] = {round: load(path.read_bytes()) if name in self._stateful else {}}
            except (OSError, SafetensorError) as error:
                raise RunError(
                    f"{path}, what a client keeps between rounds, cannot be read: {error}. Put the file back, or "
                    "start a new run"
                ) from error
        return found

    def rows(self, ledger: str) -> list[dict[str, Any]]:
        """Returns the rows of rounds.jsonl or traffic.jsonl, without an incomplete last line."""
        return read_rows(self.folder / ledger)

    def roll_back(self, round: int) -> None:
        """Drops everything that an interrupted run wrote after `round` rounds."""
        for ledger in ("rounds.jsonl", "traffic.jsonl"):
            rows = [row for row in self.rows(ledger) if row["round"] <= round]
            write_atomic(self.folder / ledger, json_lines(rows))
        for path in (self.folder / "clients").glob(f"*/{PREFIX}*.safetensors"):
            if _round_of(path) > round:
                path.unlink()
        for path in sorted(self.folder.rglob(".*")):  # temporary names of writes that were cut off
            if path.suffix.removeprefix(".").isdigit():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- the inside ---

    def _checkpoints(self) -> list[Path]:
        """Returns the checkpoints, newest first."""
        found = [path for path in (self.folder / "checkpoints").glob(f"{PREFIX}*") if _is_round(path)]
        return sorted(found, key=_round_of, reverse=True)

    def _thin_clients(self, round: int, keep: int) -> None:
        """Deletes the clients' states that no kept checkpoint needs."""
        oldest = round - keep + 1
        for folder in (self.folder / "clients").glob("*"):
            states = sorted(folder.glob(f"{PREFIX}*.safetensors"), key=_round_of)
            needed = [path for path in states if _round_of(path) <= oldest][-1:]
            for path in states:
                if _round_of(path) <= oldest and path not in needed:
                    path.unlink()

    def _hold(self) -> None:
        """Locks the directory. The system releases the lock when the process ends, so it cannot be stale."""
        with disk_errors(self.folder):
            self._lock = (self.folder / "lock").open("a+")
            try:
                lock(
                    self._lock, f"{self.folder} is in use by another fedsb process. Wait for that process, or stop it."
                )
            except BaseException:
                self._release()
                raise

    def _release(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _undo(self) -> None:
        """Removes a run whose start failed because of the user's input, so that its name can be used again."""
        for name in ("manifest.json", "traffic.jsonl", "shared.safetensors", "lock", "privacy/tables.key"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # ledgers with a line stay
            (self.folder / "privacy").rmdir()
        with suppress(OSError):  # what else is in there is the user's
            self.folder.rmdir()


def _round_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX).split(".")[0])


def _is_round(path: Path) -> bool:
    return path.name.removeprefix(PREFIX).isdecimal()


def _same(x: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(x, other)
