"""The process of a site that keeps its model: answers one request at a time, and none of them twice.

    a request    token (32 bytes), length (8 bytes), the bytes
    an answer    b"A" (an answer) or b"L" (lost: the bytes are a reason), length (8 bytes), the bytes

The last answers are on disk by the SHA-256 of their requests: a request that comes again, because a node or the
coordinator died in between, is sent the stored answer. A refusal is not stored: what was wrong may have been mended.
The words of a fault leave the site only where its class says so (`may_leave`, fedsb/errors.py), else its kind alone: a
path, a column or a label is the site's own. Its terminal and its log have all of it.
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

from fedsb.deployment.child import load, run_child
from fedsb.deployment.logs import LOGGER, say
from fedsb.protocol.channel import Handle, NoResponse
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import write_atomic

TOKEN = "FEDSB_TOKEN"  # environment, hexadecimal: who may ask
KEPT = 16  # answers
HERE = "its own log says more"
DEATHS = 3  # of the trainer over one request, before it is given up
_HEAD = struct.Struct(">Q")
_TOKEN_BYTES = 32
_PIECE = 1 << 20


def main() -> None:
    folder, path, handle = Path(sys.argv[1]), Path(sys.argv[2]), load(sys.argv[3])(Path(sys.argv[1]))
    serve(handle, folder / "answers", path, bytes.fromhex(os.environ[TOKEN]))


def serve(handle: Handle, answers: Path, path: Path, token: bytes) -> None:
    """Listens on a Unix socket until the process ends."""
    answers.mkdir(parents=True, exist_ok=True)
    answers.chmod(0o700)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        say("trainer ready")
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    _answer(connection, handle, answers, token)
                except OSError as error:  # who asked has gone; the answer is stored
                    say("asker gone", reason=str(error))


def ask(path: Path, token: bytes, request: bytes) -> bytes | NoResponse:
    """What the trainer answers, for as long as that takes; waits for one that is starting."""
    for _ in range(DEATHS):
        try:
            with _connected(path) as connection:
                connection.sendall(token + _HEAD.pack(len(request)))
                connection.sendall(request)
                kind = _receive(connection, 1)
                (size,) = _HEAD.unpack(_receive(connection, _HEAD.size))
                content = bytes(_receive(connection, size))
                return content if kind == b"A" else NoResponse(content.decode())
        except OSError as error:
            say("trainer gone", reason=str(error))
    return NoResponse(f"failed: the site's trainer died {DEATHS} times over this request")


def _answer(connection: socket.socket, handle: Handle, answers: Path, token: bytes) -> None:
    if not hmac.compare_digest(_receive(connection, _TOKEN_BYTES), token):
        say("refused", reason="wrong token")
        return
    (size,) = _HEAD.unpack(_receive(connection, _HEAD.size))
    request = bytes(_receive(connection, size))
    answer = stored_or_made(handle, request, answers)
    content = answer.reason.encode() if isinstance(answer, NoResponse) else answer
    connection.sendall((b"L" if isinstance(answer, NoResponse) else b"A") + _HEAD.pack(len(content)))
    connection.sendall(content)


def stored_or_made(handle: Handle, request: bytes, answers: Path) -> bytes | NoResponse:
    digest, begun = hashlib.sha256(request).hexdigest(), time.monotonic()
    stored = answers / digest
    if stored.exists():
        say("answered again", request=digest[:12])
        os.utime(stored)
        return stored.read_bytes()
    try:
        answer = handle(request)
        write_atomic(stored, answer)  # before it leaves: an answer that could be made anew would be another one
    except (UserError, RunError) as error:
        how, kind = "failed", f"{type(error).__name__} at the site"
        if isinstance(error, UserError):
            how, kind = "refused", "what it has does not fit this run"
        say(how, request=digest[:12], reason=str(error))
        print(f"{how}: {error}", flush=True)
        return NoResponse(f"{how}: {error if error.may_leave else f'{kind} ({HERE})'}")
    except Exception as error:
        LOGGER.exception("failed")
        print(f"failed: {type(error).__name__}, see the trainer's log", flush=True)
        return NoResponse(f"failed: {type(error).__name__} at the site ({HERE})")
    seconds = round(time.monotonic() - begun, 3)
    say("answered", request=digest[:12], request_bytes=len(request), answer_bytes=len(answer), seconds=seconds)
    for old in sorted(answers.iterdir(), key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
        old.unlink()
    return answer


def _connected(path: Path) -> socket.socket:
    """Waits until somebody listens."""
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
    """Raises ConnectionError where the other end closes before."""
    content = bytearray()
    while len(content) < size:
        piece = connection.recv(min(size - len(content), _PIECE))
        if not piece:
            raise ConnectionError("the connection ended in the middle")
        content += piece
    return content


if __name__ == "__main__":
    run_child(main)
