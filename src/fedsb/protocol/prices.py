"""The bytes that a run will send, with its method and with others: one-off, up, down and total.

All figures are for the whole federation and all rounds, in the run's codec, without the headers of payloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from fedsb.config.registry import method_types
from fedsb.config.training import Codec
from fedsb.methods.base import Method, Traffic
from fedsb.protocol.codec import basis_codec, payload_bytes
from fedsb.protocol.part import part_size
from fedsb.protocol.schedule import Broadcasts
from fedsb.utils.tensors import Shapes

LORA_RANKS, CORE_RANKS = (4, 1), (32, 8)  # that other methods are priced at


@dataclass(frozen=True, kw_only=True)
class Price:
    """The bytes of a whole run. `total_bytes_without_head` leaves the task head out.

    `float32_bytes` are those of the same run in float32, with all values in each round.
    """

    label: str
    this_run: bool
    one_off_bytes: int
    up_bytes: int
    down_bytes: int
    total_bytes: int
    total_bytes_without_head: int
    float32_bytes: int
    up_values: int  # of one client in one round, the head's aside; in a round that follows another
    down_values: int
    head_values: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PricedRun:
    """A run to be priced, apart from its method.

    Args:
        head: values of the task head.
        clients: in each round.
        fraction: of the values, that is sent in a round.
        broadcasts: those that are not in the codec.
        up_bytes: of an update, by its number of values, in secure aggregation; None: as the codec has them.
        is_step: whether a round is one step with shared noise: what is summed are gradients of what is trained.
        sends_moments: whether a byte per trained value comes with each broadcast, with scale-then-privatize.
    """

    shapes: Shapes
    head: int
    clients: int
    rounds: int
    codec: Codec = "float32"
    fraction: float = 1.0
    broadcasts: Broadcasts = field(default_factory=Broadcasts)
    up_bytes: Callable[[int], int] | None = None
    is_step: bool = False
    sends_moments: bool = False

    def of(self, method: Method) -> PricedRun:
        """Returns the run of a method that cannot send a part, or cannot have the codec, with all in float32."""
        fraction = self.fraction if method.spec.keeps_coordinates else 1.0
        return replace(self, codec="float32" if method.spec.changes_base else self.codec, fraction=fraction)

    def size_of(self, values: int) -> int:
        """Returns the bytes of an update, by its number of values, of which a part is sent."""
        return payload_bytes(self.codec, part_size(values, self.fraction))

    def broadcast_size_of(self, method: Method, round: int) -> Callable[[int], int]:
        """Returns the bytes of a broadcast that is not in float32, by its number of values."""
        if self.codec == "float32" and self.fraction == 1:
            return self.size_of
        if self.broadcasts.derived(method, round):
            return lambda values: 0
        if method.spec.starts_afresh(sampled=self.broadcasts.sampled):
            return partial(payload_bytes, basis_codec(self.codec))
        return self.size_of


@dataclass(frozen=True, kw_only=True)
class PricedBasis:
    """The messages that are sent for the basis.

    Args:
        up, down: values that one client sends and receives.
        clients: that receive the basis.
        refreshes: of the basis: every client receives the current adapter, then the new basis.
    """

    up: int = 0
    down: int = 0
    clients: int = 0
    refreshes: int = 0


def price(method: Method, run: PricedRun, basis: PricedBasis | None = None, *, this_run: bool = False) -> Price:
    """Returns the price of one method. The head's part of a message is in proportion to its number of values."""
    basis, clients, run = basis or PricedBasis(), run.clients, run.of(method)
    typical = method.traffic(run.shapes, head=run.head, clients=clients)
    each = [method.traffic(run.shapes, head=run.head, clients=clients, round=round) for round in range(run.rounds)]
    bill = payload_bytes(basis_codec(run.codec), basis.up) + payload_bytes(basis_codec(run.codec), basis.down)
    adapter_bytes = payload_bytes("float32", each[0].down + each[0].head)
    one_off = basis.clients * (
        payload_bytes("float32", each[0].one_off) + bill + basis.refreshes * (bill + adapter_bytes)
    )
    up, down, heads = 0, 0, basis.clients * basis.refreshes * payload_bytes("float32", each[0].head)
    for round, traffic in enumerate(each):
        plain = run.broadcasts.in_float32(method, round)
        up_bytes, up_head = _message(run.up_bytes or run.size_of, _summed(traffic, run), traffic.head)
        down_bytes, down_head = _message(run.broadcast_size_of(method, round), traffic.down, traffic.head)
        plain_bytes, plain_head = _message(partial(payload_bytes, "float32"), traffic.down, traffic.head)
        up += clients * up_bytes
        down += (clients - plain) * down_bytes + plain * plain_bytes
        if run.sends_moments:
            down += clients * traffic.step
            heads += clients * traffic.head
        heads += clients * up_head + (clients - plain) * down_head + plain * plain_head
    uncoded = replace(run, codec="float32", fraction=1.0)
    return Price(
        label=f"{method.spec.id} (rank {method.rank})",
        this_run=this_run,
        one_off_bytes=one_off,
        up_bytes=up,
        down_bytes=down,
        total_bytes=one_off + up + down,
        total_bytes_without_head=one_off + up + down - heads,
        float32_bytes=one_off + up + down if run == uncoded else price(method, uncoded, basis).total_bytes,
        up_values=typical.up,
        down_values=typical.down,
        head_values=typical.head,
    )


def round_bytes(method: Method, traffic: Traffic, run: PricedRun) -> dict[str, int]:
    """Returns the bytes of one client, "up" and "down", in a round that follows another."""
    moments, run = traffic.step if run.sends_moments else 0, run.of(method)
    up, _ = _message(run.up_bytes or run.size_of, _summed(traffic, run), traffic.head)
    down, _ = _message(run.broadcast_size_of(method, 1), traffic.down, traffic.head)
    return {"up": up, "down": down + moments}


def _summed(traffic: Traffic, run: PricedRun) -> int:
    """Returns the values of what a client sends, without the head's."""
    return traffic.step - traffic.head if run.is_step else traffic.up


def _message(size_of: Callable[[int], int], values: int, head: int) -> tuple[int, int]:
    """Returns (the bytes of one message, the head's part of them)."""
    n = values + head
    size = size_of(n) if n else 0
    return size, round(size * head / max(n, 1))


def price_list(method: Method, run: PricedRun, basis: PricedBasis, also: Sequence[Method] = ()) -> list[Price]:
    """Returns the prices of this run's method and then of the others, cheapest first, in the same codec.

    The others are `also`, and every method at LORA_RANKS or CORE_RANKS.
    """
    mine = price(method, run, basis, this_run=True)
    usual = [
        cls(rank=rank)
        for cls in method_types().values()
        if cls.spec.adapter is not None
        for rank in (LORA_RANKS if cls.spec.adapter == "factors" else CORE_RANKS)
    ]
    others = {(other.spec.id, other.rank): other for other in (*usual, *also)}
    others.pop((method.spec.id, method.rank), None)
    prices = [price(other, run) for other in others.values()]
    return [mine, *sorted(prices, key=lambda p: p.total_bytes)]
