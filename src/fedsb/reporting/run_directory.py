"""Reads the files of a run directory: manifest, ledgers and result. runs/record.py writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsb.utils.errors import UserError, did_you_mean

FORMAT = 2  # of a run directory; an older one can be read and exported, and not resumed


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads manifest.json. Raises UserError if `folder` is not a run directory."""
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        runs = {str(path.parent) for place in (folder.parent, Path("runs")) for path in place.glob("*/manifest.json")}
        hint = did_you_mean(str(folder), runs) if runs else "change to the folder in which the run was started"
        raise UserError(f"{folder} is not a run directory (no manifest.json); {hint}")
    if not manifest.keys() >= {"run", "config", "origin"}:
        raise UserError(f"{folder / 'manifest.json'} is not the manifest of a fedsb run.")
    return manifest


def read_result(folder: Path) -> dict[str, Any] | None:
    """Reads result.json. Returns None for a run that is not finished.

    The path of the adapter, and the Python lines that load it, follow `folder`, which may have been moved.
    """
    if (result := read_json(folder / "result.json")) is None:
        return None
    before, now = str(result.get("adapter", "")), str(folder / "adapter")
    if before and before != now:
        result |= {"adapter": now, "load": str(result.get("load", "")).replace(repr(before)[:-1], repr(now)[:-1])}
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ledger. Leaves out incomplete lines, which a crash can leave."""
    return read_lines(path)[0]


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None if the file does not exist. Raises UserError if it cannot be read."""
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object.")
    return found


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the JSON lines of a file, and the number of lines that cannot be read."""
    rows, unreadable = [], 0
    for line in path.read_text("utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            unreadable += 1
    return rows, unreadable


def extra_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the extra metrics of a score in rounds.jsonl, result.json or cells.json.

    Version 0.1 wrote them under a different key.
    """
    return dict(row.get("extra_metrics") or row.get("beside") or {})


def refuse_old_format(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError for a run directory that this version cannot resume."""
    if (found := manifest.get("format", 1)) != FORMAT:
        raise UserError(
            f"{folder} was written by fedsb {manifest.get('fedsb', 'of an unknown version')}, in format {found} of run "
            f"directories. This version resumes format {FORMAT} only. Resume it with the version that started it, or "
            "start a new run. `fedsb eval`, `export` and `report` read it as it is."
        )


def refuse_existing(folder: Path) -> None:
    """Raises UserError where there is a run already: nothing is ever overwritten."""
    if (folder / "manifest.json").exists():
        if (folder / "result.json").exists():
            raise UserError(
                f"{folder} contains a finished run, which `fedsb report {folder}` shows. To run it again, choose "
                "another name (--set name=other), or move the folder away first"
            )
        raise UserError(
            f"{folder} contains an unfinished run. Resume it with `fedsb resume {folder}`, or choose another name "
            "(--set name=other)."
        )
