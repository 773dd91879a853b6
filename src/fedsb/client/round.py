"""A client's round: its stored state, the broadcast, local training and the upload."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

from fedsb.adapters.basis import basis_hash
from fedsb.adapters.layout import Layout
from fedsb.adapters.residual import is_delta, is_residual
from fedsb.data.clients import ClientData
from fedsb.methods.base import Method, State
from fedsb.privacy.scaling import unpack_moments
from fedsb.protocol.compressor import baseline_upload, read_change, start_hash
from fedsb.protocol.payload import Payload, PayloadError, Vector
from fedsb.protocol.tensors import within
from fedsb.utils.errors import RefusalError
from fedsb.utils.tensors import Tensors, same_tensors


@dataclass(frozen=True, eq=False)
class ClientView:
    """The state of a client between rounds. It is equal for all clients that received the same messages.

    Args:
        shared: the shared state.
        tensors: those of the start, or as decoded from the last broadcasts; a lossy codec's change is added to them.
        rounds: how many rounds' changes are in the shared state.
    """

    shared: Tensors
    tensors: Tensors = field(default_factory=dict)
    rounds: int = 0
    known_hash: str | None = None

    @cached_property
    def hash(self) -> str:
        """The hash of the shared state, computed where it has changed."""
        return self.known_hash or basis_hash(self.shared)

    def receive(self, method: Method, payload: Payload, total_rank: int | None, *, keeps: bool) -> ClientRound | None:
        """Returns the round that a broadcast starts; None if this view lacks the state to which the broadcast adds.

        With `keeps` its view keeps the tensors, because the next broadcast changes them.

        A view that has the changes of all rounds so far, because the run was resumed here, does not add them again.
        """
        if payload.kind == "start":
            return self._started(method, payload, total_rank, keeps=keeps)
        message = read_change(self.tensors, payload) if payload.change else payload.tensors
        new = message
        if self.rounds == payload.round:
            new = {key: x for key, x in message.items() if not is_delta(key)}
        now = self.updated(method.update_shared(self.shared, new))
        if now.hash != payload.basis:
            return None
        own = method if total_rank is None else method.at(total_rank)
        view = ClientView(now.shared, {**self.tensors, **message} if keeps else {}, payload.round, now.hash)
        return ClientRound(own, view, message, payload.round, payload.basis)

    def _started(self, method: Method, payload: Payload, total_rank: int | None, *, keeps: bool) -> ClientRound | None:
        """Returns the first round, from the start that this client has computed; None if it is not the server's."""
        if payload.round:
            raise PayloadError(f"A start in round {payload.round + 1}.")
        if payload.basis != start_hash(self.hash, self.tensors):
            return None
        own = method if total_rank is None else method.at(total_rank)
        message = method.broadcast(State(tensors=self.tensors, shared=self.shared), total_rank=total_rank)
        view = ClientView(self.shared, self.tensors if keeps else {}, 0, self.hash)
        return ClientRound(own, view, message, 0, self.hash)

    def updated(self, shared: Tensors) -> ClientView:
        """Returns a view with this shared state, whose hash is computed where it has changed."""
        before, after = ({key: x for key, x in s.items() if not is_residual(key)} for s in (self.shared, shared))
        return ClientView(shared, known_hash=self.hash if same_tensors(before, after) else None)

    def needs_whole(self, payload: Payload) -> bool:
        """Returns whether the payload adds to an earlier broadcast."""
        return payload.change or any(is_delta(key) for key, _ in payload.layout.shapes)


@dataclass(frozen=True, eq=False)
class ClientRound:
    """A round for all clients that received the same broadcast."""

    method: Method  # at their rank
    view: ClientView  # what they hold from now on
    message: Tensors
    round: int
    shared_hash: str
    second_moments: bytes | None = None  # of the server's optimiser, see privacy/scaling.py

    def start(self, client_state: Tensors) -> Tensors:
        """Returns a client's tensors before its training."""
        own = within("method", client_state)
        return self.method.init_client(self.view.shared, self.message, own, self.round)

    @cached_property
    def trained(self) -> Tensors:
        """The tensors that a client without a state of its own trains, before its training."""
        own = self.start({})
        return {key: own[key] for key in self.method.trainable(own, self.round)}

    def check_moments(self, *, expected: bool) -> None:
        """Raises RefusalError unless there is a byte for each trained value, or none if none are `expected`."""
        found, size = self.second_moments, Layout.of(self.trained).size
        if (found is None) == expected or (found is not None and len(found) != size):
            sent = "no" if found is None else len(found)
            raise RefusalError(f"A broadcast with {sent} bytes of second moments. Expected: {size * expected}.")

    @cached_property
    def moments(self) -> Tensors:
        """The server's second moments of the trained tensors, as a client's own; {} without them."""
        if self.second_moments is None:
            return {}
        views = Layout.of(self.trained).views(unpack_moments(self.second_moments))
        return {f"v.{key}": x for key, x in views.items()}

    @cached_property
    def baseline(self) -> Tensors:
        """The tensors that a client would send without training."""
        return baseline_upload(self.method, self.view.shared, self.message, self.round)

    @cached_property
    def layout(self) -> Layout:
        """The layout of an update."""
        return Layout.of(self.baseline)

    @cached_property
    def baseline_vector(self) -> Vector:
        vector: Vector = self.layout.flatten(self.baseline).numpy()
        return vector

    def payload(self, run: str, client: ClientData, layout: Layout, vector: Any) -> Payload:
        """Returns what a client sends, as an update in float32."""
        return Payload(
            kind="update",
            run=run,
            round=self.round,
            client=client.name,
            samples=client.rows,
            basis=self.shared_hash,
            layout=layout,
            vector=vector,
        )

    @cached_property
    def against(self) -> str:
        """The hash of the received tensors from which a change is computed, in this round or before."""
        received = {**self.view.shared, **self.message}
        return self._with_moments(basis_hash({key: received[key] for key in self.baseline if key in received}))

    @cached_property
    def broadcast_hash(self) -> str:
        """The hash of all that a client without a state of its own starts from."""
        return self._with_moments(basis_hash(self.start({})))

    def _with_moments(self, tensors: str) -> str:
        return tensors if self.second_moments is None else f"{tensors} {sha256(self.second_moments).hexdigest()}"
