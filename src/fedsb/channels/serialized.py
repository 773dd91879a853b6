"""The channel to sites elsewhere: messages become bytes, which a transport (Flower, NVIDIA FLARE) carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsb.protocol.channel import ChannelSpec, NoResponse, Transport
from fedsb.protocol.messages import Reply, Request, read_reply
from fedsb.protocol.payload import PayloadError


class SerializedChannel:
    """A `Channel` over a transport of bytes. A reply that is not valid counts as no response."""

    def __init__(self, transport: Transport, name: str) -> None:
        self._transport = transport
        self.spec = ChannelSpec(name=name, holds_rows=False)

    @property
    def clients(self) -> Sequence[str]:
        return self._transport.sites

    def exchange(
        self, requests: Mapping[str, Request[Any]], timeout_s: float | None = None
    ) -> Iterator[tuple[str, Reply | NoResponse]]:
        packed: dict[int, bytes] = {}  # clients that receive the same request share its bytes
        data = {name: packed.setdefault(id(request), request.pack()) for name, request in requests.items()}
        for name, answer in self._transport.ask(data, timeout_s):
            try:
                yield name, answer if isinstance(answer, NoResponse) else read_reply(answer, requests[name])
            except PayloadError as error:
                yield name, NoResponse(str(error))
