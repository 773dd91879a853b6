"""What a run costs in bytes, before it starts, by this method and by the others: one-off, up, down and total.

All figures are for the whole federation and all rounds, 4 bytes a value, the envelopes' headers aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedsb.adapters.adapted import Shapes
from fedsb.methods import priced_types
from fedsb.methods.contract import Method

BYTES_A_VALUE = 4  # float32
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
    label: str | None = None,
    this_run: bool = False,
) -> Price:
    """The price of one method."""
    traffic = method.traffic(shapes, head=head, clients=clients)
    times = clients * rounds
    one_off = traffic.one_off * sites + (sum(basis.values()) * sites if basis else 0)
    up, down = (traffic.up + traffic.head) * times, (traffic.down + traffic.head) * times
    return Price(
        label=label or f"{method.facts.id} (rank {method.rank})",
        this_run=this_run,
        one_off_bytes=one_off * BYTES_A_VALUE,
        up_bytes=up * BYTES_A_VALUE,
        down_bytes=down * BYTES_A_VALUE,
        total_bytes=(one_off + up + down) * BYTES_A_VALUE,
        total_bytes_without_head=(one_off + up + down - 2 * traffic.head * times) * BYTES_A_VALUE,
    )


def price_list(
    method: Method, shapes: Shapes, *, head: int, clients: int, rounds: int, basis: Mapping[str, int] | None, sites: int
) -> list[Price]:
    """This run's method first, then the others, cheapest first: each at LORA_RANKS or CORE_RANKS."""
    mine = price(method, shapes, head=head, clients=clients, rounds=rounds, basis=basis, sites=sites, this_run=True)
    others = [
        cls(rank=rank)
        for name, cls in priced_types().items()
        for rank in (LORA_RANKS if cls.facts.adapter == "factors" else CORE_RANKS)
        if cls.facts.adapter is not None and (name, rank) != (method.facts.id, method.rank)
    ]
    prices = [price(other, shapes, head=head, clients=clients, rounds=rounds) for other in others]
    return [mine, *sorted(prices, key=lambda p: p.total_bytes)]
