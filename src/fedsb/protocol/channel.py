"""What carries the messages of a real federation, and knows nothing of what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

OFFLINE = "gone: offline"  # how the reason of a site begins that is not there, and may yet come


class NoResponse(NamedTuple):
    """A site that did not answer: late, gone, refused, failed."""

    reason: str


class Channel(Protocol):
    """Carries requests to sites and brings back what they answer."""

    @property
    def sites(self) -> Sequence[str]:
        """Names of all registered sites, sorted."""
        ...

    def ask(
        self, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        """As answers come in, each site once; NoResponse for those that did not within the time."""
        ...


# What a site does with a request; a raised UserError or RunError (fedsb/errors.py) goes back as NoResponse, with its
# words
# where they may leave the site.
Handle = Callable[[bytes], bytes]
