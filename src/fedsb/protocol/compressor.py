"""Compression with error feedback: a lossy codec sends changes, and the next message corrects its error.

    down   c = Q(s - h),  h <- h + c                        s: the server's tensors; h: the clients' view of them
    up     c_k = Q(x_k - b_k + e_k),  e_k <- x_k - b_k + e_k - c_k       the server takes b_k + c_k for client k's x_k
    next   s <- aggregate(h, all b_k + c_k) + (s - h)

Q is the codec, x_k what client k would send, b_k the baseline (the same without training, which the server can compute
for itself), and e_k the client's error feedback. All clients start from h, none from s. Error feedback for updates as
in Karimireddy et al. (ICML 2019, arXiv 1901.09847), in both directions as in DoubleSqueeze (Tang et al., ICML 2019,
arXiv 1905.05957). In float32 nothing is lost: tensors travel as they are, h = s, and no one keeps anything.

A basis travels in the codec too, in at least 4 bits, without error feedback: its receiver makes it orthonormal again.

A broadcast carries the tensors themselves, in float32, in the first round; to a client that missed the last round (its
h is older); to a client whose rank is not the method's (its corner of h has other blocks); and for every method that
changes the base (what is added there is never sent again, so no later message would correct an error).

e_k is part of the client's state, as "codec/<tensor>":
- an update that the server drops leaves e_k as it was before that round;
- a client that skips rounds, or a tensor that skips rounds (RoLoRA's factors), keeps it: what was lost is still owed;
- a tensor whose shape changed starts again from 0;
- where the basis rotates between rounds (the fact `rotates_basis`) nothing is kept, it would point elsewhere.
In secure aggregation all clients may send the same part of the values, server.secagg_fraction, drawn by (seed, round).
Then Q(x) is x in that part and 0 elsewhere, and what was not sent is owed in the same way.

The server's s - h is kept where its aggregation is a plain mean in a fixed basis. Elsewhere a round continues from the
clients' view.

Limits: with x_k - b_k clipped, x_k - b_k + e_k is not, so a privacy plan that bounds updates must do without e_k. A
state whose tensors change their shape between rounds cannot be sent as a change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedsb.config.schema import Config
from fedsb.config.training import Codec, ServerConfig
from fedsb.methods.base import Method, State
from fedsb.protocol.codec import basis_codec
from fedsb.protocol.payload import Payload, Vector, pack, unpack
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
    fraction: float = 1.0  # of the values that go into a secure sum

    # --- server and client ---

    def part(self, size: int, round: int) -> NDArray[np.int64] | slice:
        """Returns which of `size` values all clients send in this round: their sorted places, or a slice of all."""
        if self.fraction == 1.0:
            return slice(None)
        draw = keyed_generator(self.seed, "part", round)
        chosen: NDArray[np.int64] = np.sort(draw.choice(size, part_size(size, self.fraction), replace=False))
        return chosen

    def basis(self, direction: Literal["up", "down"], client: str, round: int, tensors: Tensors) -> bytes:
        """Returns the payload of what travels for a basis, once: no error feedback."""
        codec = basis_codec(self.codec)
        kind: Literal["basis-up", "basis-down"] = "basis-up" if direction == "up" else "basis-down"
        payload = Payload.of(tensors, kind=kind, run=self.run, round=round, codec=codec)
        draw = self._draw(client if direction == "up" else "", round, kind)
        return pack(replace(payload, client=client), draw)

    # --- server ---

    def client_view(self, method: Method, state: State) -> State:
        """Returns the state of this round as the clients have it: h, and what h changes in their shared state."""
        if not state.client_view:
            return state
        now = read_change(state.client_view, unpack(self._change(method, state, basis="")))
        shared = method.update_shared(state.shared, now)
        return replace(state, tensors={**state.client_view, **now}, shared=shared)

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
        if not whole(method, state, missed_last_round=missed_last_round, total_rank=total_rank):
            return self._change(method, state, shared_hash)
        tensors = method.broadcast(view, missed_last_round=missed_last_round, total_rank=total_rank)
        payload = Payload.of(tensors, kind="broadcast", run=self.run, round=state.round)
        return pack(replace(payload, basis=shared_hash))

    def settle(self, method: Method, state: State, view: State, after: State) -> State:
        """Returns the state after a round from `state`, which was trained from `view` and aggregated to `after`."""
        if self.codec == "float32" or method.spec.changes_base:
            return after
        tensors = after.tensors
        if method.spec.supports_server_optimizer and not method.spec.rotates_basis:
            tensors = {key: x + (state.tensors[key] - view.tensors[key]) for key, x in tensors.items()}
        return replace(after, tensors=tensors, client_view=view.tensors)

    # --- client ---

    def update(
        self, method: Method, payload: Payload, baseline: Vector, client_state: Tensors
    ) -> tuple[bytes, Tensors]:
        """Returns (the message, the error feedback that the client keeps) of an update that has x_k in float32.

        `baseline` is b_k in the payload's layout.
        """
        if self.codec == "float32":
            return pack(payload), {}
        change, owed = self._with_owed(payload, baseline, client_state)
        coded = replace(payload, codec=self.codec, vector=change)
        data = pack(coded, self._draw(payload.client, payload.round, "up"))
        if method.spec.rotates_basis:
            return data, {}
        lost = payload.layout.views(torch.from_numpy(change - unpack(data).vector))
        return data, under(FEEDBACK, {**owed, **lost})

    def change(
        self, method: Method, payload: Payload, baseline: Vector, client_state: Tensors
    ) -> tuple[Vector, Tensors]:
        """Returns (what goes into secure aggregation, the error feedback that the client keeps), as `update` does."""
        if self.fraction == 1.0:
            return payload.vector - baseline, {}
        change, owed = self._with_owed(payload, baseline, client_state)
        part = self.part(len(change), payload.round)
        sent = change[part]
        if method.spec.rotates_basis:
            return sent, {}
        change[part] = 0.0
        return sent, under(FEEDBACK, {**owed, **payload.layout.views(torch.from_numpy(change))})

    # --- private ---

    def _with_owed(self, payload: Payload, baseline: Vector, client_state: Tensors) -> tuple[Vector, Tensors]:
        """Returns (a client's change with what it still owes, all that it owes)."""
        owed = within(FEEDBACK, client_state)
        change = payload.vector - baseline
        for key, shape in payload.layout.shapes:
            if key in owed and owed[key].shape == shape:
                change[payload.layout.slices[key]] += owed[key].numpy().reshape(-1)
        return change, owed

    def _change(self, method: Method, state: State, basis: str) -> bytes:
        """Returns the payload of s - h, which a client that is up to date receives."""
        tensors = {key: x - state.client_view[key] for key, x in method.broadcast(state).items()}
        payload = Payload.of(tensors, kind="broadcast", run=self.run, round=state.round, codec=self.codec)
        return pack(replace(payload, basis=basis), self._draw("", state.round, "down"))

    def _draw(self, client: str, round: int, direction: str) -> np.random.Generator:
        return keyed_generator(self.seed, "codec", client, round, direction)


def read_change(view: Tensors, payload: Payload) -> Tensors:
    """Returns h + c of the tensors in the payload."""
    return {key: view[key] + c for key, c in payload.tensors.items()}


def build_compressor(config: Config, method: Method, run: str) -> Compressor:
    server = config.server
    fraction = server.secagg_fraction if server.secure_aggregation else 1.0
    return Compressor(run=run, codec=codec_of(server, method), seed=config.seed, fraction=fraction)


def part_size(size: int, fraction: float) -> int:
    """Returns how many of `size` values a client sends."""
    return max(1, math.ceil(fraction * size))


def codec_of(server: ServerConfig, method: Method) -> Codec:
    """Returns the codec; float32 where all data are in one place, because nothing travels."""
    return "float32" if method.spec.pools_data else server.codec


def whole(method: Method, state: State, *, missed_last_round: bool, total_rank: int | None) -> bool:
    """Returns whether a broadcast carries the tensors themselves, in float32, and not a change."""
    return missed_last_round or not state.client_view or total_rank not in (None, method.total_rank)


def baseline_upload(method: Method, shared: Tensors, message: Tensors, round: int) -> Tensors:
    """Returns b_k: what a client that has not trained would send. `method` is at the client's rank."""
    own = method.init_client(shared, message, {}, round)
    return method.upload(own, own, round)[0]
