"""Charts as geometry, which report.html.j2 draws as SVG.

A frame is 360 pixels wide, so that its text is readable on a phone. A line has gaps where values are missing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsb.utils.formatting import Json, Show, bytes_text, bytes_tick, count_text

LEFT, RIGHT, TOP, BOTTOM = 52, 352, 10, 184  # the plotting area inside 360 x 210


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear map from [low, high] to the pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def around(values: Sequence[float], start: float, end: float, *, within: tuple[float, float] | None = None) -> Axis:
        """Returns an axis with some space around the values, but not beyond their possible range (`within`)."""
        pad = (max(values) - min(values)) * 0.06 or abs(values[0]) * 0.1 or 1.0
        lowest, highest = within or (-math.inf, math.inf)
        low, high = max(min(values) - pad, lowest), min(max(values) + pad, highest)
        return Axis(low=low, high=high if high > low else low + 1.0, start=start, end=end)

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, show: Show, *, least_step: float = 0.0) -> list[tuple[float, str]]:
        """Returns about four round numbers inside the axis, as (pixel, label)."""
        rough = max((self.high - self.low) / 4.5, least_step)
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(k * size for k in (1, 2, 5, 10) if k * size >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(k * step), show(k * step)) for k in range(first, last + 1)]


def line_chart(
    values: Mapping[int, float | None],
    show: Show,
    tick: Show,
    *,
    levels: Mapping[str, float | None] | None = None,  # dashed reference lines
    from_zero: bool = False,
    within: tuple[float, float] | None = None,  # possible range of the values
) -> Json | None:
    """Returns a line over the rounds; None without values."""
    known = {x: y for x, y in values.items() if y is not None}
    if not known:
        return None
    marks = {name: y for name, y in (levels or {}).items() if y is not None}
    low, high = min(values), max(values)
    x_axis = Axis(low=low - 0.02, high=max(high, low + 1), start=LEFT + 6, end=RIGHT - 6)
    y_axis = Axis.around([*known.values(), *marks.values()], BOTTOM, TOP, within=within)
    y_axis = Axis(low=0, high=y_axis.high, start=BOTTOM, end=TOP) if from_zero else y_axis
    pieces: list[list[str]] = [[]]
    for x, y in values.items():
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{x_axis(x)},{y_axis(y)}")
    return {
        "lines": [" ".join(piece) for piece in pieces if len(piece) > 1],
        "dots": [(x_axis(x), y_axis(y), f"round {x}: {show(y)}") for x, y in known.items()],
        "radius": 3 if len(known) <= 30 else 1.5,
        "levels": [(name, y_axis(y), show(y)) for name, y in marks.items()],
        "x_ticks": x_axis.ticks(count_text, least_step=1) if high > low else [(x_axis(low), str(low))],
        "y_ticks": y_axis.ticks(tick),
        "first": (min(known), show(known[min(known)])),
        "last": (max(known), show(known[max(known)])),
        "gaps": len(values) - len(known),
    }


def bar_chart(by_round: Mapping[int, Mapping[str, int]]) -> Json:
    """Returns stacked bars of the up and down bytes of every round."""
    low, high = min(by_round), max(by_round)
    x_axis = Axis(low=low - 0.5, high=high + 0.5, start=LEFT, end=RIGHT)
    tallest = max(sum(sides.values()) for sides in by_round.values())
    y_axis = Axis(low=0, high=tallest * 1.05 or 1, start=BOTTOM, end=TOP)
    step = (RIGHT - LEFT) / (high - low + 1)
    width = min(step * 0.7, 40) if step > 5 else step + 0.5  # without gaps if the bars are thin
    return {
        "width": width,
        "bars": [
            {
                "x": x_axis(r) - width / 2,
                "up": (y_axis(sides["up"]), BOTTOM - y_axis(sides["up"])),
                "down": (y_axis(sides["up"] + sides["down"]), BOTTOM - y_axis(sides["down"])),
                "tip": f"round {r}: {bytes_text(sides['up'])} up, {bytes_text(sides['down'])} down",
            }
            for r, sides in by_round.items()
        ],
        "x_ticks": x_axis.ticks(count_text, least_step=1) if high > low else [(x_axis(low), str(low))],
        "y_ticks": y_axis.ticks(bytes_tick),
    }


def swarm(axis: Axis, values: Mapping[str, float], show: Show) -> list[tuple[float, float, str]]:
    """Returns a dot per name as (x, y around 0, tip). Dots with similar values are stacked."""
    columns: dict[int, list[str]] = defaultdict(list)
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        columns[round(axis(value) / 7)].append(name)
    pitch = min(7.0, 60 / max(Counter({c: len(names) for c, names in columns.items()}).values()))
    return [
        (7.0 * column, round((i - (len(names) - 1) / 2) * pitch, 1), f"{name}: {show(values[name])}")
        for column, names in columns.items()
        for i, name in enumerate(names)
    ]
