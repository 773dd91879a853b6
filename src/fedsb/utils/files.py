"""Files: atomic writes, locks, clear messages for a full disk, and safe names."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from fedsb.utils.errors import DiskError, UserError


def write_atomic(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it, so that it is complete or missing.

    Only the owner can read a private file, from its first byte on.
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
    """Deletes temporary files that a `write_atomic` of this file left because its process was killed."""
    for left in path.parent.glob(f".{path.name}.*"):
        if left.suffix.removeprefix(".").isdigit():
            left.unlink(missing_ok=True)


def usual_modes(folder: Path) -> None:
    """Gives every file below a folder the mode of a new file, because some libraries write files for the owner only."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raises DiskError in place of an OSError. The message says what is kept and how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "the disk is full. Completed work is kept. Free some space, then try again."
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            why = f"a folder or a file in it was deleted or moved in the meantime ({error})."
        else:
            why = f"{error}. Completed work is kept. Check the permissions of the folder, then try again."
        raise DiskError(f"cannot write below {folder}: {why}") from error


def lock(file: IO[Any] | int, busy: str) -> None:
    """Locks an open file until it is closed. Raises UserError with the text `busy` if another process has locked it.

    The system releases the lock when the process ends, so a lock is never stale.
    """
    if not lock_descriptor(file if isinstance(file, int) else file.fileno(), blocking=False):
        raise UserError(busy)


def cache_folder() -> Path:
    """Returns the user's cache folder of fedsb. Raises RuntimeError if the user has no home folder."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fedsb"


def safe_name(client: str) -> str:
    """Returns a folder name for a client: its own name if it is safe and short, otherwise a part of it with a hash."""
    kept = "".join(c if c.isalnum() or c in " ._-" else "_" for c in client).strip(" .")[:50]
    return client if client and kept == client else f"{kept}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file, and returns when it is on disk."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o666)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(folder: Path) -> None:
    """Returns when the names of the folder's files are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_lines(rows: Iterable[Mapping[str, Any]], default: Callable[[Any], Any] | None = None) -> bytes:
    """Returns one JSON object per line. `default` converts values that JSON lacks, such as dates."""
    return "".join(json.dumps(row, default=default) + "\n" for row in rows).encode()


def keyed_fingerprint(key: bytes, fingerprint: str) -> str:
    """Returns a fingerprint that can be compared with a guess only by someone who has the key."""
    return hmac.new(key, f"fedsb table {fingerprint}".encode(), "sha256").hexdigest()
