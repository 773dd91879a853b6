"""The server's part of secure aggregation. Each phase of secagg/protocol.py is a request to the remaining clients."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedsb.adapters.layout import Layout
from fedsb.client.round import ClientRound
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import Reply, SecAggPhase, SecAggPhaseName, SecAggReply
from fedsb.protocol.secure_sum import SumTerms
from fedsb.protocol.traffic import TrafficCounter, TrafficRecord
from fedsb.secagg.messages import MessageError, SumError
from fedsb.secagg.server import SumServer
from fedsb.server.exchange import Exchange, reason_of
from fedsb.server.replies import ClientReply
from fedsb.server.validation import Dropped


@dataclass(frozen=True, kw_only=True)
class Summed:
    """The result of secure aggregation."""

    payload: bytes  # one update in place of all
    survivors: Sequence[ClientReply]  # the clients in it, with what their phases added to the traffic
    dropped: Sequence[Dropped]


def add_up(
    exchange: Exchange,
    terms: SumTerms,
    shared: ClientRound,  # the round as the server computes it for a client
    replies: Sequence[ClientReply],  # of the clients that have trained
    counter: TrafficCounter,
) -> Summed:
    """Runs the phases. Raises SumError if too few clients stayed."""
    plan = terms.plan(shared.layout.size)
    server, trained = SumServer(plan), {reply.client: b"" for reply in replies}
    phases: tuple[tuple[SecAggPhaseName, Callable[[], Mapping[str, bytes]]], ...] = (
        ("advert", lambda: trained),
        ("sealed", server.roster),
        ("masked", server.inboxes),
        ("confirm", server.survivors_lists),
        ("shares", server.confirmations),
    )
    attempt = secrets.token_hex(8)  # a sum begun again is another: a site must not send what it sent in the first
    up, down, failed = dict.fromkeys(trained, 0), dict.fromkeys(trained, 0), dict[str, str]()
    try:
        for phase, messages in phases:
            if phase == "masked" and terms.mechanism is not None:
                terms.mechanism.charge(terms.round + 1)
            for name, sent, reply in _ask(exchange, terms, phase, attempt, messages()):
                down[name] += sent
                try:
                    if not isinstance(reply, SecAggReply):
                        raise MessageError(reason_of(reply))
                    server.receive(name, reply.payload)
                    up[name] += len(reply.payload)
                except MessageError as error:
                    failed[name] = str(error)
        values, weight = plan.grid.decode(server.total())
    except SumError as error:
        why = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise SumError(f"{error}{why}") from error
    survivors = [
        replace(
            reply,
            traffic=[
                *(replace(record, wire_bytes=record.wire_bytes + down[reply.client]) for record in reply.traffic),
                _masked(shared.layout, terms.round + 1, reply.client, counter, up[reply.client]),
            ],
        )
        for reply in replies
        if reply.client in server.survivors
    ]
    return Summed(
        payload=terms.summed(values, weight, shared.baseline_vector, shared.layout),
        survivors=survivors,
        dropped=[Dropped(client=name, reason=why) for name, why in failed.items() if name not in server.survivors],
    )


def _ask(
    exchange: Exchange, terms: SumTerms, phase: SecAggPhaseName, attempt: str, messages: Mapping[str, bytes]
) -> Iterator[tuple[str, int, Reply | NoResponse]]:
    """Yields (client, the bytes sent to it, its reply)."""
    requests = {
        name: SecAggPhase(
            run=exchange.run, phase=phase, attempt=attempt, cohort=sorted(terms.clients), parts=(message,)
        )
        for name, message in messages.items()
    }
    for name, reply in exchange.each(requests, what=f"The secure aggregation of round {terms.round + 1}"):
        yield name, requests[name].wire_bytes, reply


def _masked(layout: Layout, round: int, client: str, counter: TrafficCounter, wire_bytes: int) -> TrafficRecord:
    """Returns the record of a masked update: 4 bytes per value."""
    return TrafficRecord(
        round=round,
        client=client,
        direction="up",
        kind="round",
        values=layout.size,
        head_values=counter.head_values(layout),
        bytes=4 * layout.size,
        wire_bytes=wire_bytes,
    )
