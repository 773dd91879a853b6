"""Compression with error feedback: a lossy codec sends changes, and the next message corrects its error.

    down   c = Q(s - h),  h <- h + c                        s: the server's tensors; h: the clients' view of them
    up     c_k = Q(x_k - b_k + e_k),  e_k <- x_k - b_k + e_k - c_k       the server takes b_k + c_k for client k's x_k
    next   s <- aggregate(h, all b_k + c_k) + (s - h)

Q is the codec, x_k what client k would send, b_k the baseline (the same without training, which the server can
compute for itself), and e_k the client's error feedback. All clients start from h, none from s. Error feedback for
updates as in Karimireddy et al. (ICML 2019, arXiv 1901.09847), in both directions as in DoubleSqueeze (Tang et al.,
ICML 2019, arXiv 1905.05957). In float32 nothing is lost: tensors travel as they are, h = s, and no one keeps anything.

A basis travels in the codec too, in at least 4 bits, without error feedback: its receiver makes it orthonormal again.

Before the first round h = s: clients compute the start from the settings, the base model and the basis. The first
broadcast has no values, but a hash of the start. A client whose own start has another hash asks for the values. All
receive them if the basis came with a first step, which only the server knows (basis.R0).

A broadcast carries h itself, in float32, to a client that missed the last round (its h is older), to a client whose
rank is not the method's (its corner of h has other blocks), and to all clients after a new basis. Where a sample of the
clients takes part in each round (server.clients_per_round), most of them missed the last one. Then all receive Q(s), in
at least 4 bits, and keep no h, if the method takes a mean of values that mean the same in every round.

A method that changes the base sends all in float32 (requirements.py refuses other codecs): what is added to the base is
never sent again, so no later message would correct an error.

e_k is part of the client's state, as "codec/<tensor>":
- an update that the server drops leaves e_k as it was before that round;
- a client that skips rounds, or a tensor that skips rounds (RoLoRA's factors), keeps it: what was lost is still owed;
- a tensor whose shape changed starts again from 0;
- where the basis rotates between rounds (the fact `rotates_basis`) nothing is kept, it would point elsewhere.
With server.fraction below 1, Q also sets to 0 all values but those of the round's part (part.py), which is the same for
all clients. What is not sent is owed, as what the codec loses. A broadcast has the part of the round before it, because
only those values have changed.


The server's s - h is kept where its aggregation is a plain mean in a fixed basis. Elsewhere a round continues from the
clients' view.

Limits: with x_k - b_k clipped, x_k - b_k + e_k is not, so a privacy plan that bounds updates must do without e_k. A
state whose tensors change their shape between rounds cannot be sent as a change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from fedsb.adapters.basis import basis_hash
from fedsb.adapters.layout import Layout
from fedsb.config.schema import Config
from fedsb.config.training import Codec, ServerConfig
from fedsb.methods.base import Method, State
from fedsb.protocol.codec import basis_codec
from fedsb.protocol.part import Part
from fedsb.protocol.payload import Payload, PayloadError, Vector, pack, unpack
from fedsb.protocol.tensors import under, within
from fedsb.utils.rng import keyed_generator
from fedsb.utils.tensors import Tensors

FEEDBACK = "codec"  # the prefix of error feedback in a client's state


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """The encoder of a run's payloads. Every draw is keyed by (seed, client, round, direction)."""

    run: str
    codec: Codec
    seed: int
    fraction: float = 1.0  # of the values that are sent in a round
    sampled: bool = False  # whether only some of the clients take part in a round

    # --- server and client ---

    @property
    def is_lossy(self) -> bool:
        """Returns whether a message loses something, so that changes are sent, with error feedback."""
        return self.codec != "float32" or self.fraction < 1

    def part(self, round: int) -> Part | None:
        """Returns the part of the values that is sent up in this round; None: all."""
        return Part(seed=self.seed, round=round, fraction=self.fraction) if self.fraction < 1 else None

    def basis(self, direction: Literal["up", "down"], client: str, round: int, tensors: Tensors) -> bytes:
        """Returns the payload of what travels for a basis, once: no error feedback."""
        codec = basis_codec(self.codec)
        kind: Literal["basis-up", "basis-down"] = "basis-up" if direction == "up" else "basis-down"
        payload = Payload.of(tensors, kind=kind, run=self.run, round=round, codec=codec)
        draw = self._draw(client if direction == "up" else "", round, kind)
        return pack(replace(payload, client=client), draw)

    # --- server ---

    def keeps_view(self, method: Method) -> bool:
        """Returns whether clients keep h, because changes of it are sent to them."""
        return self.is_lossy and not method.spec.starts_afresh(sampled=self.sampled)

    def start(self, state: State) -> State:
        """Returns the first state, which clients compute too: h = s."""
        return replace(state, client_view=state.tensors) if self.is_lossy else state

    def client_view(self, method: Method, state: State) -> State:
        """Returns the state of this round as the clients have it: h, and what h changes in their shared state."""
        if self._in_float32(method, state) or _is_derived(state):
            return state
        payload = unpack(self._coded(method, state, basis=""))
        now = read_change(state.client_view, payload) if payload.change else payload.tensors
        shared = method.update_shared(state.shared, now)
        return replace(state, tensors={**(state.client_view or state.tensors), **now}, shared=shared)

    def broadcast(
        self,
        method: Method,
        state: State,
        view: State,  # `client_view` of `state`
        shared_hash: str,
        *,
        missed_last_round: bool,
        total_rank: int | None,
    ) -> bytes:
        """Returns the payload that a client receives in this round."""
        if _is_derived(state) and not missed_last_round:
            payload = Payload.of({}, kind="start", run=self.run, round=0)
            return pack(replace(payload, basis=start_hash(shared_hash, state.tensors)))
        keeps_view = self.keeps_view(method) or _is_derived(state)
        lacks_view = total_rank not in (None, method.total_rank) or (missed_last_round and keeps_view)
        if not lacks_view and not self._in_float32(method, state):
            return self._coded(method, state, shared_hash)
        tensors = method.broadcast(view, missed_last_round=missed_last_round, total_rank=total_rank)
        payload = Payload.of(tensors, kind="broadcast", run=self.run, round=state.round)
        return pack(replace(payload, basis=shared_hash))

    def settle(self, method: Method, state: State, view: State, after: State) -> State:
        """Returns the state after a round from `state`, which was trained from `view` and aggregated to `after`."""
        if not self.is_lossy:
            return after
        tensors = after.tensors
        if method.spec.keeps_coordinates:
            tensors = {key: x + (state.tensors[key] - view.tensors[key]) for key, x in tensors.items()}
        return replace(after, tensors=tensors, client_view=view.tensors if self.keeps_view(method) else {})

    # --- client ---

    def update(
        self, method: Method, payload: Payload, baseline: Vector, client_state: Tensors
    ) -> tuple[bytes, Tensors]:
        """Returns (the message, the error feedback that the client keeps) of an update that has x_k in float32.

        `baseline` is b_k in the payload's layout.
        """
        if not self.is_lossy:
            return pack(payload), {}
        change, owed = self._with_owed(payload, baseline, client_state)
        coded = replace(payload, codec=self.codec, change=True, vector=change).only(self.part(payload.round))
        data = pack(coded, self._draw(payload.client, payload.round, "up"))
        if method.spec.rotates_basis:
            return data, {}
        lost = payload.layout.views(torch.from_numpy(change - unpack(data).whole(payload.layout).vector))
        return data, under(FEEDBACK, {**owed, **lost})

    def change(self, payload: Payload, baseline: Vector, client_state: Tensors) -> tuple[Vector, Tensors]:
        """Returns (what goes into secure aggregation, the error feedback that the client keeps), as `update` does."""
        if (part := self.part(payload.round)) is None:
            return payload.vector - baseline, {}
        change, owed = self._with_owed(payload, baseline, client_state)
        places = part.places(payload.layout)
        sent = change[places]
        change[places] = 0.0
        return sent, under(FEEDBACK, {**owed, **payload.layout.views(torch.from_numpy(change))})

    # --- private ---

    def _in_float32(self, method: Method, state: State) -> bool:
        """Returns whether all broadcasts of a round have all values in float32."""
        return not self.is_lossy or (self.keeps_view(method) and not state.client_view)

    def _with_owed(self, payload: Payload, baseline: Vector, client_state: Tensors) -> tuple[Vector, Tensors]:
        """Returns (a client's change with what it still owes, all that it owes)."""
        owed = within(FEEDBACK, client_state)
        change = payload.vector - baseline
        for key, shape in payload.layout.shapes:
            if key in owed and owed[key].shape == shape:
                change[payload.layout.slices[key]] += owed[key].numpy().reshape(-1)
        return change, owed

    def _coded(self, method: Method, state: State, basis: str) -> bytes:
        """Returns the payload of s - h, which clients that are up to date receive, or of s, if they have no h."""
        tensors, codec, part = method.broadcast(state), self.codec, None
        if state.client_view:
            tensors, part = {key: x - state.client_view[key] for key, x in tensors.items()}, self.part(state.round - 1)
        elif not self.keeps_view(method):
            codec = basis_codec(codec)
        payload = Payload.of(tensors, kind="broadcast", run=self.run, round=state.round, codec=codec)
        payload = replace(payload, basis=basis, change=bool(state.client_view)).only(part)
        return pack(payload, self._draw("", state.round, "down"))

    def _draw(self, client: str, round: int, direction: str) -> np.random.Generator:
        return keyed_generator(self.seed, "codec", client, round, direction)


def _is_derived(state: State) -> bool:
    """Returns whether clients compute the state themselves, because it is the start."""
    return state.round == 0 and bool(state.client_view)


def start_hash(shared_hash: str, tensors: Tensors) -> str:
    """Returns a hash of the start, of which clients compute the shared state and the tensors themselves."""
    return f"{shared_hash} {basis_hash(tensors)}"


def read_change(view: Tensors, payload: Payload) -> Tensors:
    """Returns h + c of the tensors in the payload. Raises PayloadError for tensors that h does not have."""
    unknown = [key for key, _ in payload.layout.shapes if key not in view]
    if unknown:
        raise PayloadError(f"A change of {unknown[0]!r:.80}, which was not sent before.")
    expected = Layout.of({key: view[key] for key, _ in payload.layout.shapes})
    return {key: view[key] + c for key, c in payload.whole(expected).tensors.items()}


def build_compressor(config: Config, method: Method, run: str) -> Compressor:
    codec, fraction = codec_of(config.server, method), fraction_of(config.server, method)
    sampled = config.server.clients_per_round is not None
    return Compressor(run=run, codec=codec, seed=config.seed, fraction=fraction, sampled=sampled)


def codec_of(server: ServerConfig, method: Method) -> Codec:
    """Returns the codec; float32 where all data are in one place, because nothing travels."""
    return "float32" if method.spec.pools_data else server.codec


def fraction_of(server: ServerConfig, method: Method) -> float:
    """Returns the fraction of the values that is sent; 1 where all data are in one place, because nothing travels."""
    return 1.0 if method.spec.pools_data else server.fraction


def baseline_upload(method: Method, shared: Tensors, message: Tensors, round: int) -> Tensors:
    """Returns b_k: what a client that has not trained would send. `method` is at the client's rank."""
    own = method.init_client(shared, message, {}, round)
    return method.upload(own, own, round)[0]
