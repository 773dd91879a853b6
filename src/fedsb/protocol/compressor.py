"""What travels with a lossy codec: changes, each with an account of what the last one lost.

    down   c = Q(s - h),  h <- h + c                        s: the server's tensors; h: what every site holds
    up     c_k = Q(x_k - b_k + e_k),  e_k <- x_k - b_k + e_k - c_k       the server takes b_k + c_k for client k's x_k
    next   s <- aggregate(h, all b_k + c_k) + (s - h)

Q is the codec, x_k what client k has to send, b_k the same had it not trained, which the server can form for itself,
and e_k the client's error feedback. All start from h, none from s. Feedback up as in Karimireddy et al. (ICML 2019,
arXiv 1901.09847), in both directions as in DoubleSqueeze (Tang et al., ICML 2019, arXiv 1905.05957). In float32 nothing
is lost: tensors travel as they are, h = s, and no one keeps anything.

What is made of it, a basis, travels in the codec too, without feedback: whoever receives it makes it orthonormal again.

Down goes whole, in float32: the first broadcast; the one to a site that missed the last (it holds an older h); the one
to a client whose rank is not the method's (its corner of h has other blocks); all of a method that changes the base
(what is added there is never sent again, so nothing would make an error good).

e_k lives with the client, beside its method's and its optimiser's state, as "codec/<tensor>":
- an update that the server drops leaves e_k as it was before that round;
- a client that skips rounds, or a tensor that skips rounds (RoLoRA's factors), keeps it: what was lost is still owed;
- a tensor whose shape changed starts again from 0;
- where the coordinates turn between rounds (the fact `turns`) nothing is kept, it would point elsewhere.
The server's s - h is kept where its aggregation is a plain mean that does not turn; elsewhere it is not a sum that a
difference can be added to, and a round goes on from what the sites really held.

Limits: with x_k - b_k clipped, x_k - b_k + e_k is not: a privacy plan that bounds updates must do without e_k. A state
whose tensors change their shape between rounds cannot be told as a change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedsb.adapters.adapted import Tensors
from fedsb.config.schema import Config, ServerConfig
from fedsb.methods.base import Method, State
from fedsb.protocol.codec import Codec
from fedsb.protocol.payload import Payload, pack, unpack
from fedsb.protocol.tensors import to_arrays, to_tensors, under, within
from fedsb.utils.rng import keyed_generator

OWED = "codec"  # the prefix of error feedback in a client's own state


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """How the messages of a run are made. Every draw is keyed by (seed, client, round, direction)."""

    run: str
    codec: Codec
    seed: int

    # --- both ---

    def basis(self, direction: Literal["up", "down"], client: str, round: int, tensors: Tensors, codec: Codec) -> bytes:
        """The envelope of what travels for a basis. Once is once: no one is owed what is lost."""
        kind: Literal["basis-up", "basis-down"] = "basis-up" if direction == "up" else "basis-down"
        payload = Payload(kind=kind, run=self.run, round=round, client=client, codec=codec, tensors=to_arrays(tensors))
        return pack(payload, self._draw(client if direction == "up" else "", round, kind))

    # --- the server ---

    def heard(self, method: Method, state: State) -> State:
        """The state of this round as the sites have it: h, and what it changes in what they hold in common."""
        if not state.client_view:
            return state
        now = read_change(state.client_view, self._change(method, state, basis=""))
        return replace(state, tensors={**state.client_view, **now}, shared=method.update_shared(state.shared, now))

    def down(
        self, method: Method, state: State, heard: State, *, basis: str, late: bool, rank: int | None
    ) -> tuple[bytes, Tensors]:
        """(the envelope to a client, what it makes of it); `heard` is that of `state`, `basis` names its common."""
        if not whole(method, state, late=late, rank=rank):
            data = self._change(method, state, basis)
            return data, read_change(state.client_view, data)
        tensors = to_arrays(method.broadcast(heard, late=late, rank=rank))
        data = pack(Payload(kind="broadcast", run=self.run, round=state.round, basis=basis, tensors=tensors))
        return data, to_tensors(unpack(data).tensors)

    def settled(self, method: Method, state: State, heard: State, after: State) -> State:
        """The state after a round that started from `state`, was heard as `heard` and was aggregated from it."""
        if self.codec == "float32" or method.spec.changes_base:
            return after
        tensors = after.tensors
        if method.spec.supports_server_optimizer and not method.spec.rotates_basis:
            tensors = {key: x + (state.tensors[key] - heard.tensors[key]) for key, x in tensors.items()}
        return replace(after, tensors=tensors, client_view=heard.tensors)

    # --- a client ---

    def up(self, method: Method, payload: Payload, base: Tensors, kept: Tensors) -> tuple[bytes, Tensors]:
        """(the envelope, what the client keeps for its next) of an update that holds the tensors themselves, x_k.

        `base` is `unmoved` of this round; `kept` is the client's own state.
        """
        if self.codec == "float32":
            return pack(payload), {}
        owed, untrained = to_arrays(within(OWED, kept)), to_arrays(base)
        change = {key: x - untrained[key] for key, x in payload.tensors.items()}
        change |= {key: x + owed[key] for key, x in change.items() if key in owed and owed[key].shape == x.shape}
        coded = replace(payload, codec=self.codec, tensors=change)
        data = pack(coded, self._draw(payload.client, payload.round, "up"))
        got = unpack(data).tensors
        lost = {} if method.spec.rotates_basis else {**owed, **{key: x - got[key] for key, x in change.items()}}
        return data, under(OWED, to_tensors(lost))

    # --- the inside ---

    def _change(self, method: Method, state: State, basis: str) -> bytes:
        """The envelope of s - h, of what a site that is up to date is told."""
        tensors = {key: tensor - state.client_view[key] for key, tensor in method.broadcast(state).items()}
        payload = Payload(
            kind="broadcast",
            run=self.run,
            round=state.round,
            basis=basis,
            codec=self.codec,
            tensors=to_arrays(tensors),
        )
        return pack(payload, self._draw("", state.round, "down"))

    def _draw(self, client: str, round: int, direction: str) -> np.random.Generator:
        return keyed_generator(self.seed, "codec", client, round, direction)


def read_change(held: Tensors, envelope: bytes) -> Tensors:
    """h + c, of the tensors in the envelope."""
    return {key: held[key] + c for key, c in to_tensors(unpack(envelope).tensors).items()}


def build_compressor(config: Config, method: Method, run: str) -> Compressor:
    return Compressor(run=run, codec=codec_of(config.server, method), seed=config.seed)


def codec_of(server: ServerConfig, method: Method) -> Codec:
    """float32 where the data are in one place: nothing travels."""
    return "float32" if method.spec.pools_data else server.codec


def whole(method: Method, state: State, *, late: bool, rank: int | None) -> bool:
    """Whether a broadcast holds the tensors themselves, in float32, and no change."""
    return late or not state.client_view or rank not in (None, method.total_rank)


def unmoved(method: Method, common: Tensors, message: Tensors, round: int) -> Tensors:
    """b_k: what a client would send that had not trained. `method` is at the client's rank."""
    own = method.init_client(common, message, {}, round)
    return method.upload(own, own, round)[0]
