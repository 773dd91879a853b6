"""The clients' shared state, compared by its hash, and by a sketch where the hash differs.

The last bits of a state can differ on other hardware. A client whose sketch agrees keeps its own values; any other
client receives the state, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedsb.adapters.basis import basis_hash, basis_sketch
from fedsb.adapters.layout import Layout
from fedsb.adapters.residual import is_residual
from fedsb.client.checks import refuse_basis
from fedsb.client.round import ClientView
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import CompareShared, GetShared, GetSharedReply, Reply, SetShared, SetSharedReply, Stale
from fedsb.protocol.payload import Payload, PayloadError, pack, unpack
from fedsb.protocol.tensors import rejection_of
from fedsb.protocol.traffic import TrafficCounter, TrafficRecord
from fedsb.server.exchange import Exchange, reason_of
from fedsb.utils.errors import RefusalError, RunError
from fedsb.utils.tensors import Shapes, Tensors


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

    def fetch(self, layout: Layout, shapes: Shapes) -> tuple[Tensors, list[TrafficRecord]]:
        """Receives the basis that clients derived from the base model's weights, for a server without them.

        The clients with the most frequent hash are asked in turn until one sends a valid basis with that hash. Raises
        RunError if none does, or if at most half of all clients derived this basis up to rounding: the server cannot
        know which one is right.
        """
        counts = Counter(sorted(known for known in self.by_client.values() if known is not None))
        expected = max(counts, key=counts.__getitem__, default="")
        faults = []
        for name in [name for name, known in sorted(self.by_client.items()) if known == expected]:
            ((_, reply),) = self._exchange.each({name: GetShared(run=self._exchange.run)}, patient=True)
            try:
                shared = _checked(reply, expected, layout, shapes)
            except (PayloadError, RefusalError) as error:
                faults.append(f"{name}: {error}")
                continue
            assert isinstance(reply, GetSharedReply)
            size = reply.wire_bytes
            sent = self._counter.record(reply.payload, 0, name, "up", kind="basis", wire_bytes=size)
            records = [sent, *self._compare(shared, expected, 0)]
            odd = [name for name, known in sorted(self.by_client.items()) if known != expected]
            if 2 * len(odd) >= len(self.by_client):
                raise RunError(
                    f"{', '.join(odd)} derived a different basis from that of {name}, and without the base model the "
                    "coordinator cannot know which one is right. Set basis.kind = 'random', or "
                    "server.load_base_model = true."
                )
            return shared, records
        raise RunError(
            "No site sent the basis that it derived from the base model's weights:\n  " + "\n  ".join(faults) + "\nA "
            "site with allow.tensors in site.toml must list *.A and *.B. Or set basis.kind = 'random'."
        )

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


def _checked(reply: Reply | NoResponse, expected: str, layout: Layout, shapes: Shapes) -> Tensors:
    """Returns the basis that a client sent. Raises PayloadError or RefusalError for one that cannot be used."""
    if not isinstance(reply, GetSharedReply):
        raise PayloadError(reason_of(reply))
    payload = unpack(reply.payload)
    if reason := rejection_of(payload, layout):
        raise PayloadError(reason)
    shared = payload.tensors
    refuse_basis(shared, shapes)
    if basis_hash(shared) != expected:
        raise PayloadError("its hash is not the one that this site stated at the start")
    return shared
