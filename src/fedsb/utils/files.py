"""Writing to disk: whole or not at all, with a clear word where there is no room, and under harmless names."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from fedsb.utils.errors import DiskError, UserError


def write_atomic(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it: it is there whole or not at all.

    A private file can be read by its owner alone, from its first byte on.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write(temporary, content, private=private)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)


def remove_temporary(path: Path) -> None:
    """Deletes what a `write_atomic` of this file left under a temporary name, where its process was killed."""
    for left in path.parent.glob(f".{path.name}.*"):
        if left.suffix.removeprefix(".").isdigit():
            left.unlink(missing_ok=True)


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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "the disk is full. What was finished is kept. Free some space, then try again."
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            why = f"a folder or a file in it was deleted or moved in the meantime ({error})."
        else:
            why = f"{error}. What was finished is kept. Check the permissions of the folder, then try again."
        raise DiskError(f"cannot write below {folder}: {why}") from error


def lock(file: IO[Any] | int, busy: str) -> None:
    """Locks an open file until it is closed. Raises UserError with the text `busy` if another process has locked it.

    The system releases the lock when the process ends, so a lock is never stale.
    """
    if not lock_descriptor(file if isinstance(file, int) else file.fileno(), blocking=False):
        raise UserError(busy)


def safe_name(client: str) -> str:
    """A folder name for a client: its own where that is harmless and short, else with a hash for what is not."""
    kept = "".join(c if c.isalnum() or c in " ._-" else "_" for c in client).strip(" .")[:50]
    return client if client and kept == client else f"{kept}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Returns when the file is on the disk."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o666)) as file:
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


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def keyed_fingerprint(key: bytes, fingerprint: str) -> str:
    """Returns a fingerprint that only the holder of the key can make, and so compare with a guess."""
    return hmac.new(key, f"fedsb table {fingerprint}".encode(), "sha256").hexdigest()
