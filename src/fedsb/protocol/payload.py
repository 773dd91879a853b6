"""What travels: one packed, versioned envelope for every message between a site and the server.

An envelope is a safetensors file with a single tensor, all values end to end, and a header that says whose they are:
version, kind, run, client, round, sample count, basis hash, codec, and the layout (name and shape of each tensor,
compressed, since names would outweigh a small core). Reading one never runs code and never trusts a length that it did
not check. Nothing but numpy and safetensors is needed, so a server without torch can read it.

With a codec other than float32 (codec.py) the single tensor is bytes: first the tensors of one value, in float32, which
may be whole numbers that say something (a rank), then all others end to end, coded.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedsb.protocol.codec import CODECS, Bytes, Codec, decode, encode, payload_bytes

VERSION = 2
LAYOUT_LIMIT = 1 << 24  # bytes of a layout when unpacked: a million tensors; more is an attack
AXES_LIMIT = 8
Kind = Literal["broadcast", "update", "basis-up", "basis-down"]
Arrays = dict[str, NDArray[np.float32]]


class PayloadError(ValueError):
    """Bytes that are no envelope of ours, or one of another version."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One message. `tensors` are float32 arrays by name: as they go in, or as a codec lets them come out."""

    kind: Kind
    run: str  # the run's id: a message of another run is refused
    round: int
    client: str = ""  # empty: from the server
    samples: int = 0  # n_k, rows behind an update
    basis: str = ""  # hash of the common tensors, see adapters/basis.py
    codec: Codec = "float32"
    tensors: Arrays

    @property
    def values(self) -> int:
        return sum(array.size for array in self.tensors.values())

    @property
    def values_bytes(self) -> int:
        """What the values take on the wire: with the codec's scales, without the header."""
        sizes = [array.size for array in self.tensors.values()]
        return payload_bytes(self.codec, sum(size for size in sizes if size != 1), sizes.count(1))


def pack(payload: Payload, draw: np.random.Generator | None = None) -> bytes:
    """The envelope's bytes: the values, 4 bytes each or as their codec makes them, and a header of some hundred bytes.

    Raises PayloadError for arrays that are not float32, ValueError where the codec rounds by a draw and has none.
    """
    tensors = sorted(payload.tensors.items())  # a message is the same bytes in any process, sets or not
    for name, array in tensors:
        if array.dtype != np.float32:
            raise PayloadError(f"{name!r} is {array.dtype}; an envelope takes float32")
    flat = [np.ascontiguousarray(array).reshape(-1) for _, array in tensors]
    values = _joined(flat) if payload.codec == "float32" else _coded(flat, payload.codec, draw)
    layout = json.dumps([[name, list(array.shape)] for name, array in tensors], separators=(",", ":"))
    header = {
        "version": VERSION,
        "kind": payload.kind,
        "run": payload.run,
        "round": payload.round,
        "client": payload.client,
        "samples": payload.samples,
        "basis": payload.basis,
        "codec": payload.codec,
        "layout": base64.b64encode(zlib.compress(layout.encode(), 9)).decode(),
    }
    return save({"values": values}, metadata={"fedsb": json.dumps(header, separators=(",", ":"))})


def unpack(data: bytes) -> Payload:
    """Raises PayloadError, saying what is wrong, for anything but an envelope of this version."""
    try:
        return _unpack(data)
    except PayloadError:
        raise
    except Exception as error:  # a stranger's bytes: whatever they make a parser do, the round goes on without them
        raise PayloadError(f"not an envelope of fedsb ({len(data)} bytes): {type(error).__name__}: {error}") from error


def _unpack(data: bytes) -> Payload:
    header = _header(data)
    if header.get("version") != VERSION:
        raise PayloadError(f"an envelope of version {header.get('version')!r:.40}; this fedsb reads version {VERSION}")
    arrays = load(data)
    if arrays.keys() != {"values"}:
        raise PayloadError(f"an envelope of {len(arrays)} tensors; version {VERSION} has one, 'values'")
    codec, values = header["codec"], arrays["values"]
    if codec not in CODECS:
        raise PayloadError(f"its codec is {codec!r:.40}; this fedsb reads {', '.join(CODECS)}")
    dtype = np.float32 if codec == "float32" else np.uint8
    if values.dtype != dtype or values.ndim != 1:
        raise PayloadError(f"values are {values.dtype} with {values.ndim} axes; {codec} is flat {dtype.__name__}")
    layout = _layout(header["layout"])
    sizes = [math.prod(shape) for shape in layout.values()]
    exact = sizes.count(1)
    if (wanted := payload_bytes(codec, sum(sizes) - exact, exact)) != values.nbytes:
        raise PayloadError(
            f"the layout holds {sum(sizes)} values, {wanted} bytes in {codec}; the envelope has {values.nbytes}"
        )
    parts = _split(values, sizes) if codec == "float32" else _decoded(values, sizes, codec)
    return Payload(
        kind=header["kind"],
        run=str(header["run"]),
        round=int(header["round"]),
        client=str(header["client"]),
        samples=int(header["samples"]),
        basis=str(header["basis"]),
        codec=codec,
        tensors={name: part.reshape(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)},
    )


def _joined(flat: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(flat) if flat else np.zeros(0, np.float32)


def _split(values: NDArray[np.float32], sizes: list[int]) -> list[NDArray[np.float32]]:
    return np.split(values, np.cumsum(sizes)[:-1]) if sizes else []


def _coded(flat: list[NDArray[np.float32]], codec: Codec, draw: np.random.Generator | None) -> Bytes:
    exact, rest = _joined([x for x in flat if x.size == 1]), _joined([x for x in flat if x.size != 1])
    return np.concatenate([encode(exact, "float32"), encode(rest, codec, draw)])


def _decoded(values: Bytes, sizes: list[int], codec: Codec) -> list[NDArray[np.float32]]:
    """The parts of these sizes. The lengths are known to fit."""
    cut, rest = 4 * sizes.count(1), [size for size in sizes if size != 1]
    exact = iter(_split(decode(values[:cut], "float32", sizes.count(1)), [1] * sizes.count(1)))
    coded = iter(_split(decode(values[cut:], codec, sum(rest)), rest))
    return [next(exact if size == 1 else coded) for size in sizes]


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise PayloadError(f"not an envelope of fedsb ({len(data)} bytes): its header claims {length} bytes")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fedsb"])
    if not isinstance(header, dict):
        raise PayloadError("not an envelope of fedsb: the header is no table")
    return header


def _layout(packed: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name. Every length is checked before anything is made of it."""
    inflate = zlib.decompressobj()
    text = inflate.decompress(base64.b64decode(packed), LAYOUT_LIMIT)
    if inflate.unconsumed_tail:
        raise PayloadError(f"a layout above {LAYOUT_LIMIT} bytes")
    layout: dict[str, tuple[int, ...]] = {}
    for name, shape in json.loads(text):
        if not isinstance(name, str) or name in layout:
            raise PayloadError(f"the layout names {name!r:.60} twice, or by no text")
        if len(shape) > AXES_LIMIT or not all(type(axis) is int and 0 <= axis < 1 << 40 for axis in shape):
            raise PayloadError(f"the layout gives {name!r:.60} the shape {shape!r:.60}")
        layout[name] = tuple(shape)
    return layout
