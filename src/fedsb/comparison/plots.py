"""The charts of a comparison as geometry, which compare.html.j2 draws as SVG. Contender i has the colour k<i>."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedsb.comparison.table import difference_text, spread_text
from fedsb.reporting.charts import Axis
from fedsb.utils.formatting import PERCENT, bytes_text, bytes_tick, number, score_range, score_text, score_tick

Json = dict[str, Any]
COLOURS = 8
LEFT, TOP = 52, 12
LETTER, LINE = 5.9, 13.0  # the size of a letter and of a line of a label


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The size of a plot. Its plotting area starts at LEFT and TOP."""

    width: int
    height: int

    @property
    def right(self) -> int:
        return self.width - 8

    @property
    def bottom(self) -> int:
        return self.height - 40


def pareto_plot(found: Json) -> Json | None:
    """Returns the plot of mean score by total bytes: a point per contender with its sd, and the front as steps."""
    frame = Frame(width=520, height=290)
    known = [row for row in found["contenders"] if row["score"] is not None]
    if not known:
        return None
    x_axis, x_ticks = _bytes_axis([row["bytes"]["total"] for row in known], frame, room=0.12)
    scores = [row["score"]["mean"] + side * (row["score"]["sd"] or 0) for row in known for side in (-1, 1)]
    y_axis = Axis.around(scores, frame.bottom, TOP, within=score_range(found["metric"] or ""))
    points: list[Json] = []
    for i, row in enumerate(found["contenders"]):
        if row["score"] is None:
            continue
        mean, sd = row["score"]["mean"], row["score"]["sd"] or 0.0
        text = f"{row['contender']}: {spread_text(found['metric'], row['score'])}, {bytes_text(row['bytes']['total'])}"
        points.append(
            {
                "colour": i % COLOURS,
                "x": _at(x_axis, row["bytes"]["total"]),
                "y": y_axis(mean),
                "low": y_axis(mean - sd),
                "high": y_axis(mean + sd),
                "tip": text,
                "name": row["contender"],
                "control": row["is_control"],
                "front": row["on_front"],
            }
        )
    _move_apart(points)
    front = sorted((point for point in points if point["front"]), key=lambda point: float(point["x"]))
    steps = [(front[0]["x"], front[0]["y"])] if front else []
    for before, after in pairwise(front):
        steps += [(after["x"], before["y"]), (after["x"], after["y"])]
    steps += [(frame.right, front[-1]["y"])] if front else []
    return {
        "frame": frame,
        "points": _labelled(points, steps, frame),
        "front": " ".join(f"{x},{y}" for x, y in steps),
        "x_ticks": x_ticks,
        "y_ticks": y_axis.ticks(score_tick(found["metric"])),
    }


def curve_plot(found: Json) -> Json | None:
    """Returns the plot of the mean score at every scored round by the bytes sent so far."""
    frame = Frame(width=360, height=230)
    show = score_text(found["metric"] or "")
    curves = [(i, row) for i, row in enumerate(found["contenders"]) if row["curve"] and row["bytes"]["total"]]
    if not curves:
        return None
    x_axis, x_ticks = _bytes_axis([sent for _, row in curves for sent, _ in row["curve"]], frame, room=0.04)
    levels = [found["target"]] if found["target"] is not None else []
    scores = [*(score for _, row in curves for _, score in row["curve"]), *levels]
    y_axis = Axis.around(scores, frame.bottom, TOP, within=score_range(found["metric"] or ""))
    return {
        "frame": frame,
        "lines": [
            _line(i, [(_at(x_axis, sent), y_axis(score)) for sent, score in row["curve"]])
            | {"tips": [f"{row['contender']}: {show(score)} after {bytes_text(sent)}" for sent, score in row["curve"]]}
            for i, row in curves
        ],
        "target": y_axis(levels[0]) if levels else None,
        "x_ticks": x_ticks,
        "y_ticks": y_axis.ticks(score_tick(found["metric"])),
    }


def tuning_plot(found: Json) -> Json | None:
    """Returns the plot of the score of every learning rate, with a cross for a loss that was not finite."""
    frame = Frame(width=360, height=230)
    show = score_text(found["metric"] or "")
    tried = [(i, row, row["tried"]) for i, row in enumerate(found["contenders"]) if row["tried"]]
    scores = [trial["score"] for _, _, trials in tried for trial in trials if trial["score"] is not None]
    if not scores:
        return None
    rates = [math.log2(trial["lr"]) for _, _, trials in tried for trial in trials]
    x_axis = Axis(low=min(rates) - 0.5, high=max(rates) + 0.5, start=LEFT, end=frame.right)
    y_axis = Axis.around(scores, frame.bottom - 10, TOP, within=score_range(found["metric"] or ""))
    lines = []
    for i, row, trials in tried:
        finite = [trial for trial in trials if trial["score"] is not None]
        line = _line(i, [(x_axis(math.log2(trial["lr"])), y_axis(trial["score"])) for trial in finite])
        line["tips"] = [f"{row['contender']}, lr {trial['lr']:g}: {show(trial['score'])}" for trial in finite]
        line["best"] = next((dot for dot, t in zip(line["dots"], finite, strict=True) if t["lr"] == row["lr"]), None)
        line["crosses"] = [
            (x_axis(math.log2(trial["lr"])), f"{row['contender']}, lr {trial['lr']:g}: not finite")
            for trial in trials
            if trial["score"] is None
        ]
        lines.append(line)
    every = max(1, math.ceil((max(rates) - min(rates)) / 5))
    low = min(rates)
    steps = range(0, math.floor(max(rates) - low + 0.01) + 1, every)
    return {
        "frame": frame,
        "lines": lines,
        "x_ticks": [(x_axis(low + k), f"{2 ** (low + k):.3g}") for k in steps],
        "y_ticks": y_axis.ticks(score_tick(found["metric"] or "")),
    }


def difference_plot(found: Json) -> Json | None:
    """Returns the plot of the differences from the reference on every seed, and their mean, a lane per contender."""
    metric = found["metric"] or ""
    known = [(i, row) for i, row in enumerate(found["contenders"]) if row["difference"]]
    if not known:
        return None
    frame = Frame(width=360, height=34 * len(known) + 46)
    gaps = [gap for _, row in known for gap in row["difference"]["by_seed"].values()]
    axis = Axis.around([0.0, *gaps], 30, frame.right - 30)
    lanes = []
    for k, (i, row) in enumerate(known):
        of = row["difference"]
        tips = [f"seed {s}: {difference_text(metric, {'mean': gap, 'sd': None})}" for s, gap in of["by_seed"].items()]
        lanes.append(
            {
                "colour": i % COLOURS,
                "y": TOP + 34 * k + 20,
                "name": row["contender"],
                "text": difference_text(metric, of),
                "dots": list(zip(map(axis, of["by_seed"].values()), tips, strict=True)),
                "mean": axis(of["mean"]),
            }
        )

    times = 100 if metric in PERCENT else 1

    def tick(gap: object) -> str:
        return f"{times * x:+.3g}".replace("-", "−") if (x := number(gap)) else "0"

    return {"frame": frame, "lanes": lanes, "zero": axis(0.0), "x_ticks": axis.ticks(tick)}


def _line(i: int, dots: Sequence[tuple[float, float]]) -> Json:
    return {"colour": i % COLOURS, "dots": list(dots), "points": " ".join(f"{x},{y}" for x, y in dots)}


def _bytes_axis(sizes: Sequence[float], frame: Frame, *, room: float) -> tuple[Axis, list[tuple[float, str]]]:
    """Returns an axis over log10 of bytes, with its ticks. `room` is the free share of its width on each side.

    A size of 0 has its place at the left, before the start of the axis.
    """
    nothing = [(LEFT + 10.0, bytes_tick(0))] if 0 in sizes else []
    logs = [math.log10(size) for size in sizes if size > 0] or [3.0]
    low, high = min(logs), max(logs)
    pad = max(high - low, 0.5) * room + 0.02
    axis = Axis(low=low - pad, high=high + pad, start=LEFT + 40 * len(nothing), end=frame.right)
    marks = [k * 10.0**e for e in range(math.floor(axis.low), math.ceil(axis.high) + 1) for k in _steps(axis)]
    inside = [mark for mark in marks if axis.low <= math.log10(mark) <= axis.high]
    return axis, [*nothing, *((axis(math.log10(mark)), bytes_tick(mark)) for mark in inside)]


def _steps(axis: Axis) -> tuple[int, ...]:
    decades = axis.high - axis.low
    return (1,) if decades > 3 else (1, 3) if decades > 1.5 else (1, 2, 5) if decades > 0.5 else (1, 2, 3, 4, 5, 6, 8)


def _at(axis: Axis, size: float) -> float:
    return axis(math.log10(size)) if size > 0 else LEFT + 10.0


def _move_apart(points: list[Json]) -> None:
    """Moves points with the same bytes apart, so that their spreads can be distinguished."""
    for x in {point["x"] for point in points}:
        same = [point for point in points if point["x"] == x]
        for k, point in enumerate(same):
            point["x"] = round(x + 5 * (k - (len(same) - 1) / 2), 1)


def _labelled(points: list[Json], steps: Sequence[tuple[float, float]], frame: Frame) -> list[Json]:
    """Returns the points with positions for their names, which overlap other points and the front the least."""
    taken = [(p["x"] - 5, p["y"] - 5, p["x"] + 5, p["y"] + 5) for p in points]
    taken += [(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairwise(steps)]
    taken += [(p["x"] - 1, p["high"], p["x"] + 1, p["low"]) for p in points]

    def cost(box: tuple[float, float, float, float]) -> float:
        over = max(LEFT - box[0], 0) + max(box[2] - frame.width, 0) + max(TOP - 10 - box[1], 0)
        over += max(box[3] - frame.bottom, 0)
        hits = sum(_overlap(box, other) for other in taken)
        return 10 * over + hits

    for point in points:
        half = LETTER * len(point["name"]) / 2
        x, y = point["x"], point["y"]
        places = [(x + 9 + half, y), (x - 9 - half, y), (x, y - 14), (x, y + 14)]
        places += [(x + 9 + half, y - 13), (x + 9 + half, y + 13), (x - 9 - half, y - 13), (x - 9 - half, y + 13)]
        boxes = {(x, y): (x - half, y - LINE / 2, x + half, y + LINE / 2) for x, y in places}
        best = min(places, key=lambda place: cost(boxes[place]))
        taken.append(boxes[best])
        point |= {"label_x": round(best[0], 1), "label_y": round(best[1] + 3.5, 1)}
    return points


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
