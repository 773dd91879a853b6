"""The server's doorkeeper: an update is checked before it is averaged, and a bad one is dropped with its reason.

The round goes on with the others while `min_clients` good updates are there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedsb.adapters.basis import basis_hash
from fedsb.config.schema import ServerConfig
from fedsb.methods.base import Method, State, Update
from fedsb.protocol.codec import Codec
from fedsb.protocol.compressor import codec_of, unmoved
from fedsb.protocol.payload import Arrays, Payload, PayloadError, unpack
from fedsb.protocol.tensors import to_arrays
from fedsb.server.spool import Spool
from fedsb.utils.errors import RunError

MAX_SAMPLES = 10**9  # rows that one client may claim


@dataclass(frozen=True, kw_only=True)
class UpdateSpec:
    """The tensors of a good update."""

    shapes: Mapping[str, tuple[int, ...]]  # name -> shape of each tensor that goes up
    reference: Arrays  # what a client would send that had not trained: an update's norm is that of its change
    claims: frozenset[str] = frozenset()  # those of them that are no part of the model


@dataclass(frozen=True, kw_only=True)
class UpdateRules:
    """What a good update must be."""

    run: str
    round: int
    basis: str
    wanted: UpdateSpec
    at_rank: Mapping[str, UpdateSpec] = field(default_factory=dict)  # of clients whose rank is not the method's
    codec: Codec = "float32"
    weighting: Literal["samples", "uniform"] = "samples"
    norm_factor: float = 30.0  # an update whose change per step is so many times the cohort's median is dropped
    rows: Mapping[str, int] = field(default_factory=dict)  # of each client, where they are known: what it may claim
    steps: Mapping[str, int] = field(default_factory=dict)  # of each client's local training; 1 where not given
    min_clients: int = 1

    def of(self, client: str) -> UpdateSpec:
        return self.at_rank.get(client, self.wanted)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    client: str
    reason: str


def rules(
    method: Method,
    state: State,
    server: ServerConfig,
    run: str,
    ranks: Mapping[str, int],
    *,
    judge_norms: bool = True,
    rows: Mapping[str, int] | None = None,
    steps: Mapping[str, int] | None = None,
) -> UpdateRules:
    """The rules of the round that starts at `state`; `ranks` are those of clients that differ from the method's.

    `rows` are the clients' training rows, `steps` the optimiser steps that they take in a round.

    `judge_norms` is off where clients' changes are clipped and noised in sum: who is left out for its norm would depend
    on the others' rows.
    """
    ranks = {**ranks, **state.total_ranks}
    by_rank = {rank: _wanted(method, state, rank) for rank in set(ranks.values())}
    return UpdateRules(
        run=run,
        round=state.round,
        basis=basis_hash(state.shared),
        wanted=_wanted(method, state, None),
        at_rank={client: by_rank[rank] for client, rank in ranks.items()},
        codec=codec_of(server, method),
        weighting=server.weighting,
        norm_factor=server.max_norm_ratio if judge_norms else math.inf,
        min_clients=1 if method.spec.pools_data else server.min_clients,
        rows=rows or {},
        steps=steps or {},
    )


def _wanted(method: Method, state: State, rank: int | None) -> UpdateSpec:
    own = method if rank is None else method.at(rank)
    sent = unmoved(own, state.shared, method.broadcast(state, total_rank=rank), state.round)
    shapes = {name: tuple(tensor.shape) for name, tensor in sent.items()}
    return UpdateSpec(shapes=shapes, reference=to_arrays(sent), claims=method.metadata_keys)


def validate_updates(
    replies: Iterable[tuple[str, bytes]], rules: UpdateRules, spool: Spool | None = None, left: Sequence[Dropped] = ()
) -> tuple[list[Update], list[Dropped]]:
    """The good updates, and the bad ones with their reasons, from (client, envelope) pairs of one round.

    Envelopes are read one by one and let go; the updates' tensors are views of the spool. `left` are those who sent
    none, once all the others were read. Raises RunError when fewer than `min_clients` are good.
    """
    spool = spool or Spool()
    norms: dict[str, float] = {}  # of the good ones, in the spool's order
    samples: dict[str, int] = {}
    dropped: list[Dropped] = []
    for client, data in replies:
        try:
            payload = _whole(unpack(data), rules.of(client).reference)
        except PayloadError as error:
            dropped.append(Dropped(client=client, reason=str(error)))
            continue
        reason = fault(client, payload, rules)
        if reason is None and client in norms:
            reason = "sent a second update in this round"
        if reason is None:
            norms[client], samples[client] = change_norm_l2(payload, rules.of(client)), payload.samples
            spool.add(payload.tensors)
        else:
            dropped.append(Dropped(client=client, reason=reason))
    outliers = _outliers(norms, rules)
    dropped += outliers
    good = norms.keys() - {drop.client for drop in outliers}
    if len(good) < rules.min_clients:
        reasons = "; ".join(f"{drop.client}: {drop.reason}" for drop in [*left, *dropped]) or "no client replied"
        raise RunError(
            f"round {rules.round + 1}: {len(good)} good updates, server.min_clients asks for {rules.min_clients} "
            f"({reasons}). The checkpoint of the last finished round is kept"
        )
    weights = {client: float(n) if rules.weighting == "samples" else 1.0 for client, n in samples.items()}
    read = dict(zip(norms, spool.read(), strict=True))
    in_order = sorted(good)  # whichever came first: sums of floats depend on their order
    return [Update(client=name, weight=weights[name], tensors=read[name]) for name in in_order], dropped


def _whole(payload: Payload, reference: Arrays) -> Payload:
    """With a lossy codec a change travels: added to what it changes, where it fits; the rest is left to `fault`."""
    if payload.codec == "float32":
        return payload
    with np.errstate(over="ignore", invalid="ignore"):  # a stranger's numbers; `fault` sees what comes of them
        tensors = {
            key: x + reference[key] if key in reference and reference[key].shape == x.shape else x
            for key, x in payload.tensors.items()
        }
    return replace(payload, tensors=tensors)


def fault(client: str, payload: Payload, rules: UpdateRules) -> str | None:
    """Why this update must not be averaged; None for a good one."""
    claims = (
        ("kind", payload.kind, "update"),
        ("client", payload.client, client),
        ("run", payload.run, rules.run),
        ("round", payload.round + 1, rules.round + 1),  # as users count
        ("basis", payload.basis, rules.basis),
        ("codec", payload.codec, rules.codec),
    )
    for what, value, wanted in claims:
        if value != wanted:
            return f"its {what} is {value!r:.80}, this round's is {wanted!r}"
    known = rules.rows.get(client)
    if known is not None and payload.samples != known:
        return f"claims {payload.samples!s:.20} samples, but it has {known:,} training rows in this run"
    if not 0 < payload.samples <= MAX_SAMPLES:
        return f"claims {payload.samples!s:.20} samples, allowed are 1 to {MAX_SAMPLES:,}"
    return fault_of_tensors(payload.tensors, rules.of(client).shapes)


def fault_of_tensors(tensors: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with tensors that should have these names and shapes; None for good ones."""
    if fault := fault_of_shapes({name: array.shape for name, array in tensors.items()}, shapes):
        return fault
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            return f"{name!r} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite"
    return None


def fault_of_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with names and shapes; None for those that are wanted."""
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or extra:
        return "wrong keys: " + "; ".join([*_some("missing", missing), *_some("unknown", extra)])
    for name, shape in found.items():
        if shape != wanted[name]:
            return f"{name!r} has shape {shape}, wanted {wanted[name]}"
    return None


def change_norm_l2(payload: Payload, wanted: UpdateSpec) -> float:
    """L2 norm, over all tensors of the model, of what the client changed."""
    squares = (
        np.square(array.astype(np.float64) - wanted.reference[name]).sum()
        for name, array in payload.tensors.items()
        if name not in wanted.claims
    )
    return float(np.sqrt(sum(squares)))


def _outliers(norms: Mapping[str, float], rules: UpdateRules) -> list[Dropped]:
    """Those whose change per step is far above the cohort's median.

    A change grows with the number of steps, and with `train.local_epochs` a client with more rows takes more of them.
    """
    if len(norms) < 2:
        return []
    steps = {client: rules.steps.get(client, 1) for client in norms}
    by_step = {client: norm / steps[client] for client, norm in norms.items()}
    median = statistics.median_low(by_step.values())
    limit = rules.norm_factor * median
    return [
        Dropped(
            client=client,
            reason=f"its change has norm {norms[client]:.3g} after {steps[client]} steps, {norm:.3g} per step. That is "
            f"over {rules.norm_factor:g} times the cohort's median {median:.3g} (server.max_norm_ratio)",
        )
        for client, norm in by_step.items()
        if norm > limit > 0
    ]


def _some(what: str, names: set[str]) -> list[str]:
    shown = ", ".join(f"{name!r:.80}" for name in sorted(names)[:3])
    return [f"{what} {shown}{' and more' if len(names) > 3 else ''}"] if names else []
