"""The interface of a channel, which carries messages between the server and the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fedsb.protocol.messages import Reply, Request

OFFLINE = "gone: offline"  # the start of a reason: the client is offline and may return


class NoResponse(NamedTuple):
    """A client that did not answer: late, offline, refused or failed."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ChannelSpec:
    """The capabilities of a channel. A configuration that needs others is refused, and the error names them."""

    name: str
    holds_rows: bool  # all clients' rows are in this process: pooled data, scores of clients' own models in each round


class Channel(Protocol):
    """Carries typed requests to the clients and brings back their replies."""

    @property
    def spec(self) -> ChannelSpec: ...

    @property
    def clients(self) -> Sequence[str]:
        """The names of all clients, sorted."""
        ...

    def exchange(
        self, requests: Mapping[str, Request[Any]], timeout_s: float | None = None
    ) -> Iterator[tuple[str, Reply | NoResponse]]:
        """Yields replies as they come in, each client once; NoResponse for those that did not answer in time."""
        ...


class Transport(Protocol):
    """Carries bytes to sites and brings back theirs, without reading them."""

    @property
    def sites(self) -> Sequence[str]:
        """The names of all registered sites, sorted."""
        ...

    def ask(
        self, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        """Yields answers as they come in, each site once; NoResponse for those that did not answer in time."""
        ...


# How a site answers a request. A UserError or RunError that it raises goes back as NoResponse, with its text where that
# may leave the site (utils/errors.py).
Handle = Callable[[bytes], bytes]
