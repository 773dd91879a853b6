"""What a site keeps of a run between rounds, on disk: it may be killed at any point and goes on from the last round.

run.json                            the notes that opened the run
common.safetensors                  what the site holds in common with all others, as of the start
rounds/round-0003.safetensors       after the third round: its own state, what changed in common, the last broadcast,
                                    and the answer that it sent
answered.json                       for each round, the hash of the broadcast that it trained on
basis_sums.safetensors              what it sent for a `core` basis
pending.safetensors                 its change, for a secure sum
encoded.safetensors                 the same with its share of the noise, where clients are what is protected
privacy/<name>.jsonl                its ledger
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from fedsb.adapters.adapted import Tensors
from fedsb.protocol.tensors import under, within
from fedsb.secagg.fixed_point import Floats, Ring
from fedsb.utils.errors import RunError
from fedsb.utils.files import write_atomic

KEEP = 2  # rounds: the coordinator may fall back to the one before


@dataclass(frozen=True)
class Answer:
    """What this site sent in a round, or puts into its sum."""

    envelope: bytes
    loss: float
    change: Floats | None  # for a secure sum


@dataclass(frozen=True)
class Pending:
    """What this site has to put into the sum of a round."""

    round: int
    basis: str
    against: str  # hash of what the change is against
    change: Floats


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_facts(self, facts: Mapping[str, Any]) -> None:
        write_atomic(self.folder / "run.json", json.dumps(facts, indent=1).encode())

    def facts(self) -> dict[str, Any] | None:
        path = self.folder / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def save_common(self, common: Tensors) -> None:
        write_atomic(self.folder / "common.safetensors", save(_whole(common)))

    def common(self) -> Tensors | None:
        path = self.folder / "common.safetensors"
        return load(path.read_bytes()) if path.is_file() else None

    def answered(self, round: int) -> str | None:
        """Returns the hash of the broadcast that this site trained on in this round, counted from 0; None for none."""
        return self._answered().get(str(round))

    def save_answered(self, round: int, told: str) -> None:
        """Notes a broadcast before it is trained on: a round is never done for a second one."""
        write_atomic(self.folder / "answered.json", json.dumps({**self._answered(), str(round): told}).encode())

    def _answered(self) -> dict[str, str]:
        path = self.folder / "answered.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def save_basis_sums(self, envelope: bytes, rows: float) -> None:
        write_atomic(self.folder / "basis_sums.safetensors", save({"envelope": _bytes(envelope)}, {"rows": repr(rows)}))

    def basis_sums(self) -> tuple[bytes, float] | None:
        path = self.folder / "basis_sums.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            return file.get_tensor("envelope").numpy().tobytes(), float(file.metadata()["rows"])

    def save_round(self, round: int, kept: Tensors, changed: Tensors, message: Tensors, answer: Answer) -> None:
        """After so many rounds. `changed` is of what is held in common, as against the start."""
        parts = under("kept", kept) | under("common", changed)
        parts |= {key: x.clone() for key, x in under("message", message).items()}  # some are in common too
        parts["envelope"] = _bytes(answer.envelope)
        if answer.change is not None:
            parts["change"] = torch.from_numpy(answer.change)
        write_atomic(self._path(round), save(_whole(parts), {"loss": repr(answer.loss)}))
        for path in (self.folder / "rounds").glob("round-*.safetensors"):
            if _round_of(path) <= round - KEEP:
                path.unlink()

    def round(self, round: int) -> tuple[Tensors, Tensors, Tensors] | None:
        """(kept, changed, message) after so many rounds; None where it is not here any more."""
        path = self._path(round)
        if not path.is_file():
            return None
        try:
            parts = load(path.read_bytes())
        except Exception as error:
            raise RunError(f"{path}, what this site keeps between rounds, cannot be read: {error}") from error
        return within("kept", parts), within("common", parts), within("message", parts)

    def answer(self, round: int) -> Answer | None:
        """Returns what was sent in the last of so many rounds; None if it is not stored any more."""
        path = self._path(round)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            change = file.get_tensor("change").numpy() if "change" in file.keys() else None  # noqa: SIM118
            envelope = file.get_tensor("envelope").numpy().tobytes()
            return Answer(envelope, float(file.metadata()["loss"]), change)

    def save_pending(self, pending: Pending) -> None:
        tensors = {"change": torch.from_numpy(pending.change)}
        metadata = {"round": str(pending.round), "basis": pending.basis, "against": pending.against}
        write_atomic(self.folder / "pending.safetensors", save(tensors, metadata=metadata))

    def pending(self) -> Pending | None:
        path = self.folder / "pending.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            return Pending(int(facts["round"]), facts["basis"], facts["against"], file.get_tensor("change").numpy())

    def save_encoded(self, key: str, vector: Ring) -> None:
        """What was encoded, with its noise, for the sum of this key."""
        encoded = {"vector": torch.from_numpy(vector.view(np.int32))}
        write_atomic(self.folder / "encoded.safetensors", save(encoded, metadata={"key": key}))

    def encoded(self, key: str) -> Ring | None:
        path = self.folder / "encoded.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            return file.get_tensor("vector").numpy().view(np.uint32) if file.metadata()["key"] == key else None

    def kept(self, before: int) -> Tensors:
        """The site's own state as of the last of the rounds up to `before` that it took part in."""
        there = [n for path in (self.folder / "rounds").glob("round-*.safetensors") if (n := _round_of(path)) <= before]
        found = self.round(max(there)) if there else None
        return found[0] if found else {}

    def _path(self, round: int) -> Path:
        return self.folder / "rounds" / f"round-{round:04d}.safetensors"


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def _whole(tensors: Tensors) -> Tensors:
    return {key: tensor.contiguous() for key, tensor in tensors.items()}
