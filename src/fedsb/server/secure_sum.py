"""A secure sum of sites that are elsewhere: each phase of privacy/secure_sum.py is a request to all still in it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fedsb.client.round import ClientRound
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import Phase
from fedsb.protocol.secure_sum import Terms
from fedsb.protocol.traffic import TrafficRecord
from fedsb.secagg.protocol import MessageError, SumError, SumServer
from fedsb.server.types import Answer, Reply
from fedsb.server.validation import Dropped


class Ask(Protocol):
    """Sends each client its message of a phase; gives back (client, bytes that went there, answer) as they come."""

    def __call__(
        self, messages: Mapping[str, bytes], **facts: Any
    ) -> Iterator[tuple[str, int, Phase | NoResponse]]: ...


def add_up(
    terms: Terms, turn: ClientRound, head: Sequence[str], replies: Sequence[Reply], ask: Ask
) -> Iterator[Answer]:
    """Those who stayed, those who did not, and the sum. Raises SumError where too few stayed.

    `replies` are of the clients that have trained; `head` names the head's tensors.
    """
    plan = terms.plan(sum(x.numel() for x in turn.unmoved.values()))
    server, trained = SumServer(plan), {reply.client: b"" for reply in replies}
    phases: tuple[tuple[str, Callable[[], Mapping[str, bytes]]], ...] = (
        ("advert", lambda: trained),
        ("sealed", server.roster),
        ("masked", server.inboxes),
        ("confirm", server.survivors_lists),
        ("shares", server.confirmations),
    )
    attempt = secrets.token_hex(8)  # a sum begun again is another: a site must not send what it sent in the first
    up, down = dict.fromkeys(trained, 0), dict.fromkeys(trained, 0)
    failed: dict[str, str] = {}
    try:
        for phase, messages in phases:
            if phase == "masked" and terms.mechanism is not None:
                terms.mechanism.charge(terms.round + 1)
            for name, size, answer in ask(messages(), attempt=attempt, phase=phase, cohort=sorted(terms.sites)):
                down[name] += size
                try:
                    if isinstance(answer, NoResponse):
                        raise MessageError(answer.reason)
                    server.receive(name, answer.parts[0])
                    up[name] += len(answer.parts[0])
                except MessageError as error:
                    failed[name] = str(error)
        values, weight = plan.grid.decode(server.total())
    except SumError as error:
        why = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise SumError(f"{error}{why}") from error
    yield from (Dropped(client=name, reason=why) for name, why in failed.items() if name not in server.survivors)
    for reply in replies:
        if reply.client in server.survivors:
            told = [replace(sent, wire_bytes=sent.wire_bytes + down[reply.client]) for sent in reply.sent]
            put_in = TrafficRecord(
                round=turn.round + 1,
                client=reply.client,
                direction="up",
                kind="round",
                values=plan.size,
                head_values=sum(turn.unmoved[key].numel() for key in head),
                bytes=4 * plan.size,
                wire_bytes=up[reply.client],
            )
            yield replace(reply, sent=[*told, put_in])
    yield terms.summed(values, weight, turn.unmoved)
