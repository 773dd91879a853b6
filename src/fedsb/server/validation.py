"""Validation: an update is checked before it is averaged, and a bad one is dropped with its reason.

The round continues with the others while at least `min_clients` updates are good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from fedsb.adapters.layout import Layout
from fedsb.config.training import Codec, ServerConfig
from fedsb.methods.base import Method, State, Update
from fedsb.protocol.compressor import baseline_upload, codec_of
from fedsb.protocol.part import Part
from fedsb.protocol.payload import Payload, PayloadError, Vector, unpack
from fedsb.protocol.tensors import norm_l2, rejection_of
from fedsb.server.spool import Spool
from fedsb.utils.errors import RunError

MAX_SAMPLES = 10**9  # rows that one client may claim


@dataclass(frozen=True, kw_only=True)
class UpdateSpec:
    """The tensors of a good update."""

    layout: Layout
    reference: Vector  # what a client sends without training: an update's norm is that of its change
    model: Vector  # (P,) 1 for values of the model, 0 for metadata such as a client's next rank

    @classmethod
    def of(cls, method: Method, state: State, total_rank: int | None) -> UpdateSpec:
        own = method if total_rank is None else method.at(total_rank)
        sent = baseline_upload(own, state.shared, method.broadcast(state, total_rank=total_rank), state.round)
        layout = Layout.of(sent)
        model = layout.mask(frozenset(sent) - method.metadata_keys)
        return cls(layout=layout, reference=layout.flatten(sent).numpy(), model=model.numpy())


@dataclass(frozen=True, kw_only=True)
class UpdateRules:
    """The requirements on an update."""

    run: str
    round: int
    basis: str
    expected: UpdateSpec
    at_rank: Mapping[str, UpdateSpec] = field(default_factory=dict)  # of clients whose rank is not the method's
    codec: Codec = "float32"
    part: Part | None = None
    weighting: Literal["samples", "uniform"] = "samples"
    max_norm_ratio: float = 30.0  # an update whose change per step is this many times the median is dropped
    rows: Mapping[str, int] = field(default_factory=dict)  # of each client, where they are known: what it may claim
    steps: Mapping[str, int] = field(default_factory=dict)  # of each client's local training; 1 where not given
    min_clients: int = 1

    @property
    def change(self) -> bool:
        """Returns whether a change is sent, and not the tensors themselves."""
        return self.codec != "float32" or self.part is not None

    def of(self, client: str) -> UpdateSpec:
        return self.at_rank.get(client, self.expected)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A client whose update does not count in a round."""

    client: str
    reason: str


def update_rules(
    method: Method,
    state: State,
    server: ServerConfig,
    run: str,
    shared_hash: str,
    *,
    ranks: Mapping[str, int] = MappingProxyType({}),  # of clients whose rank differs from the method's
    judge_norms: bool = True,
    rows: Mapping[str, int] | None = None,  # of each client
    steps: Mapping[str, int] | None = None,  # optimiser steps that each client takes in a round
    part: Part | None = None,  # of the values, that is sent in this round
) -> UpdateRules:
    """Returns the rules of the round that starts at `state`.

    `judge_norms` is off if clients' changes are clipped and noised in sum, because whether a client is dropped for its
    norm would depend on the others' rows.
    """
    by_rank = {rank: UpdateSpec.of(method, state, rank) for rank in set(ranks.values())}
    return UpdateRules(
        run=run,
        round=state.round,
        basis=shared_hash,
        expected=UpdateSpec.of(method, state, None),
        at_rank={client: by_rank[rank] for client, rank in ranks.items()},
        codec=codec_of(server, method),
        part=part,
        weighting=server.weighting,
        max_norm_ratio=server.max_norm_ratio if judge_norms else math.inf,
        min_clients=1 if method.spec.pools_data else server.min_clients,
        rows=rows or {},
        steps=steps or {},
    )


def validate_updates(
    payloads: Iterable[tuple[str, bytes]],
    rules: UpdateRules,
    spool: Spool | None = None,
    absent: Sequence[Dropped] = (),
) -> tuple[list[Update], list[Dropped]]:
    """Returns the good updates, and the bad ones with their reasons, from (client, payload) pairs of one round.

    Payloads are read one by one and released; the updates' tensors are views of the spool. `absent` are the clients
    that sent none, known once all the others were read. Raises RunError when fewer than `min_clients` are good.
    """
    spool = spool or Spool()
    norms: dict[str, float] = {}  # of the good ones, in the spool's order
    samples: dict[str, int] = {}
    dropped: list[Dropped] = []
    for client, data in payloads:
        try:
            payload = _decoded(unpack(data), rules.part, rules.of(client))
        except PayloadError as error:
            dropped.append(Dropped(client=client, reason=str(error)))
            continue
        reason = rejection_reason(client, payload, rules)
        if reason is None and client in norms:
            reason = "sent a second update in this round"
        if reason is None:
            norms[client], samples[client] = change_norm_l2(payload, rules.of(client)), payload.samples
            spool.add(payload.layout, payload.vector)
        else:
            dropped.append(Dropped(client=client, reason=reason))
    outliers = _outliers(norms, rules)
    dropped += outliers
    good = norms.keys() - {drop.client for drop in outliers}
    if len(good) < rules.min_clients:
        reasons = "; ".join(f"{drop.client}: {drop.reason}" for drop in [*absent, *dropped]) or "no client replied"
        raise RunError(
            f"Round {rules.round + 1} has {len(good)} good updates, but server.min_clients = {rules.min_clients} "
            f"({reasons}). The checkpoint of the last finished round is kept."
        )
    weights = {client: float(n) if rules.weighting == "samples" else 1.0 for client, n in samples.items()}
    read = dict(zip(norms, spool.read(), strict=True))
    in_order = sorted(good)  # whichever came first: sums of floats depend on their order
    return [Update(client=name, weight=weights[name], tensors=read[name]) for name in in_order], dropped


def _decoded(payload: Payload, part: Part | None, spec: UpdateSpec) -> Payload:
    """Returns the payload with the tensors themselves, also where a change was sent.

    Raises PayloadError for a wrong part.
    """
    if payload.part != part:
        raise PayloadError(f"its part of the values is {payload.part}, this round's is {part}")
    if not payload.change or payload.layout != spec.layout:  # another layout is left to `rejection_reason`
        return payload
    change = payload.whole(spec.layout)
    with np.errstate(over="ignore", invalid="ignore"):  # a stranger's numbers, which `rejection_reason` checks
        return replace(change, vector=change.vector + spec.reference)


def rejection_reason(client: str, payload: Payload, rules: UpdateRules) -> str | None:
    """Returns why this update must not be averaged; None for a good one."""
    claims = (
        ("kind", payload.kind, "update"),
        ("client", payload.client, client),
        ("run", payload.run, rules.run),
        ("round", payload.round + 1, rules.round + 1),  # as users count
        ("basis", payload.basis, rules.basis),
        ("codec", payload.codec, rules.codec),
        ("change", payload.change, rules.change),
    )
    for what, value, expected in claims:
        if value != expected:
            return f"its {what} is {value!r:.80}, this round's is {expected!r}"
    known = rules.rows.get(client)
    if known is not None and payload.samples != known:
        return f"claims {payload.samples!s:.20} samples, but it has {known:,} training rows in this run"
    if not 0 < payload.samples <= MAX_SAMPLES:
        return f"claims {payload.samples!s:.20} samples, allowed are 1 to {MAX_SAMPLES:,}"
    return rejection_of(payload, rules.of(client).layout)


def change_norm_l2(payload: Payload, spec: UpdateSpec) -> float:
    """Returns the L2 norm, over all tensors of the model, of what the client changed."""
    change = (payload.vector.astype(np.float64) - spec.reference) * spec.model
    return norm_l2(change)


def _outliers(norms: Mapping[str, float], rules: UpdateRules) -> list[Dropped]:
    """Returns the clients whose change per step is far above the cohort's median.

    A change grows with the number of steps, and with `train.local_epochs` a client with more rows takes more of them.
    """
    if len(norms) < 2:
        return []
    steps = {client: rules.steps.get(client, 1) for client in norms}
    by_step = {client: norm / steps[client] for client, norm in norms.items()}
    median = statistics.median_low(by_step.values())
    limit = rules.max_norm_ratio * median
    return [
        Dropped(
            client=client,
            reason=f"its change has norm {norms[client]:.3g} after {steps[client]} steps, {norm:.3g} per step. That is "
            f"over {rules.max_norm_ratio:g} times the cohort's median {median:.3g} (server.max_norm_ratio)",
        )
        for client, norm in by_step.items()
        if norm > limit > 0
    ]
