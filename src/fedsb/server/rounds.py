"""One round, whatever runs the clients: broadcast, local training, upload, the doorkeeper, aggregation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from fedsb.adapters.adapted import Tensors
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import State
from fedsb.protocol.compressor import build_compressor
from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.spool import Spool
from fedsb.server.types import Engine, Replies
from fedsb.server.validation import Dropped, rules, validate_updates


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What came of a round."""

    state: State
    replies: Replies  # taken
    dropped: Sequence[Dropped]

    @property
    def kept(self) -> dict[str, Tensors]:
        """What clients keep to themselves; one that was dropped keeps what it had before."""
        out = {drop.client for drop in self.dropped}
        return {client: own for client, own in self.replies.kept.items() if client not in out}


def renew(engine: Engine, state: State) -> tuple[State, list[TrafficRecord]]:
    """The state with a new basis, made where the run has come to, and what travelled for it; clients forget theirs."""
    basis, sent = engine.build_basis(engine.method, state)
    assert basis is not None
    return engine.method.refresh(state, engine.shapes, basis, engine.config.seed), list(sent)


def play(
    engine: Engine,
    state: State,
    cohort: Sequence[str],
    late: Set[str],
    kept: Mapping[str, Tensors],  # the clients' own states, theirs alone
    server: ServerOptimizer,
    *,
    min_clients: int | None = None,  # default: as configured
    spool: Spool | None = None,
) -> RoundResult:
    """The round that starts at `state`. Raises RunError where fewer than `min_clients` updates are good."""
    config, method = engine.config, engine.method
    if config.server.secure_aggregation:
        min_clients = 1  # the sum; how many must be in it, the sum itself sees to
    link = build_compressor(config, method, engine.run)
    heard = link.heard(method, state)  # what the sites start from
    replies = engine.train(method, state, cohort, kept, late)
    wanted = rules(
        method,
        heard,
        config.server if min_clients is None else config.server.model_copy(update={"min_clients": min_clients}),
        engine.run,
        engine.ranks,
        judge_norms=config.privacy.unit != "client",
        rows={site.name: site.rows for site in engine.sites},
        steps={site.name: engine.local.steps_for(site.rows) for site in engine.sites},
    )
    updates, dropped = validate_updates(replies.envelopes, wanted, spool, replies.dropped)
    after = method.aggregate(heard, engine.policy.add_noise(updates, state.round), server)
    return RoundResult(
        state=link.settled(method, state, heard, after), replies=replies, dropped=[*replies.dropped, *dropped]
    )
