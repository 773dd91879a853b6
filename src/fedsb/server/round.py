"""The requests of one round, and the clients' answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedsb.adapters.layout import Layout
from fedsb.client.round import ClientRound, ClientView
from fedsb.methods.base import State
from fedsb.privacy.shared import sends_moments
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import NoKeys, Stale, SumRequest, Train, TrainReply
from fedsb.protocol.payload import PayloadError
from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.exchange import reason_of
from fedsb.server.replies import ClientReply, Replies
from fedsb.server.validation import Dropped
from fedsb.utils.environment import versions

if TYPE_CHECKING:
    from fedsb.protocol.secure_sum import SecureSums, SumTerms
    from fedsb.secagg.messages import SumPlan
    from fedsb.server.exchange import Exchange
    from fedsb.server.secure_sum import SecAggServer, Summed
    from fedsb.server.server import Server


SUM_TRIES = 3  # of a round whose clients are restarted in it


@dataclass(frozen=True)
class ClientAnswer:
    """A client's answer in a round, and the traffic to the client."""

    client: str
    reply: TrainReply | Stale | NoKeys | NoResponse
    traffic: Sequence[TrafficRecord]


class ServerRound:
    """The requests of one round, and the answers to them."""

    def __init__(self, server: Server, state: State, view: State, *, missed: frozenset[str], score: bool) -> None:
        self.server, self.state, self.view, self.missed, self.score = server, state, view, missed, score
        self.ranks = {**server.ranks, **state.total_ranks}
        self.shared_hash = server.shared_state.hash(view.shared)
        self._payloads: dict[tuple[bool, int | None], bytes] = {}
        self._requests: dict[tuple[object, ...], Train] = {}
        self.sum: SumRequest | None = None
        self.shared: ClientRound | None = None  # what all clients of a secure sum start from
        self._charged: int | None = None  # the number of clients in the sum whose noise was charged

    def payload(self, *, whole: bool, rank: int | None) -> bytes:
        """Returns the broadcast to clients of this rank; those that receive the same share its bytes."""
        key = whole, rank
        if key not in self._payloads:
            self._payloads[key] = self.server.compressor.broadcast(
                self.server.method,
                self.state,
                self.view,
                self.shared_hash,
                missed_last_round=whole,
                total_rank=rank,
            )
        return self._payloads[key]

    def answers(self, cohort: Sequence[str]) -> Iterator[ClientAnswer]:
        """Asks the cohort to train. A client that lost the shared state receives it, and is asked again."""
        caught_up: dict[str, Sequence[TrafficRecord]] = {}
        for answer in self._ask(cohort, whole=False):
            if not isinstance(answer.reply, Stale):
                yield answer
                continue
            sync, round = self.server.shared_state, self.state.round + 1
            residual = bool(self.server.config.basis.refresh)
            sent = sync.catch_up(answer.client, answer.reply, self.view.shared, round, residual=residual)
            if isinstance(sent, NoResponse):
                yield ClientAnswer(answer.client, sent, answer.traffic)
            else:
                caught_up[answer.client] = [*answer.traffic, *sent]
        for answer in self._ask(list(caught_up), whole=True):
            yield ClientAnswer(answer.client, answer.reply, [*caught_up[answer.client], *answer.traffic])

    def each(self, answers: Iterable[ClientAnswer], replies: Replies) -> Iterator[tuple[str, bytes]]:
        """Yields (client, update) as they arrive. None is kept here."""
        for answer in answers:
            if (reply := self._checked(answer, replies)) is not None:
                replies.add(reply)
                assert reply.payload is not None
                yield reply.client, reply.payload

    def summed(self, cohort: Sequence[str], replies: Replies) -> tuple[SumTerms, Summed, ClientRound]:
        """Asks the cohort to train, and returns the sum of what it would send, as the terms define it.

        A sum that fails because a client was restarted is repeated with new keys: every client masks the change that it
        has made. Raises SumError if too few clients stayed.
        """
        from fedsb.secagg.messages import SumError

        secagg = self.server.secagg
        assert secagg is not None
        for _ in range(SUM_TRIES - 1):
            tried = Replies()
            secagg.restarted.clear()
            try:
                found = self._summed(secagg, cohort, tried)
            except SumError:
                if not secagg.restarted:
                    raise
                names = " and ".join(sorted(secagg.restarted))
                self.server.note(f"Round {self.state.round + 1} gets new keys, after a restart of {names}")
            else:
                replies.extend(tried)
                return found
        return self._summed(secagg, cohort, replies)

    def _summed(
        self, secagg: SecAggServer, cohort: Sequence[str], replies: Replies
    ) -> tuple[SumTerms, Summed, ClientRound]:
        from fedsb.secagg.messages import SumError
        from fedsb.server.secure_sum import Masked

        server, round = self.server, self.state.round
        assert server.secure_sums is not None
        keys = secagg.keys(round, cohort)
        without = [name for name in cohort if name not in keys.members]
        replies.dropped += [
            Dropped(client=name, reason=f"has no keys for this sum: {secagg.absent.get(name, 'no reply')}")
            for name in without
        ]
        cohort = [name for name in cohort if name in keys.members]
        message = server.method.broadcast(self.view)
        if server.compressor.codec != "float32":
            raise AssertionError("refused at the start: secure aggregation with a codec")
        shared = ClientRound(server.method, ClientView(self.view.shared), message, round, self.shared_hash)
        if sends_moments(server.config, server.method):
            moments = server.optimizer_step.second_moments(shared, self.state.server)
            shared = replace(shared, second_moments=moments)
        self.shared = shared
        directory = {name: server.opened.directory[name] for name in cohort}
        terms = server.secure_sums.terms(round, self.shared_hash, directory, keys.plan, shared.against)
        layout = Layout.of(shared.trained) if terms.step else shared.layout
        part = server.compressor.part(round)
        places = np.arange(layout.size) if part is None else part.places(layout)
        plan = terms.plan(len(places))  # raises for an impossible sum, before any client is charged for it
        self.sum = SumRequest(attempt=keys.plan.attempt, cohort=cohort)
        trained, masked = list[ClientReply](), list[Masked]()
        for answer in self.answers(cohort):
            if isinstance(answer.reply, NoKeys):
                secagg.restarted.add(answer.client)
            if (reply := self._checked(answer, replies)) is not None and reply.payload is not None:
                assert isinstance(answer.reply, TrainReply)
                trained.append(reply)
                masked.append(Masked(client=reply.client, message=reply.payload, survivors=answer.reply.survivors))
        if len(cohort) != self._charged:  # else a repeated sum, to which the clients add the same noise
            server.secure_sums.charge(terms)
            self._charged = len(cohort)
        try:
            found = secagg.add_up(terms, len(places), masked)
        except SumError as error:
            why = "".join(f"\n  {drop.client}: {drop.reason}" for drop in replies.dropped)
            raise SumError(f"{error}{why}") from error
        values = np.zeros(layout.size)
        values[places] = found.values
        found = replace(found, values=values)
        if without:
            secagg.renew()
        replies.dropped += found.dropped
        for reply in trained:
            if reply.client in found.survivors:
                wire = [secagg.wire_bytes.get(reply.client, (0, 0)), found.wire_bytes[reply.client]]
                replies.add(self._counted(reply, layout, plan, wire))
        secagg.wire_bytes = {}
        return terms, found, shared

    def _counted(
        self, reply: ClientReply, layout: Layout, plan: SumPlan, wire: Sequence[tuple[int, int]]
    ) -> ClientReply:
        """Returns the reply with the traffic of its sum; `wire` are bytes of messages, up and down."""
        assert reply.payload is not None
        up, down = (sum(each) for each in zip(*wire, strict=True))
        masked = TrafficRecord(
            round=self.state.round + 1,
            client=reply.client,
            direction="up",
            kind="round",
            values=plan.size,
            head_values=self.server.counter.head_values(layout, plan.size),
            bytes=plan.grid.packed_bytes(plan.size),
            wire_bytes=len(reply.payload) + up,
        )
        *others, last = reply.traffic
        last = replace(last, wire_bytes=last.wire_bytes + down)
        return replace(reply, payload=None, traffic=[*others, last, masked])

    def _ask(self, clients: Sequence[str], *, whole: bool) -> Iterator[ClientAnswer]:
        server, round = self.server, self.state.round + 1
        requests = {name: self._request(name, whole=whole or name in self.missed) for name in clients}
        traffic = {name: self._records(name, request) for name, request in requests.items()}
        for name, reply in server.exchange.each(requests, what=f"Round {round}"):
            yield ClientAnswer(name, reply, traffic[name])

    def _records(self, name: str, request: Train) -> list[TrafficRecord]:
        """Returns the traffic of a request: the broadcast, and second moments."""
        counter, size = self.server.counter, len(request.second_moments or b"")
        wire = request.wire_bytes - size
        broadcast = counter.record(request.payload, self.state.round + 1, name, "down", wire_bytes=wire)
        if self.shared is None or not size:
            return [broadcast]
        head = counter.head_values(Layout.of(self.shared.trained))
        return [broadcast, replace(broadcast, values=size, head_values=head, bytes=size, wire_bytes=size)]

    def _request(self, name: str, *, whole: bool) -> Train:
        """Returns the request to a client; clients to whom the same is said share one object, packed once."""
        rank, state_round = self.ranks.get(name), self.state.accepted.get(name, 0)
        since = self.server.entries_since(name, self.state.round + 1)
        moments = self.shared.second_moments if self.shared else None
        key = whole, rank, state_round, since, self.sum.attempt if self.sum else None
        if key not in self._requests:
            self._requests[key] = Train(
                run=self.server.run,
                total_rank=rank,
                state_round=state_round,
                score=self.score,
                versions=versions(),
                entries_since=since,
                sum=self.sum,
                parts=(self.payload(whole=whole, rank=rank), *([moments] if moments is not None else [])),
            )
        return self._requests[key]

    def _checked(self, answer: ClientAnswer, replies: Replies) -> ClientReply | None:
        """Returns the reply; None, with the reason in `replies`, for a client that sent nothing to continue with."""
        server, reply = self.server, answer.reply
        try:
            if not isinstance(reply, TrainReply):
                raise PayloadError(reason_of(reply))
            if reply.left is not None:
                raise PayloadError(f"left the sum by itself: {reply.left}")
            if len(reply.parts) != 1:
                raise PayloadError(f"sent {len(reply.parts)} updates")
            since = server.entries_since(answer.client, self.state.round + 1)  # as when it was asked
            server.copy_ledger(answer.client, reply.entries, since)
            up = []
            if self.sum is None:
                count, wire = server.counter.record, reply.wire_bytes
                up = [count(reply.payload, self.state.round + 1, answer.client, "up", wire_bytes=wire)]
        except PayloadError as error:
            replies.dropped.append(Dropped(client=answer.client, reason=str(error)))
            if isinstance(reply, TrainReply):  # it received the broadcast
                replies.traffic += answer.traffic
            return None
        travels = not server.method.spec.pools_data
        return ClientReply(
            client=answer.client,
            payload=reply.payload,
            loss=reply.loss,
            score=reply.score,
            traffic=[*answer.traffic, *up] if travels else [],
        )


def open_secagg(exchange: Exchange, sums: SecureSums | None, directory: Mapping[str, bytes]) -> SecAggServer | None:
    """Returns the server of a run's secure aggregation; None if it is off."""
    if sums is None:
        return None
    from fedsb.server.secure_sum import SecAggServer

    return SecAggServer(exchange, sums, directory)
