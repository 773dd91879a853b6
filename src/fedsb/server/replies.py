"""Totals over a cohort's replies, updated as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.validation import Dropped


@dataclass(frozen=True, kw_only=True)
class ClientReply:
    """A client's reply in a round, its payload not yet checked."""

    client: str
    payload: bytes | None  # None in a secure sum
    loss: float | None  # the mean training loss; None where it stays private
    score: float | None  # of its trained model on its held-out rows
    traffic: Sequence[TrafficRecord]


@dataclass
class Replies:
    """Everything in a cohort's replies except the updates."""

    losses: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    traffic: list[TrafficRecord] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)  # who left the sum, or did not reply

    def extend(self, other: Replies) -> None:
        self.losses |= other.losses
        self.scores |= other.scores
        self.traffic += other.traffic
        self.dropped += other.dropped

    def add(self, reply: ClientReply) -> None:
        if reply.loss is not None:
            self.losses[reply.client] = reply.loss
        if reply.score is not None:
            self.scores[reply.client] = reply.score
        self.traffic += reply.traffic
