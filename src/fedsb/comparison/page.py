"""Writes comparison.html: the tables and charts of a comparison on one page without external resources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsb.comparison.plots import COLOURS, curve_plot, difference_plot, pareto_plot, tuning_plot
from fedsb.comparison.table import byte_table, notes, score_table, spread_text
from fedsb.reporting.report import open_templates
from fedsb.utils.files import write_atomic
from fedsb.utils.formatting import PERCENT, score_text


def write_page(found: dict[str, Any], folder: Path) -> Path:
    """Writes comparison.html from the content of comparison.json and returns its path."""
    metric = found["metric"] or "score"
    templates = open_templates(Path(__file__).parent)
    templates.filters["score"] = score_text(metric, unit=False)
    templates.filters["spread"] = lambda of: spread_text(metric, of)
    page = templates.get_template("compare.html.j2").render(
        found=found,
        metric=metric.replace("_", " "),
        unit=" points" if metric in PERCENT else "",
        colours=COLOURS,
        scores=score_table(found),
        bytes=byte_table(found),
        notes=notes(found),
        pareto=pareto_plot(found),
        curves=curve_plot(found),
        tuning=tuning_plot(found),
        differences=difference_plot(found),
    )
    path = folder / "comparison.html"
    write_atomic(path, page.encode())
    return path
