"""Replies that a broken or malicious site sends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedsb.adapters.layout import Layout
from fedsb.client.handler import SiteHandler
from fedsb.client.round import ClientView
from fedsb.client.session import StartedClient
from fedsb.protocol.messages import StartReply, read_request
from fedsb.protocol.payload import pack, unpack
from support.sites import Federation


@dataclass(frozen=True)
class RawMessage:
    """A message whose fields nothing has checked."""

    verb: str
    fields: dict[str, Any]
    parts: tuple[bytes, ...] = ()

    @classmethod
    def read(cls, data: bytes) -> RawMessage:
        at = 4 + int.from_bytes(data[:4], "big")
        head = json.loads(data[4:at])
        parts = []
        for size in head["parts"]:
            parts.append(data[at : at + size])
            at += size
        return cls(head["verb"], head["fields"], tuple(parts))

    def pack(self) -> bytes:
        head = {"verb": self.verb, "fields": self.fields, "parts": [len(part) for part in self.parts]}
        header = json.dumps(head).encode()
        return b"".join([len(header).to_bytes(4, "big"), header, *self.parts])


Spoil = Callable[[RawMessage], RawMessage | bytes]


def spoiled(sites: Federation, name: str, verb: str, spoil: Spoil) -> None:
    """From now on the site spoils its replies to requests of this verb."""
    honest = sites.channel.handles[name]

    def handle(request: bytes) -> bytes:
        reply = honest(request)
        if read_request(request).verb != verb:
            return reply
        made = spoil(RawMessage.read(reply))
        return made if isinstance(made, bytes) else made.pack()

    sites.channel.handles[name] = handle


def with_fields(**fields: Any) -> Spoil:
    return lambda message: replace(message, fields={**message.fields, **fields})


def with_parts(*parts: bytes) -> Spoil:
    return lambda message: replace(message, parts=parts)


def with_update(change: Callable[[dict[str, Any]], dict[str, Any]], **header: Any) -> Spoil:
    def spoil(message: RawMessage) -> RawMessage:
        payload = unpack(message.parts[0])
        tensors = change(payload.tensors)
        layout = Layout.of(tensors)
        vector = layout.flatten(tensors).numpy()
        return replace(message, parts=(pack(replace(payload, layout=layout, vector=vector, **header)),))

    return spoil


def nan(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.full_like(x, torch.nan) for key, x in tensors.items()}


def deriving(sites: Federation, name: str, change: float) -> None:
    """The site derives other values, as on other hardware, or because it is malicious."""
    honest = sites.channel.handles[name]
    assert isinstance(honest, SiteHandler)

    def handle(request: bytes) -> bytes:
        reply = honest(request)
        if read_request(request).verb != "start":
            return reply
        assert isinstance(honest.client, StartedClient)
        view = honest.client.store.view(0)
        assert view is not None
        other = ClientView({key: x * (1 + change) for key, x in view.shared.items()})
        honest.client.store.save_start(other, 0)
        return StartReply(shared=other.hash).pack()

    sites.channel.handles[name] = handle
