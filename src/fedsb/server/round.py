"""The requests of one round, and the clients' answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsb.client.round import ClientRound, ClientView
from fedsb.methods.base import State
from fedsb.protocol.channel import NoResponse
from fedsb.protocol.messages import Stale, Train, TrainReply
from fedsb.protocol.payload import PayloadError, unpack
from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.exchange import reason_of
from fedsb.server.replies import ClientReply, Replies
from fedsb.server.validation import Dropped
from fedsb.utils.environment import versions

if TYPE_CHECKING:
    from fedsb.server.server import Server


@dataclass(frozen=True)
class ClientAnswer:
    """A client's answer in a round, and the traffic to the client."""

    client: str
    reply: TrainReply | Stale | NoResponse
    traffic: Sequence[TrafficRecord]


class ServerRound:
    """The requests of one round, and the answers to them."""

    def __init__(self, server: Server, state: State, view: State, *, missed: frozenset[str], score: bool) -> None:
        self.server, self.state, self.view, self.missed, self.score = server, state, view, missed, score
        self.ranks = {**server.ranks, **state.total_ranks}
        self.shared_hash = server.shared_state.hash(view.shared)
        self._payloads: dict[tuple[bool, int | None], bytes] = {}
        self._requests: dict[tuple[bool, int | None, int], Train] = {}

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

    def summed(
        self, answers: Iterable[ClientAnswer], cohort: Sequence[str], replies: Replies, in_sum: list[str]
    ) -> Iterator[tuple[str, bytes]]:
        """Yields the sum of the cohort's updates, as one; `in_sum` are then the clients in it."""
        from fedsb.protocol.secure_sum import SUM
        from fedsb.server.secure_sum import add_up

        server = self.server
        trained = [reply for answer in answers if (reply := self._checked(answer, replies)) is not None]
        message = unpack(self.payload(whole=False, rank=None)).tensors
        if server.compressor.codec != "float32":
            raise AssertionError("refused at the start: secure aggregation with a codec")
        shared = ClientRound(server.method, ClientView(self.view.shared), message, self.state.round, self.shared_hash)
        assert server.secure_sums is not None
        keys = {name: server.opened.directory[name] for name in cohort}
        terms = server.secure_sums.terms(self.state.round, self.shared_hash, keys, shared.against)
        found = add_up(server.exchange, terms, shared, trained, server.counter)
        replies.dropped += found.dropped
        for reply in found.survivors:
            replies.add(reply)
            in_sum.append(reply.client)
        yield SUM, found.payload

    def _ask(self, clients: Sequence[str], *, whole: bool) -> Iterator[ClientAnswer]:
        server, round = self.server, self.state.round + 1
        requests = {name: self._request(name, whole=whole or name in self.missed) for name in clients}
        traffic = {
            name: server.counter.record(request.payload, round, name, "down", wire_bytes=request.wire_bytes)
            for name, request in requests.items()
        }
        for name, reply in server.exchange.each(requests, what=f"Round {round}"):
            yield ClientAnswer(name, reply, [traffic[name]])

    def _request(self, name: str, *, whole: bool) -> Train:
        """Returns the request to a client; clients to whom the same is said share one object, packed once."""
        rank, state_round = self.ranks.get(name), self.state.accepted.get(name, 0)
        key = whole, rank, state_round
        if key not in self._requests:
            self._requests[key] = Train(
                run=self.server.run,
                total_rank=rank,
                state_round=state_round,
                score=self.score,
                versions=versions(),
                parts=(self.payload(whole=whole, rank=rank),),
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
            if (server.secure_sums is None) != len(reply.parts):
                raise PayloadError(f"sent {len(reply.parts)} updates")
            server.copy_ledger(answer.client, reply.entries)
            up = [
                server.counter.record(part, self.state.round + 1, answer.client, "up", wire_bytes=reply.wire_bytes)
                for part in reply.parts
            ]
        except PayloadError as error:
            replies.dropped.append(Dropped(client=answer.client, reason=str(error)))
            if isinstance(reply, TrainReply):  # it received the broadcast
                replies.traffic += answer.traffic
            return None
        travels = not server.method.spec.pools_data
        return ClientReply(
            client=answer.client,
            payload=reply.parts[0] if reply.parts else None,
            loss=reply.loss,
            score=reply.score,
            traffic=[*answer.traffic, *up] if travels else [],
        )
