"""What sites that are elsewhere hold in common, known by its hash: who holds something else is told, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fedsb.adapters.adapted import Tensors
from fedsb.adapters.basis import basis_hash
from fedsb.adapters.residual import is_residual
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import Behind, Held
from fedsb.protocol.payload import Payload, pack
from fedsb.protocol.tensors import to_arrays
from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.exchange import Asking, lost
from fedsb.utils.errors import RunError


class Count(Protocol):
    def __call__(self, envelope: bytes, round: int, client: str, direction: Any, kind: Any) -> TrafficRecord: ...


class Holdings:
    """Of the sites of a run."""

    def __init__(self, asking: Asking, count: Count) -> None:
        self._asking, self._count = asking, count
        self.by_site: dict[str, str | None] = {}  # None: it waits for a basis

    def agree(self, common: Tensors) -> list[TrafficRecord]:
        """Tells those whose own derivation differs, as last bits do on other hardware. Raises as `Asking.all`."""
        wanted = basis_hash(common)
        odd = [name for name, holds in self.by_site.items() if holds != wanted]
        if not odd:
            return []
        envelope = self._envelope(common)
        for name, note in self._asking.all(Held, (envelope,), among=odd).items():
            self.by_site[name] = note.holds
            if note.holds != wanted:
                raise RunError(f"{name} was told what is held in common and holds something else")
        return self._sent(envelope, odd, 0)

    def bring_up(self, name: str, behind: Behind, common: Tensors, round: int) -> list[TrafficRecord] | NoResponse:
        """What a site is told that lost what is held in common, before it is told all of the broadcast."""
        if behind.holds == basis_hash(common):
            return []
        envelope = self._envelope(common)
        ((_, answer),) = self._asking.each(Held, {name: self._asking.request(Held, (envelope,))})
        return self._sent(envelope, [name], round) if isinstance(answer, Held) else lost(answer)

    def _envelope(self, common: Tensors) -> bytes:
        """All of it; what is carried comes with a broadcast."""
        tensors = to_arrays({key: x for key, x in common.items() if not is_residual(key)})
        return pack(Payload(kind="basis-down", run=self._asking.run, round=0, tensors=tensors))

    def _sent(self, envelope: bytes, names: Sequence[str], round: int) -> list[TrafficRecord]:
        return [self._count(envelope, round, name, "down", "basis") for name in names]
