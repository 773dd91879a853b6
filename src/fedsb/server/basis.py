"""The server's part in making a basis, and the messages that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fedsb.adapters.basis import Basis, Pair, check_rank
from fedsb.adapters.layout import Layout
from fedsb.protocol.messages import BasisGradient, Refresh, SetBasis
from fedsb.protocol.payload import Payload, PayloadError, pack, unpack
from fedsb.protocol.tensors import rejection_of
from fedsb.protocol.traffic import Direction, TrafficRecord
from fedsb.training.basis import BasisSource
from fedsb.training.resolved import public_rows
from fedsb.utils.errors import RunError
from fedsb.utils.tensors import Tensors

if TYPE_CHECKING:
    from fedsb.methods.base import State
    from fedsb.server.server import Server


class BasisRound:
    """Makes B and A as the configuration asks, before the first round or, with a `state`, during the run."""

    def __init__(self, server: Server, state: State | None) -> None:
        self.server, self.state = server, state
        self.round = 0 if state is None else state.round
        self.traffic: list[TrafficRecord] = []

    def make(self) -> Basis:
        """Returns the basis. `traffic` then contains the messages sent for it."""
        server, config = self.server, self.server.config
        if config.basis.kind == "weights" and server.trainer.shapes_only:
            return self._derived_at_sites()
        if config.basis.kind in ("random", "weights"):
            return server.trainer.data_free_basis(self.round)
        seen = public_rows(config, server.trainer.task)
        if config.basis.kind == "update-pooled":
            seen = server.pooled_rows(config.basis.samples)
        source = BasisSource(
            start=self._start(),
            round=self.round,
            rows=server.clients[0].rows,
            seen=seen,
            gradients=self._gradients,
            broadcast=self._broadcast,
        )
        return server.trainer.make_basis(source)

    def send_state(self) -> None:
        """Sends the clients the server's tensors, for all to merge the same adapter into their residual."""
        assert self.state is not None
        payload = pack(Payload.of(self.state.tensors, kind="broadcast", run=self.server.run, round=self.round))
        request = Refresh(run=self.server.run, parts=(payload,))
        for name, reply in self.server.exchange.all(request).items():
            self.server.shared_state.by_client[name] = reply.shared
            self._record(payload, name, "down", request.wire_bytes)

    def _derived_at_sites(self) -> Basis:
        """Returns the basis as the sites derive it from the base model's weights, which this server does not have."""
        server, rank = self.server, self.server.method.total_rank
        shapes = {f"{layer}.A": (rank, n) for layer, (_, n) in server.trainer.shapes.items()}
        shapes |= {f"{layer}.B": (m, rank) for layer, (m, _) in server.trainer.shapes.items()}
        check_rank(server.trainer.shapes, rank)
        shared, traffic = server.shared_state.fetch(Layout(tuple(sorted(shapes.items()))), server.trainer.shapes)
        self.traffic += traffic
        return Basis(
            kind=server.config.basis.kind,
            A={layer: shared[f"{layer}.A"] for layer in server.trainer.shapes},
            B={layer: shared[f"{layer}.B"] for layer in server.trainer.shapes},
        )

    def _start(self) -> Tensors:
        """Returns the tensors at which gradients are computed."""
        server, state = self.server, self.state
        if state is None:
            return server.trainer.head
        head = {key: state.tensors[key] for key in server.trainer.head}
        return {**server.method.merge_into_residual(state), **head}

    def _gradients(self, outer: Mapping[str, Pair]) -> Iterator[tuple[Tensors, float]]:
        shapes = {f"{layer}.S": (len(A), len(A)) for layer, (A, _) in outer.items()}
        expected = Layout(tuple(sorted(shapes.items())))
        for name, reply in self.server.exchange.all(BasisGradient(run=self.server.run, round=self.round)).items():
            try:
                self.server.copy_ledger(name, reply.entries)
                payload = unpack(reply.payload)
                if reason := rejection_of(payload, expected):
                    raise PayloadError(reason)
            except PayloadError as error:
                raise RunError(
                    f"What {name} sent for the basis cannot be used: {error}. Resolve it with this site, or revoke it."
                ) from error
            self._record(reply.payload, name, "up", reply.wire_bytes)
            yield payload.tensors, reply.rows

    def _broadcast(self, tensors: Tensors) -> Tensors:
        server = self.server
        payload = server.compressor.basis("down", "", self.round, tensors)
        request = SetBasis(run=server.run, round=self.round, parts=(payload,))
        for name, reply in server.exchange.all(request).items():
            server.shared_state.by_client[name] = reply.shared
            self._record(payload, name, "down", request.wire_bytes)
        return unpack(payload).tensors

    def _record(self, payload: bytes, name: str, direction: Direction, wire_bytes: int) -> None:
        if self.server.method.spec.pools_data:  # the data are where the server is: nothing travels
            return
        round = 0 if self.state is None else self.round + 1
        counter = self.server.counter
        self.traffic.append(counter.record(payload, round, name, direction, kind="basis", wire_bytes=wire_bytes))
