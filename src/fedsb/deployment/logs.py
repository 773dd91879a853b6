"""The log of a deployment, one JSON object per line: time, level, event, and facts. Never a key, never a payload."""

from __future__ import annotations

import datetime
import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

FILE_BYTES, FILES = 16 * 2**20, 3  # rotated, so that refused requests cannot fill the disk
ENDED = "ended"  # the supervisor's last event, with `how` ("done", "stopped" or "failed") and the reason
LOGGER = logging.getLogger("fedsb.deployment")


def open_log(path: Path) -> None:
    """Sends the log records of this process, of Flower and of its web server to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES - 1)
    handler.setFormatter(_JsonLines())
    for name, level in (("fedsb.deployment", logging.INFO), ("flwr", logging.WARNING), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log_event(event: str, *, level: int = logging.INFO, **facts: object) -> None:
    """Writes one line, such as {"time": ..., "level": "info", "event": "refused", "path": "/v1/control/start-run"}."""
    LOGGER.log(level, event, extra={"facts": facts})


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
