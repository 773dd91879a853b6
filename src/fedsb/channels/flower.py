"""The channel over Flower. It sends requests to sites, and repeats a request whose answer may be lost.

Flower delivers a message once, and forgets it when the node that received it dies. So the channel sends a request
again, with the same bytes, if the site's node was activated after the request was sent, or if its answer cannot be
fetched. The site recognises a request by its hash and sends the stored answer. A site is identified by the node key
that signs its messages. Its name comes from the site registry, not from the messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, Queue

import httpx
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from fedsb.channels.flower_wire import KIND, pack, unpack
from fedsb.protocol.channel import OFFLINE, NoResponse
from fedsb.utils.errors import RunError, UserError, did_you_mean

OFFLINE_SECONDS = 300.0  # how long a site may be offline before its request is given up
MESSAGE_LIFE_SECONDS = 30 * 86400.0  # of a message in Flower, without a time limit
CLOCK_SECONDS = 600.0  # added to a message's life, because Flower compares it with the site's clock
MAX_FETCHES = 3  # failed attempts to fetch an answer
NODES_SECONDS = 1.0  # between two queries for the online nodes

NodeKeys = Mapping[str, bytes | None]  # site name -> node key; None for a revoked site
Log = Callable[..., None]  # log(event, **facts)


class GridChannel:
    """A `Channel` over a grid of Flower. `node_keys` returns the current sites of the federation."""

    def __init__(
        self, grid: Grid, node_keys: Callable[[], NodeKeys], log: Log, offline_s: float = OFFLINE_SECONDS
    ) -> None:
        self._grid, self._node_keys, self._log, self._offline_s = grid, node_keys, log, offline_s
        self._lock = threading.Lock()
        self._nodes: dict[bytes, NodeInfo] = {}
        self._nodes_at = 0.0
        self._expired: set[str] = set()  # messages whose answers are no longer needed

    @property
    def sites(self) -> Sequence[str]:
        return sorted(name for name, key in self._node_keys().items() if key is not None)

    def ask(
        self, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        """Sends the requests when iteration starts. Raises UserError for an unknown site."""
        keys = self._node_keys()  # a revoked site gives NoResponse, and the run continues
        for name in requests:
            if name not in keys:
                raise UserError(f"This federation has no site {name!r}; {did_you_mean(name, keys)}")
        return self._answers(dict(requests), keys, timeout_s)

    def _answers(
        self, requests: dict[str, bytes], keys: NodeKeys, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        answers: Queue[tuple[str, bytes | NoResponse | httpx.TransportError]] = Queue()
        stop = threading.Event()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        waiting = set(requests)
        for name, request in requests.items():
            threading.Thread(target=self._ask, args=(name, request, end, stop, answers), daemon=True).start()
        threading.Thread(target=self._discard_expired, daemon=True).start()
        try:
            while waiting:
                try:
                    name, answer = answers.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
                except Empty:
                    break
                if isinstance(answer, httpx.TransportError):  # the SuperLink died: this process restarts with it
                    raise answer
                waiting.discard(name)
                yield name, answer
            for name in sorted(waiting):
                how = "late: no answer" if keys[name] in self._nodes else OFFLINE
                yield name, NoResponse(f"{how} within {timeout_s:g} s")
        finally:
            stop.set()

    def _ask(
        self,
        name: str,
        request: bytes,
        end: float | None,
        stop: threading.Event,
        answers: Queue[tuple[str, bytes | NoResponse | httpx.TransportError]],
    ) -> None:
        answer: bytes | NoResponse | None
        try:
            answer = self._until_answered(name, request, end, stop)
        except httpx.TransportError as error:
            self._log("the SuperLink is unreachable", reason=repr(error))
            answers.put((name, error))
            return
        except Exception as error:  # the other sites are not affected
            self._log("asking failed", site=name, reason=repr(error))
            answer = NoResponse(f"failed: {type(error).__name__} while sending the request")
        if answer is not None:
            self._log("lost" if isinstance(answer, NoResponse) else "answered", site=name, answer=_described(answer))
            answers.put((name, answer))

    def _until_answered(
        self, name: str, request: bytes, end: float | None, stop: threading.Event
    ) -> bytes | NoResponse | None:
        """Returns the answer; None if it is no longer needed."""
        sent = _SentRequest()
        started = online_at = time.monotonic()
        while not stop.is_set():
            now = time.monotonic()
            key = self._node_keys().get(name)
            if key is None:
                return NoResponse("gone: the site was revoked")
            if (node := self._node(key)) is not None:
                online_at = now
                if sent.activated_at != node.last_activated_at:
                    sent.ids.append(self._send(node, request, MESSAGE_LIFE_SECONDS if end is None else end - now))
                    sent.activated_at = node.last_activated_at
                    self._log("asked", site=name, bytes=len(request), time_number=len(sent.ids))
                if (answer := self._fetch(sent)) is not None:
                    self._expired.update(sent.ids)  # the other messages of a repeated request
                    return answer
                if sent.failures >= MAX_FETCHES:
                    return NoResponse(f"failed: the answer could not be fetched in {MAX_FETCHES} attempts")
            elif now - online_at > self._offline_s:
                return NoResponse(f"{OFFLINE} for {self._offline_s:g} s")
            stop.wait(min(3.0, max(0.05, (now - started) / 20)))  # notices an answer after a minute within 3 s
        self._expired.update(sent.ids)
        return None

    def _send(self, node: NodeInfo, request: bytes, life_s: float) -> str:
        """Sends a request and returns the message's id. Flower does not deliver a message after its life."""
        message = Message(pack(request), node.node_id, KIND, ttl=max(life_s, 0.0) + CLOCK_SECONDS)
        (sent,) = self._grid.push_messages([message])
        if not sent:
            raise RunError("Flower did not accept the request. Check that the run is still open.")
        return str(sent)

    def _discard_expired(self) -> None:
        """Removes answers that came too late from Flower's memory."""
        for sent in list(self._expired):
            try:
                arrived = bool(list(self._grid.pull_messages([sent])))
            except Exception:  # there is no answer to remove
                arrived = True
            if arrived:
                self._expired.discard(sent)

    def _fetch(self, sent: _SentRequest) -> bytes | NoResponse | None:
        try:
            for reply in self._grid.pull_messages(sent.ids):
                if reply.has_content():
                    sent.ids.remove(reply.metadata.reply_to_message_id)
                    return unpack(reply.content)
                if reply.error.code == ErrorCode.NODE_UNAVAILABLE:  # went offline after the last query
                    self._nodes_at, sent.activated_at = 0.0, ""
                    sent.ids.clear()
                    return None
                raise RunError(reply.error.reason)  # an answer that Flower cannot deliver
        except (httpx.HTTPStatusError, ObjectPullError, ValueError, RunError) as error:
            self._log("answer not available", reason=str(error))
            sent.failures, sent.activated_at = sent.failures + 1, ""  # sends the request again
            sent.ids.clear()
        return None

    def _node(self, key: bytes) -> NodeInfo | None:
        """Returns the site's node; None if it is offline."""
        with self._lock:
            if time.monotonic() - self._nodes_at > NODES_SECONDS:
                self._nodes = {node.public_key: node for node in self._grid.get_nodes()}
                self._nodes_at = time.monotonic()
            return self._nodes.get(key)


@dataclass(kw_only=True)
class _SentRequest:
    """The messages sent to a site for one request, and when its node had been activated."""

    ids: list[str] = field(default_factory=list)
    activated_at: str = ""
    failures: int = 0


def _described(answer: bytes | NoResponse) -> str:
    return answer.reason if isinstance(answer, NoResponse) else f"{len(answer)} bytes"
