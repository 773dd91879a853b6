"""Compares the bytes of a run with those of well-known methods. `prices` are the rows of `price_list`, as dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsb.utils.formatting import Json, bytes_text

BASELINES = {"fedit": "FedIT", "flora": "FLoRA"}


def baseline_prices(prices: Sequence[Json]) -> list[Json]:
    """Returns the prices of the baselines, cheapest first."""
    others = [row for row in prices if not row.get("this_run") and method_of(row) in BASELINES]
    return sorted(others, key=lambda row: int(row["total_bytes"]))


def method_of(price: Mapping[str, object]) -> str:
    """Returns the method of a price, whose label is such as "fedit (rank 4)"."""
    return str(price["label"]).partition(" ")[0]


def total_text(price: Json) -> str:
    """Returns the bytes of a whole run, also in float32 if the run has a codec or sends a part of the values."""
    total, float32 = price["total_bytes"], price.get("float32_bytes")  # which older runs do not have
    return bytes_text(total) + (f" ({bytes_text(float32)} in float32)" if float32 not in (None, total) else "")


def bytes_line(prices: Sequence[Json]) -> str:
    """Returns one line with the bytes of a run, and those of FedIT."""
    own = next(price for price in prices if price["this_run"])
    others = [row for row in baseline_prices(prices) if row["label"] in ("fedit (rank 1)", "fedit (rank 4)")]
    fedit = " and ".join(f"{total_text(row)} at {row['label'].removeprefix('fedit (').rstrip(')')}" for row in others)
    baseline = f"; FedIT would send {fedit}" if fedit else ""
    return f"{'bytes':<9}{bytes_text(own['total_bytes'])} by all clients in all rounds{baseline}"
