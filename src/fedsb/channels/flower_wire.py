"""Bytes in a message of Flower: one array of bytes, which Flower sends in pieces of 5 MiB.

A ConfigRecord would send them in one piece: one HTTP request of hundreds of MB, and the same bytes for fifty sites
would be stored fifty times. Flower stores the pieces of an array once, by their hash.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsb.protocol.channel import NoResponse

MAX_ANSWER_BYTES = 4 * 2**30  # also of a request
PIECE_BYTES = 5 * 2**20  # of an array, in one HTTP request
KIND = "query"  # the message type, one of those that Flower allows
_PAYLOAD, _BYTES, _LOST = "payload", "bytes", "lost"


def pack(content: bytes | NoResponse) -> RecordDict:
    """Returns the content of a message."""
    if isinstance(content, NoResponse):
        return RecordDict({_LOST: ConfigRecord({"reason": content.reason})})
    array = Array(dtype="uint8", shape=(len(content),), stype="bytes", data=content)
    return RecordDict({_PAYLOAD: ArrayRecord({_BYTES: array})})


def unpack(record: RecordDict) -> bytes | NoResponse:
    """Returns the bytes of a message. A message that `pack` did not make gives NoResponse, not an error."""
    lost = record.get(_LOST)
    if isinstance(lost, ConfigRecord):
        return NoResponse(str(lost.get("reason", "no reason given"))[:2000])
    payload = record.get(_PAYLOAD)
    if not isinstance(payload, ArrayRecord) or _BYTES not in payload:
        return NoResponse("failed: the message is not an answer of fedsb")
    return bytes(payload[_BYTES].data)
