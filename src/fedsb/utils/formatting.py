"""Numbers as text: bytes, seconds, scores, epsilon. A dash stands for a number that is null, NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Json = dict[str, Any]
Show = Callable[[object], str]
GLUE = "\N{NO-BREAK SPACE}"
PREDICTION_COLUMNS = ("prediction", "probabilities", "ended")  # that `fedsb predict` adds to a row
PERCENT = {"accuracy", "exact_match", "f1", "pass@1"}


def number(value: object) -> float | None:
    """Returns a finite number, or None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _shown(form: Callable[[float], str]) -> Show:
    """Returns `form` for finite numbers and a dash for others, with a true minus and without breaking spaces."""
    return lambda value: "–" if (x := number(value)) is None else form(x).replace(" ", GLUE).replace("-", "−")


def _three(x: float) -> str:
    """Returns three digits with trailing zeros, so that all numbers of a column are equally exact: 15.0, 9.02, 978."""
    return f"{x:,.0f}" if x >= 99.95 else f"{x:#.3g}"


def epsilon_text(value: object) -> str:
    """Returns an epsilon with three digits, rounded up: the text never states less than was spent."""
    return "inf" if value == math.inf else "–" if (x := number(value)) is None else _up(x, 3)


def delta_text(delta: float) -> str:
    """Returns a delta with two digits, rounded up."""
    return _up(delta, 2)


def _up(x: float, digits: int) -> str:
    if x <= 0:
        return f"{x:g}"
    exponent = math.floor(math.log10(x)) - digits + 1
    return f"{math.ceil(x / 10.0**exponent * (1 - 1e-9)) * 10.0**exponent:.{digits}g}"  # 3.0000000001 stays 3


def _in_bytes(x: float, digits: Callable[[float], str] = _three) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if x < 999.5 or unit == "TB":
            break
        x /= 1000
    return f"{x:.0f} B" if unit == "B" else f"{digits(x)} {unit}"


def _in_time(x: float) -> str:
    if x < 59.5:
        return f"{x:.2g} s" if x < 10 else f"{x:.0f} s"
    minutes, seconds = divmod(round(x), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours else f"{minutes} min {seconds:02d} s"


bytes_text = _shown(_in_bytes)  # three digits, decimal units: 156696 -> 157 kB
seconds_text = _shown(_in_time)
count_text = _shown(lambda x: f"{x:,.0f}")
three_text = _shown(_three)
percent_text = _shown(lambda x: f"{100 * x:.1f} %")
plain_text = _shown(lambda x: f"{x:.4g}")
bytes_tick = _shown(lambda x: _in_bytes(x, lambda x: f"{x:.3g}"))


def score_text(metric: str, *, unit: bool = True) -> Show:
    """Returns the format of a metric. Without `unit` the metric's name is left out; percent signs stay."""
    if metric in PERCENT:
        return percent_text
    if metric == "nats_per_token":
        return _shown(lambda x: f"{x:.3f} nats/token") if unit else _shown(lambda x: f"{x:.3f}")
    return plain_text


def extra_metrics_text(extra_metrics: Mapping[str, float]) -> str:
    """Returns the extra metrics of a score as text, "F1 81.2 %, matthews 0.62", its counts last."""
    shown = [
        f"{name.replace('_', ' ')} {score_text(name)(value)}"
        for name, value in extra_metrics.items()
        if not isinstance(value, int)
    ]
    return ", ".join(shown) + counts_text(extra_metrics, ", " if shown else "")


def counts_text(extra_metrics: Mapping[str, float], before: str = ", ") -> str:
    """Returns the counts among the extra metrics that are not 0, "3 cut, 1 without answer"."""
    named = [
        f"{value:,} {name.replace('_', ' ')}"
        for name, value in extra_metrics.items()
        if isinstance(value, int) and value
    ]
    return before + ", ".join(named) if named else ""


def score_tick(metric: str) -> Show:
    """Returns the format of a metric at an axis."""
    return _shown(lambda x: f"{100 * x:.4g} %") if metric in PERCENT else plain_text


def score_range(metric: str) -> tuple[float, float] | None:
    """Returns the lowest and the highest value of a metric that is a fraction; None for others."""
    return (0.0, 1.0) if metric in PERCENT else None
