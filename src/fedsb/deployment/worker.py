"""The process of a site that keeps its model. It answers one request at a time, and computes no answer twice.

    request    token (32 bytes), length (8 bytes), the bytes
    answer     b"A" (an answer) or b"L" (lost: the bytes are the reason), length (8 bytes), the bytes

The last answers are on disk, by the SHA-256 of their requests. A request that arrives again, after the node or the
coordinator died, gets the stored answer. A refusal is not stored, because its reason may be corrected.

The message of an error leaves the site only if its class allows it (`may_leave`, utils/errors.py). Otherwise only the
class leaves, because a path, a column or a label is private to the site. The site's terminal and log have the message.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
import sys
import time
from pathlib import Path

from fedsb.deployment.child_process import load, run_child
from fedsb.deployment.logs import LOGGER, log_event
from fedsb.protocol.channel import Handle, NoResponse
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import write_atomic

TOKEN = "FEDSB_TOKEN"  # environment: the token that authorises a request, hexadecimal
STORED_ANSWERS = 16
SEE_LOG = "the site's log has the reason"
MAX_DEATHS = 3  # of the worker during one request
_HEAD = struct.Struct(">Q")
_TOKEN_BYTES = 32
_PIECE_BYTES = 1 << 20


def main() -> None:
    folder, path, handle = Path(sys.argv[1]), Path(sys.argv[2]), load(sys.argv[3])(Path(sys.argv[1]))
    serve(handle, folder / "answers", path, bytes.fromhex(os.environ[TOKEN]))


def serve(handle: Handle, answers: Path, path: Path, token: bytes) -> None:
    """Answers requests on a Unix socket until the process ends."""
    answers.mkdir(parents=True, exist_ok=True)
    answers.chmod(0o700)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        log_event("worker ready")
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    _answer(connection, handle, answers, token)
                except OSError as error:  # the node died; the answer is stored
                    log_event("node gone", reason=str(error))


def ask(path: Path, token: bytes, request: bytes) -> bytes | NoResponse:
    """Returns the worker's answer. Waits without a limit, also for a worker that is starting."""
    for _ in range(MAX_DEATHS):
        try:
            with _connected(path) as connection:
                connection.sendall(token + _HEAD.pack(len(request)))
                connection.sendall(request)
                kind = _receive(connection, 1)
                (size,) = _HEAD.unpack(_receive(connection, _HEAD.size))
                content = bytes(_receive(connection, size))
                return content if kind == b"A" else NoResponse(content.decode())
        except OSError as error:
            log_event("worker gone", reason=str(error))
    return NoResponse(f"failed: the site's worker died {MAX_DEATHS} times during this request")


def _answer(connection: socket.socket, handle: Handle, answers: Path, token: bytes) -> None:
    if not hmac.compare_digest(_receive(connection, _TOKEN_BYTES), token):
        log_event("refused", reason="wrong token")
        return
    (size,) = _HEAD.unpack(_receive(connection, _HEAD.size))
    request = bytes(_receive(connection, size))
    answer = stored_or_computed(handle, request, answers)
    content = answer.reason.encode() if isinstance(answer, NoResponse) else answer
    connection.sendall((b"L" if isinstance(answer, NoResponse) else b"A") + _HEAD.pack(len(content)))
    connection.sendall(content)


def stored_or_computed(handle: Handle, request: bytes, answers: Path) -> bytes | NoResponse:
    """Returns the stored answer to a request, or computes and stores it."""
    digest, started = hashlib.sha256(request).hexdigest(), time.monotonic()
    stored = answers / digest
    if stored.exists():
        log_event("answered again", request=digest[:12])
        os.utime(stored)
        return stored.read_bytes()
    try:
        answer = handle(request)
        write_atomic(stored, answer)  # before it is sent: the same request must never get a different answer
    except (UserError, RunError) as error:
        how, kind = "failed", f"{type(error).__name__} at the site"
        if isinstance(error, UserError):
            how, kind = "refused", "the site's data or settings do not fit this run"
        log_event(how, request=digest[:12], reason=str(error))
        print(f"{how}: {error}", flush=True)
        return NoResponse(f"{how}: {error if error.may_leave else f'{kind} ({SEE_LOG})'}")
    except Exception as error:
        LOGGER.exception("failed")
        print(f"failed: {type(error).__name__}, see logs/worker.jsonl", flush=True)
        return NoResponse(f"failed: {type(error).__name__} at the site ({SEE_LOG})")
    seconds = round(time.monotonic() - started, 3)
    log_event("answered", request=digest[:12], request_bytes=len(request), answer_bytes=len(answer), seconds=seconds)
    for old in sorted(answers.iterdir(), key=lambda file: file.stat().st_mtime_ns)[:-STORED_ANSWERS]:
        old.unlink()
    return answer


def _connected(path: Path) -> socket.socket:
    """Returns a connection to the worker. Waits until it listens."""
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            time.sleep(0.1)
        else:
            return connection


def _receive(connection: socket.socket, size: int) -> bytearray:
    """Returns `size` bytes. Raises ConnectionError if the peer closes the connection first."""
    content = bytearray()
    while len(content) < size:
        piece = connection.recv(min(size - len(content), _PIECE_BYTES))
        if not piece:
            raise ConnectionError("the peer closed the connection")
        content += piece
    return content


if __name__ == "__main__":
    run_child(main)
