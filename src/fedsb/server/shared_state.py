"""The clients' shared state, compared by its hash, and by a sketch where the hash differs.

The last bits of a state can differ on other hardware. A client whose sketch agrees keeps its own values; any other
client receives the state, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsb.adapters.basis import basis_sketch
from fedsb.adapters.residual import is_residual
from fedsb.client.round import ClientView
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import CompareShared, SetShared, SetSharedReply, Stale
from fedsb.protocol.payload import Payload, pack
from fedsb.protocol.traffic import TrafficCounter, TrafficRecord
from fedsb.server.exchange import Exchange, reason_of
from fedsb.utils.errors import RunError
from fedsb.utils.tensors import Tensors


class SharedStateSync:
    """Keeps the clients of a run on one shared state."""

    def __init__(self, exchange: Exchange, counter: TrafficCounter) -> None:
        self._exchange, self._counter = exchange, counter
        self.by_client: dict[str, str | None] = {}  # None: it waits for a basis
        self._view = ClientView({})  # of the server's state that was hashed last

    def hash(self, shared: Tensors) -> str:
        """Returns the hash of the server's shared state, computed where it has changed."""
        self._view = self._view.updated(shared)
        return self._view.hash

    def agree(self, shared: Tensors, round: int, *, residual: bool) -> list[TrafficRecord]:
        """Sends the state to clients whose own derivation differs by more than rounding.

        `round` is that of the traffic. Raises RunError if a client still has a different state.
        """
        expected = self.hash(shared)
        records = self._compare(shared, expected, round)
        odd = [name for name, known in self.by_client.items() if known != expected]
        if not odd:
            return records
        request = self._request(shared, residual=residual)
        for name, reply in self._exchange.all(request, among=odd).items():
            self.by_client[name] = reply.shared
            if reply.shared != expected:
                raise RunError(f"{name} received the shared state and has another one.")
        return [*records, *self._records(request, odd, round)]

    def _compare(self, shared: Tensors, expected: str, round: int) -> list[TrafficRecord]:
        """Sends a sketch of the state to clients that derived a state with another hash."""
        odd = [name for name, known in self.by_client.items() if known not in (None, expected)]
        if not odd:
            return []
        payload = Payload.of(basis_sketch(shared), kind="basis-down", run=self._exchange.run, round=0)
        request = CompareShared(run=self._exchange.run, shared=expected, parts=(pack(payload),))
        for name, reply in self._exchange.all(request, among=odd).items():
            self.by_client[name] = reply.shared
        return self._records(request, odd, round)

    def catch_up(
        self, name: str, stale: Stale, shared: Tensors, round: int, *, residual: bool
    ) -> list[TrafficRecord] | NoResponse:
        """Sends what a client that lost the shared state needs before it receives a whole broadcast."""
        if stale.shared == self.hash(shared):
            return []
        request = self._request(shared, residual=residual)
        ((_, reply),) = self._exchange.each({name: request})
        good = isinstance(reply, SetSharedReply)
        return self._records(request, [name], round) if good else NoResponse(reason_of(reply))

    def _request(self, shared: Tensors, *, residual: bool) -> SetShared:
        """Returns all of the state. The residual comes with a broadcast, except where a new basis made it."""
        tensors = {key: x for key, x in shared.items() if residual or not is_residual(key)}
        payload = Payload.of(tensors, kind="basis-down", run=self._exchange.run, round=0)
        return SetShared(run=self._exchange.run, parts=(pack(payload),))

    def _records(self, request: CompareShared | SetShared, names: Sequence[str], round: int) -> list[TrafficRecord]:
        size = request.wire_bytes
        return [
            self._counter.record(request.payload, round, name, "down", kind="basis", wire_bytes=size) for name in names
        ]
