"""Reads a run directory: its manifest, its ledgers and its result. runs/record.py writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsb.utils.errors import UserError, did_you_mean


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError where `folder` is no run directory."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        there = {str(path.parent) for place in (folder.parent, Path("runs")) for path in place.glob("*/manifest.json")}
        hint = did_you_mean(str(folder), there) if there else "change to the folder in which the run was started"
        raise UserError(f"{folder} is not a run directory (no manifest.json); {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'manifest.json'} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not manifest.keys() >= {"run", "config", "origin"}:
        raise UserError(f"{folder / 'manifest.json'} is not that of a run of fedsb")
    return manifest


def read_result(folder: Path) -> dict[str, Any] | None:
    """Returns what a finished run says at its end, None for one that is not finished.

    The adapter's place, and the lines of Python that load it, are those of `folder` as it is now: it may have moved.
    """
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None
    before, now = str(result.get("adapter", "")), str(folder / "adapter")
    if before and before != now:
        result |= {"adapter": now, "load": str(result.get("load", "")).replace(repr(before)[:-1], repr(now)[:-1])}
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ledger; a torn last line is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def extra_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the extra metrics of a score in rounds.jsonl, result.json or cells.json.

    Version 0.1 wrote them as "beside".
    """
    return dict(row.get("extra_metrics") or row.get("beside") or {})
