"""Tables of rows from a local file or from the Hugging Face Hub, each with a fingerprint of its content.

data/train.jsonl.gz           .json .jsonl .csv .tsv .parquet, each also with .gz
hub:owner/name                a data set of the Hub, at a revision, one split
hub:owner/name:config         one of its configs
"""

from __future__ import annotations

import difflib
import gzip
import re
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fedsb.data.readers import READERS, FileFormat, OpenedFile, Place
from fedsb.data.rows import PlacedRow, Row, Table, make_table
from fedsb.utils.errors import NotAvailableError, UserError, did_you_mean


def load_table(
    source: str, *, revision: str | None = None, split: str | None = None, form: FileFormat | None = None
) -> Table:
    """Returns the rows of `source`.

    Raises UserError for a missing, empty or broken file, an unknown extension, or a Hub name that cannot be read.

    Args:
        revision, split: for Hub names only; the default split is "train".
        form: for files only.
    """
    if source.startswith("hub:"):
        return _load_hub(source, revision, split or "train")
    for option, value in (("revision", revision), ("split", split)):
        if value is not None:
            raise UserError(f"{option} = {value!r} is for Hub data sets, but {source!r} is a file. Leave {option} out.")
    return _load_file(Path(source).expanduser(), form or FileFormat())


def _load_file(path: Path, form: FileFormat) -> Table:
    if path.is_dir():
        raise _missing(path)
    extension = Path(path.name.removesuffix(".gz")).suffix.lower()
    if extension not in READERS:
        near = did_you_mean(extension, READERS) + ", each also with .gz"
        raise UserError(f"{path}: the extension {extension!r} is not known: {near}. A Hub data set is hub:owner/name.")
    if not path.is_file():
        raise _missing(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as fault:  # BadGzipFile is an OSError; EOFError is a truncated gz
        raise UserError(
            f"{path} cannot be read: {fault}. Check that it is complete, and that its content fits its extension."
        ) from fault
    if not content.strip():
        raise UserError(f"{path} is empty. Give a file with at least one row.")
    file = OpenedFile(content, path, form)
    table = make_table(_same_columns(READERS[extension](file), path), str(path))
    return replace(table, notes=tuple(file.notes), warnings=tuple(file.warnings))


def _missing(path: Path) -> UserError:
    """Returns the error for a missing file. A file with a similar name means a misspelling."""
    if path.is_dir():
        return UserError(f"{path} is a folder. Name one file in it.")
    if not path.parent.is_dir():
        return NotAvailableError(f"There is no file {path}: its folder {path.parent} does not exist. Check the path.")
    known = [file.name for file in path.parent.iterdir() if file.is_file()]
    if near := difflib.get_close_matches(path.name, known, n=3):
        return UserError(f"There is no file {path}. Did you mean {' or '.join(near)}?")
    return NotAvailableError(f"There is no file {path}. Check the path.")


def _same_columns(placed: Iterable[tuple[Place, Row]], path: Path) -> list[Row]:
    """Returns the rows, with columns in the order of the first row. Raises UserError at the first row that differs."""
    rows: list[Row] = []
    first: Place = ""
    for place, row in placed:
        if rows and row.keys() != rows[0].keys():
            missing, more = [sorted(a.keys() - b.keys()) for a, b in ((rows[0], row), (row, rows[0]))]
            said = [f"lacks the column {name!r} that {first} has" for name in missing]
            said += [f"has the column {name!r} that {first} lacks" for name in more]
            raise UserError(
                f"{path}, {place}: the row {' and '.join(said)}. Give all rows the same columns, with null where empty."
            )
        first = first or place
        values = {name: row[name] for name in rows[0]} if rows else row
        rows.append(PlacedRow(values, f"{path}, {place}"))
    return rows


def _load_hub(source: str, revision: str | None, split: str) -> Table:
    named = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?", source)
    if named is None:
        raise UserError(f"{source!r} is not a Hub name. Write hub:owner/name or hub:owner/name:config.")
    name, config = named.groups()
    if Path(name).exists():  # `datasets` would read the folder and we would call it the Hub
        raise UserError(
            f"{source!r}: the folder {name} in this directory hides the Hub data set. Name a file in it, or run fedsb "
            "in a different directory."
        )
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, revision=revision, split=split)
    except datasets.exceptions.DatasetNotFoundError as fault:
        if "gated" in str(fault):
            raise NotAvailableError(
                f"{source!r} is gated. Accept its terms at https://huggingface.co/datasets/{name}, signed in, then set "
                "HF_TOKEN to a token of that account (or: hf auth login)."
            ) from fault
        raise UserError(
            f"{source!r} is not on the Hub or is private ({fault}). Check the name, or set HF_TOKEN (or: hf auth "
            "login)."
        ) from fault
    except (ConnectionError, TimeoutError) as fault:
        raise NotAvailableError(
            f"{source!r} cannot be fetched from the Hub ({fault}). Without a network, fill the Hub's cache on another "
            "machine, point HF_HOME at it and set HF_HUB_OFFLINE=1 (unset it to go online), or give a local file: "
            "--set data.train=PATH"
        ) from fault
    except (ValueError, RuntimeError, OSError) as fault:  # an unknown config or split, a data set that needs code
        raise UserError(f"{source!r}, revision {revision!r}, split {split!r} cannot be loaded: {fault}") from fault
    origin = f"{name}{f':{config}' if config else ''}@{revision or 'main'}"
    rows: list[Row] = [PlacedRow(row, f"{origin}, row {number}") for number, row in enumerate(loaded, start=1)]
    names = {
        column: tuple(feature.names)
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return replace(make_table(rows, origin), class_names=names)
