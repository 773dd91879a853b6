"""The channel over Flower: asks sites, asks again where an answer may have got lost, gives up in time.

Flower delivers a message once, and forgets it when the node that took it dies. So the channel asks again, with the same
bytes, when a site has come back since it was asked (its node was activated anew) or when an answer cannot be fetched;
the site's trainer knows a request by its hash and sends the stored answer. A site is known by the node key that it
signs with: its name is looked up in the coordinator's register, not taken from what it sends.
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
from fedsb.deployment.federation import Federation, SiteEntry
from fedsb.deployment.logs import say
from fedsb.protocol.channel import OFFLINE, NoResponse
from fedsb.utils.errors import RunError, UserError, did_you_mean

PATIENCE_SECONDS = 300.0  # for a site that is offline to come back
LIFE_SECONDS = 30 * 86400.0  # of a message in Flower, where no time is set
CLOCKS_SECONDS = 600.0  # and beyond the time that is set: a site's clock may differ, and Flower compares the two
FETCHES = 3  # times that an answer may turn out not to be there
NODES_SECONDS = 1.0


class GridChannel:
    """A `Channel` over a grid of Flower."""

    def __init__(self, grid: Grid, register: Callable[[], Federation], patience_s: float = PATIENCE_SECONDS) -> None:
        self._grid, self._register, self._patience_s = grid, register, patience_s
        self._lock = threading.Lock()
        self._nodes: dict[bytes, NodeInfo] = {}
        self._seen = 0.0
        self._late: set[str] = set()  # messages that nobody waits for any longer

    @property
    def sites(self) -> Sequence[str]:
        return list(self._register().members)

    def ask(
        self, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        """Asks once iteration begins. Raises UserError for a name that is no site's."""
        sites = self._register().sites  # one that was revoked since the run began is NoResponse, and the run goes on
        for name in requests:
            if name not in sites:
                raise UserError(f"there is no site {name!r} in this federation; {did_you_mean(name, sites)}")
        return self._answers(dict(requests), sites, timeout_s)

    def _answers(
        self, requests: dict[str, bytes], members: Mapping[str, SiteEntry], timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        answers: Queue[tuple[str, bytes | NoResponse | httpx.TransportError]] = Queue()
        stop = threading.Event()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        waiting = set(requests)
        for name, request in requests.items():
            threading.Thread(target=self._ask, args=(name, request, end, stop, answers), daemon=True).start()
        threading.Thread(target=self._forget_late, daemon=True).start()
        try:
            while waiting:
                try:
                    name, answer = answers.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
                except Empty:
                    break
                if isinstance(answer, httpx.TransportError):  # no site's fault: this process starts anew with the link
                    raise answer
                waiting.discard(name)
                yield name, answer
            for name in sorted(waiting):
                how = "late: no answer" if members[name].node_key.encode() in self._nodes else "gone: offline"
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
            say("the SuperLink is gone", reason=repr(error))
            answers.put((name, error))
            return
        except Exception as error:  # whatever it is, the others go on
            say("asking failed", site=name, reason=repr(error))
            answer = NoResponse(f"failed: {type(error).__name__} while asking")
        if answer is not None:
            say("lost" if isinstance(answer, NoResponse) else "answered", site=name, answer=_words(answer))
            answers.put((name, answer))

    def _until_answered(
        self, name: str, request: bytes, end: float | None, stop: threading.Event
    ) -> bytes | NoResponse | None:
        """None where nobody waits any longer."""
        asked = _Asked()
        begun = there = time.monotonic()
        while not stop.is_set():
            now = time.monotonic()
            site = self._register().members.get(name)
            if site is None:
                return NoResponse("gone: the site was revoked")
            if (node := self._node(site.node_key.encode())) is not None:
                there = now
                if asked.since != node.last_activated_at:
                    asked.ids.append(self._send(node, request, LIFE_SECONDS if end is None else end - now))
                    asked.since = node.last_activated_at
                    say("asked", site=name, bytes=len(request), time_number=len(asked.ids))
                if (answer := self._fetch(asked)) is not None:
                    self._late.update(asked.ids)  # of a site that was asked twice
                    return answer
                if asked.failures >= FETCHES:
                    return NoResponse(f"failed: its answer did not arrive, {FETCHES} times")
            elif now - there > self._patience_s:
                return NoResponse(f"{OFFLINE} for {self._patience_s:g} s")
            stop.wait(min(3.0, max(0.05, (now - begun) / 20)))  # an answer of a minute is seen at most 3 s late
        self._late.update(asked.ids)
        return None

    def _send(self, node: NodeInfo, request: bytes, life_s: float) -> str:
        """Its id; a message that is not fetched within its life is not handed out any more."""
        message = Message(pack(request), node.node_id, KIND, ttl=max(life_s, 0.0) + CLOCKS_SECONDS)
        (sent,) = self._grid.push_messages([message])
        if not sent:
            raise RunError("Flower did not take the request: is the run still open?")
        return str(sent)

    def _forget_late(self) -> None:
        """Takes answers that came too late out of Flower's memory."""
        for sent in list(self._late):
            try:
                come = bool(list(self._grid.pull_messages([sent])))
            except Exception:  # there is nothing to take out
                come = True
            if come:
                self._late.discard(sent)

    def _fetch(self, asked: _Asked) -> bytes | NoResponse | None:
        try:
            for reply in self._grid.pull_messages(asked.ids):
                if reply.has_content():
                    asked.ids.remove(reply.metadata.reply_to_message_id)
                    return unpack(reply.content)
                if reply.error.code == ErrorCode.NODE_UNAVAILABLE:  # away since we looked: no fault of an answer
                    self._seen, asked.since = 0.0, ""
                    asked.ids.clear()
                    return None
                raise RunError(reply.error.reason)  # Flower's own word for an answer that it cannot give
        except (httpx.HTTPStatusError, ObjectPullError, ValueError, RunError) as error:
            say("answer not there", reason=str(error))
            asked.failures, asked.since = asked.failures + 1, ""  # asks again
            asked.ids.clear()
        return None

    def _node(self, key: bytes) -> NodeInfo | None:
        """The site's node, if it is online."""
        with self._lock:
            if time.monotonic() - self._seen > NODES_SECONDS:
                self._nodes = {node.public_key: node for node in self._grid.get_nodes()}
                self._seen = time.monotonic()
            return self._nodes.get(key)


@dataclass(kw_only=True)
class _Asked:
    """What was sent to a site, and since when it had been there."""

    ids: list[str] = field(default_factory=list)
    since: str = ""
    failures: int = 0


def _words(answer: bytes | NoResponse) -> str:
    return answer.reason if isinstance(answer, NoResponse) else f"{len(answer)} bytes"
