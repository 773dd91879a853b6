"""One message as it is counted: values, bytes, and bytes on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down"]


@dataclass(frozen=True, kw_only=True)
class TrafficRecord:
    """One message of one client, as counted."""

    round: int  # as users count: 1 is the first; 0 is before it
    client: str
    direction: Direction
    kind: Literal["round", "basis"]
    values: int
    head_values: int
    bytes: int  # of the values, as their codec makes them
    wire_bytes: int  # with the envelope
