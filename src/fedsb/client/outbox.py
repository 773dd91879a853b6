"""The outbox, outbox.jsonl: one line for each message that leaves this site, written before it leaves."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsb.protocol.payload import Payload
from fedsb.utils.files import disk_errors, json_lines


class Outbox:
    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, what: str, data: bytes, payload: Payload | None = None, **facts: Any) -> None:
        """Writes a line and returns once it is on disk. `payload` is `data` unpacked, if `data` is a payload."""
        line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, **facts}
        line |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if payload is not None:
            shapes = {name: list(shape) for name, shape in payload.layout.shapes}
            line |= {"round": payload.round + 1, "values": payload.values, "codec": payload.codec, "tensors": shapes}
        with disk_errors(self.path.parent), self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:  # a line that was cut off, by a kill or a full disk, is left as one of its own
                file.seek(end - 1)
            file.write((b"\n" if end and file.read(1) != b"\n" else b"") + json_lines([line]))
            file.flush()
            os.fsync(file.fileno())
