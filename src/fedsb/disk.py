"""Writing to disk: whole or not at all, with a clear word where there is no room, and under harmless names."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsb.errors import DiskError


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it: it is there whole or not at all."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write(temporary, content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)


def usual_modes(folder: Path) -> None:
    """Gives every file below a folder the mode of a new file: some libraries write files that only the owner reads."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what a disk refuses into a message that says what is kept and how to go on."""
    try:
        yield
    except FileNotFoundError as error:
        raise DiskError(
            f"cannot write below {folder}: {error.filename or folder} does not exist. Was it deleted or moved during "
            "the run?"
        ) from error
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
        raise DiskError(
            f"cannot write below {folder}: {what}. What was finished is kept: make room and try again"
        ) from error


def safe_name(client: str) -> str:
    """A folder name for a client: its own where that is harmless and short, else with a hash for what is not."""
    kept = "".join(c if c.isalnum() or c in " ._-" else "_" for c in client).strip(" .")[:50]
    return client if client and kept == client else f"{kept}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


def write(path: Path, content: bytes) -> None:
    """Returns when the file is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(folder: Path) -> None:
    """Returns when the folder's names are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
