"""Counts of traffic per message: values, their bytes, and bytes on the wire."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from fedsb.adapters.layout import Layout
from fedsb.protocol.payload import measure

Direction = Literal["up", "down"]
Kind = Literal["round", "basis"]


@dataclass(frozen=True, kw_only=True)
class TrafficRecord:
    """One message to or from one client."""

    round: int  # counted from 1; 0 is before the first round
    client: str
    direction: Direction
    kind: Kind
    values: int
    head_values: int
    bytes: int  # of the values, as their codec encodes them
    wire_bytes: int  # of the whole message


@dataclass(frozen=True)
class TrafficCounter:
    """Counts the payloads of a run; `head` names the tensors of the task head."""

    head: Collection[str]

    def record(
        self, payload: bytes, round: int, client: str, direction: Direction, *, kind: Kind = "round", wire_bytes: int
    ) -> TrafficRecord:
        layout, values, size = measure(payload)
        return TrafficRecord(
            round=round,
            client=client,
            direction=direction,
            kind=kind,
            values=values,
            head_values=self.head_values(layout, values),
            bytes=size,
            wire_bytes=wire_bytes,
        )

    def head_values(self, layout: Layout, values: int | None = None) -> int:
        """Returns how many of the values belong to the task head; of `values` that are sent, in proportion."""
        head = sum(size for (key, _), size in zip(layout.shapes, layout.sizes, strict=True) if key in self.head)
        return head if values is None else round(head * values / max(layout.size, 1))
