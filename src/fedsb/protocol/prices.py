"""The bytes that a run will send, with its method and with others: one-off, up, down and total.

All figures are for the whole federation and all rounds, in the run's codec, without the headers of payloads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedsb.config.registry import method_types
from fedsb.config.training import Codec
from fedsb.methods.base import Method
from fedsb.protocol.codec import payload_bytes
from fedsb.utils.tensors import Shapes

LORA_RANKS, CORE_RANKS = (4, 1), (32, 8)  # that other methods are priced at


@dataclass(frozen=True, kw_only=True)
class Price:
    """The bytes of a whole run. `total_bytes_without_head` leaves the task head out."""

    label: str
    this_run: bool
    one_off_bytes: int
    up_bytes: int
    down_bytes: int
    total_bytes: int
    total_bytes_without_head: int
    up_values: int  # of one client in one round, the head's aside; in a round that follows another
    down_values: int
    head_values: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def price(
    method: Method,
    shapes: Shapes,
    *,
    head: int,
    clients: int,  # in each round
    rounds: int,
    basis: Mapping[str, int] | None = None,  # values "up" and "down" of the basis, a client's
    sites: int = 0,  # that receive the basis
    refreshes: int = 0,  # of the basis: every site receives the current adapter, then the new basis
    codec: Codec = "float32",
    whole: Sequence[int] = (),  # of each round's broadcasts, those that the codec leaves in float32; none said: none
    label: str | None = None,
    this_run: bool = False,
) -> Price:
    """Returns the price of one method. The head's part of a message is in proportion to its number of values."""
    typical = method.traffic(shapes, head=head, clients=clients)
    each = [method.traffic(shapes, head=head, clients=clients, round=round) for round in range(rounds)]
    bill = sum(payload_bytes(codec, values) for values in (basis or {}).values())
    adapter_bytes = payload_bytes("float32", each[0].down + each[0].head)
    one_off = sites * (payload_bytes("float32", each[0].one_off) + bill + refreshes * (bill + adapter_bytes))
    up, down, heads = 0, 0, sites * refreshes * payload_bytes("float32", each[0].head)
    for round, traffic in enumerate(each):
        plain = clients if method.spec.changes_base else whole[round] if whole else 0
        up_bytes, up_head = _message(codec, traffic.up, traffic.head)
        down_bytes, down_head = _message(codec, traffic.down, traffic.head)
        plain_bytes, plain_head = _message("float32", traffic.down, traffic.head)
        up += clients * up_bytes
        down += (clients - plain) * down_bytes + plain * plain_bytes
        heads += clients * up_head + (clients - plain) * down_head + plain * plain_head
    return Price(
        label=label or f"{method.spec.id} (rank {method.rank})",
        this_run=this_run,
        one_off_bytes=one_off,
        up_bytes=up,
        down_bytes=down,
        total_bytes=one_off + up + down,
        total_bytes_without_head=one_off + up + down - heads,
        up_values=typical.up,
        down_values=typical.down,
        head_values=typical.head,
    )


def _message(codec: Codec, values: int, head: int) -> tuple[int, int]:
    """Returns (the bytes of one message, the head's part of them)."""
    size = payload_bytes(codec, values + head)
    return size, round(size * head / max(values + head, 1))


def price_list(
    method: Method,
    shapes: Shapes,
    *,
    head: int,
    clients: int,
    rounds: int,
    basis: Mapping[str, int] | None,
    sites: int,
    refreshes: int = 0,
    codec: Codec = "float32",
    whole: Sequence[int] = (),
    also: Sequence[Method] = (),
) -> list[Price]:
    """Returns the prices of this run's method and then of the others, cheapest first, in the same codec.

    The others are `also`, and every method at LORA_RANKS or CORE_RANKS.
    """
    mine = price(
        method,
        shapes,
        head=head,
        clients=clients,
        rounds=rounds,
        basis=basis,
        sites=sites,
        refreshes=refreshes,
        codec=codec,
        whole=whole,
        this_run=True,
    )
    usual = [
        cls(rank=rank)
        for cls in method_types().values()
        if cls.spec.adapter is not None
        for rank in (LORA_RANKS if cls.spec.adapter == "factors" else CORE_RANKS)
    ]
    others = {(other.spec.id, other.rank): other for other in (*usual, *also)}
    others.pop((method.spec.id, method.rank), None)
    prices = [
        price(other, shapes, head=head, clients=clients, rounds=rounds, codec=codec, whole=whole)
        for other in others.values()
    ]
    return [mine, *sorted(prices, key=lambda p: p.total_bytes)]
