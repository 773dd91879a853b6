"""A client's store of a run between rounds: on the disk of a site, or in the memory of one process.

A site may be killed at any point and continues from the last round. Its files:

run.json                            the requests that opened the run
start.safetensors                   the shared state at the start, or since the last new basis
refresh.safetensors                 the tensors at which gradients for a new basis are computed
rounds/round-0003.safetensors       after the third round: its own state, what changed in the shared state, the last
                                    broadcast, and the answer that it sent
answered.json                       for each round, the hash of the broadcast that it trained on
basis_gradient-0000.safetensors     what it sent for a `core` basis, before the first round
encoded.safetensors                 its change in the ring with its share of the noise, where clients are the unit
sums/round-0003.json                the clients in the secure aggregation of this round
privacy/<name>.jsonl                its ledger
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from fedsb.client.round import ClientRound, ClientView
from fedsb.protocol.tensors import storable, under, within
from fedsb.secagg.fixed_point import Floats, Ring, Whole
from fedsb.utils.errors import RunError
from fedsb.utils.files import write_atomic
from fedsb.utils.tensors import Tensors

KEEP = 2  # rounds: the coordinator may fall back to the one before


@dataclass(frozen=True, kw_only=True)
class StoredRound:
    """A client's upload of a round, or its input to secure aggregation. `payload` is empty with shared noise."""

    payload: bytes
    loss: float
    score: float | None = None
    change: Floats | Whole | None = None  # Whole: a share of a step, with its noise


class ClientStore:
    """The store of a client in this process. What must survive the process is in the run directory.

    Args:
        states: the client's own state by round, as a run directory has it.
    """

    keeps_answers = False  # whether a repeated request gets the stored answer

    def __init__(self, states: Mapping[int, Tensors] | None = None) -> None:
        self.states: dict[int, Tensors] = {0: {}, **(states or {})}
        self._start_round, self._views = 0, dict[int, ClientView]()
        self._refresh: Tensors = {}
        self._encoded: tuple[str, Ring] | None = None

    # --- the shared state ---

    @property
    def start_round(self) -> int:
        """The rounds that were finished when the shared state started: 0, or those before the last new basis."""
        return self._start_round

    def view(self, round: int) -> ClientView | None:
        """Returns the client's view after `round` rounds, or None if it is no longer stored."""
        return self._views.get(round)

    def save_start(self, view: ClientView, round: int) -> None:
        self._start_round, self._views = round, {round: view}

    def refresh_start(self) -> Tensors:
        """Returns the tensors at which gradients for a new basis are computed."""
        return self._refresh

    def save_refresh_start(self, tensors: Tensors) -> None:
        self._refresh = tensors

    def basis_gradient(self, round: int) -> tuple[bytes, float] | None:
        """Returns (the payload, the rows) that were sent for the basis of this round."""
        return None

    def save_basis_gradient(self, round: int, payload: bytes, rows: float) -> None:
        pass

    # --- rounds ---

    def client_state(self, round: int) -> Tensors:
        """Returns the client's own state after `round` rounds."""
        return self.states[round]

    def save_round(self, shared: ClientRound, state: Tensors, done: StoredRound, state_round: int) -> None:
        """Stores a round; the state after `state_round` is kept too, in case this round's update is not used."""
        after = shared.round + 1
        self.states = {0: {}, state_round: self.states[state_round], after: state}
        self._views = {self._start_round: self._views[self._start_round], after: shared.view}

    def answered(self, round: int) -> str | None:
        """Returns the hash of the broadcast that was trained on in this round, counted from 0; None for none."""
        return None

    def save_answered(self, round: int, received: str) -> None:
        """Records a broadcast before training, so that a round is never done for a second broadcast."""

    def stored_round(self, round: int) -> StoredRound | None:
        """Returns what was sent in the last of `round` rounds; None if it is not stored any more."""
        return None

    # --- secure sums ---

    def encoded(self, key: str) -> Ring | None:
        return self._encoded[1] if self._encoded is not None and self._encoded[0] == key else None

    def save_encoded(self, key: str, vector: Ring) -> None:
        """Saves what was encoded, with its noise, for the sum of this key."""
        self._encoded = key, vector

    def sum_survivors(self, round: int) -> list[str] | None:
        """Returns the clients in the secure aggregation of this round, or None if there was none."""
        return None

    def save_sum_survivors(self, round: int, survivors: Sequence[str]) -> None:
        pass


class DiskStore(ClientStore):
    """The store of a site, in the run's folder."""

    keeps_answers = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._start: tuple[int, ClientView] | None = None
        self._newest: tuple[int, ClientView] | None = None  # in memory, as after its round

    # --- the requests that opened the run ---

    def save_facts(self, facts: Mapping[str, Any]) -> None:
        write_atomic(self.folder / "run.json", json.dumps(facts, indent=1).encode())

    def facts(self) -> dict[str, Any] | None:
        path = self.folder / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    # --- the shared state ---

    @property
    def start_round(self) -> int:
        start = self._read_start()
        return 0 if start is None else start[0]

    def view(self, round: int) -> ClientView | None:
        start = self._read_start()
        if start is None or round < start[0]:
            return None
        if round == start[0]:
            return start[1]
        if self._newest is None or self._newest[0] != round:
            if (parts := self._round(round)) is None:
                return None
            shared = {**start[1].shared, **within("shared", parts)}
            view = ClientView(shared, within("message", parts), round - 1)
            self._newest = round, replace(view, known_hash=start[1].updated(shared).known_hash)
        return self._newest[1]

    def save_start(self, view: ClientView, round: int) -> None:
        parts = under("shared", view.shared) | under("tensors", view.tensors)
        facts = {"round": str(round), "hash": view.hash}
        write_atomic(self.folder / "start.safetensors", save(storable(parts), facts))
        self._start, self._newest = (round, view), None

    def refresh_start(self) -> Tensors:
        path = self.folder / "refresh.safetensors"
        return load(path.read_bytes()) if path.is_file() else {}

    def save_refresh_start(self, tensors: Tensors) -> None:
        write_atomic(self.folder / "refresh.safetensors", save(storable(tensors)))

    # --- rounds ---

    def client_state(self, round: int) -> Tensors:
        """Raises RunError if it is no longer stored."""
        if round == 0:
            return {}
        if (parts := self._round(round)) is None:
            raise RunError(f"This site no longer has its own state after round {round}. Start a new run.")
        return within("state", parts)

    def save_round(self, shared: ClientRound, state: Tensors, done: StoredRound, state_round: int) -> None:
        start, after = self._read_start(), shared.round + 1
        assert start is not None
        changed = {key: x for key, x in shared.view.shared.items() if x is not start[1].shared.get(key)}
        parts = under("state", state) | under("shared", changed) | under("message", shared.view.tensors)
        parts["payload"] = _bytes(done.payload)
        if done.change is not None:
            parts["change"] = torch.from_numpy(done.change)
        facts = {"loss": repr(done.loss), "score": repr(done.score)}
        write_atomic(self._path(after), save(storable(parts), facts))
        self._newest = after, shared.view
        for path in (self.folder / "rounds").glob("round-*.safetensors"):
            if _round_of(path) <= after - KEEP and _round_of(path) != state_round:
                path.unlink()

    def answered(self, round: int) -> str | None:
        return self._answered().get(str(round))

    def save_answered(self, round: int, received: str) -> None:
        write_atomic(self.folder / "answered.json", json.dumps({**self._answered(), str(round): received}).encode())

    def stored_round(self, round: int) -> StoredRound | None:
        path = self._path(round)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            change = file.get_tensor("change").numpy() if "change" in file.keys() else None  # noqa: SIM118
            payload, facts = file.get_tensor("payload").numpy().tobytes(), file.metadata()
        score = None if facts["score"] == "None" else float(facts["score"])
        return StoredRound(payload=payload, loss=float(facts["loss"]), score=score, change=change)

    # --- a basis ---

    def basis_gradient(self, round: int) -> tuple[bytes, float] | None:
        found = self._read(f"basis_gradient-{round:04d}")
        return None if found is None else (found[0]["payload"].numpy().tobytes(), float(found[1]["rows"]))

    def save_basis_gradient(self, round: int, payload: bytes, rows: float) -> None:
        self._write(f"basis_gradient-{round:04d}", {"payload": _bytes(payload)}, {"rows": repr(rows)})

    # --- secure sums ---

    def encoded(self, key: str) -> Ring | None:
        found = self._read("encoded", "key", key)
        return None if found is None else found[0]["vector"].numpy().view(np.uint32)

    def save_encoded(self, key: str, vector: Ring) -> None:
        self._write("encoded", {"vector": torch.from_numpy(vector.view(np.int32))}, {"key": key})

    def sum_survivors(self, round: int) -> list[str] | None:
        path = self.folder / "sums" / f"round-{round:04d}.json"
        return list(json.loads(path.read_text())) if path.is_file() else None

    def save_sum_survivors(self, round: int, survivors: Sequence[str]) -> None:
        write_atomic(self.folder / "sums" / f"round-{round:04d}.json", json.dumps(list(survivors)).encode())

    # --- private ---

    def _read_start(self) -> tuple[int, ClientView] | None:
        if self._start is None and (found := self._read("start")) is not None:
            tensors, facts = found
            round = int(facts["round"])
            shared = within("shared", tensors)
            self._start = round, ClientView(shared, within("tensors", tensors), round, facts.get("hash"))
        return self._start

    def _round(self, round: int) -> Tensors | None:
        path = self._path(round)
        if not path.is_file():
            return None
        try:
            return load(path.read_bytes())
        except Exception as error:
            raise RunError(f"{path}, what this site keeps between rounds, cannot be read: {error}") from error

    def _answered(self) -> dict[str, str]:
        path = self.folder / "answered.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def _write(self, name: str, tensors: Tensors, facts: Mapping[str, str]) -> None:
        write_atomic(self.folder / f"{name}.safetensors", save(tensors, metadata=dict(facts)))

    def _read(self, name: str, fact: str = "", value: str = "") -> tuple[Tensors, dict[str, str]] | None:
        """Returns (tensors, facts) of a file; None if it does not exist or states a different value."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
            if fact and facts[fact] != value:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118

    def _path(self, round: int) -> Path:
        return self.folder / "rounds" / f"round-{round:04d}.safetensors"


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
