"""What travels: one packed, versioned envelope for every message between a site and the server.

An envelope is a safetensors file with a single tensor, all values end to end, and a header that says whose they are:
version, kind, run, client, round, sample count, basis hash, and the layout (name and shape of each tensor, compressed,
since names would outweigh a small core). Reading one never runs code and never trusts a length that it did not check.
Nothing but numpy and safetensors is needed, so a server without torch can read it.
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

VERSION = 1
LAYOUT_LIMIT = 1 << 24  # bytes of a layout when unpacked: a million tensors; more is an attack
AXES_LIMIT = 8
Kind = Literal["broadcast", "update", "basis-up", "basis-down"]
Arrays = dict[str, NDArray[np.float32]]


class PayloadError(ValueError):
    """Bytes that are no envelope of ours, or one of another version."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One message. `tensors` are float32 arrays by name."""

    kind: Kind
    run: str  # the run's id: a message of another run is refused
    round: int
    client: str = ""  # empty: from the server
    samples: int = 0  # n_k, rows behind an update
    basis: str = ""  # hash of the common tensors, see adapters/basis.py
    tensors: Arrays

    @property
    def values(self) -> int:
        return sum(array.size for array in self.tensors.values())


def pack(payload: Payload) -> bytes:
    """The envelope's bytes: the values, 4 bytes each, and a header of a few hundred bytes."""
    tensors = sorted(payload.tensors.items())  # a message is the same bytes in any process, sets or not
    for name, array in tensors:
        if array.dtype != np.float32:
            raise PayloadError(f"{name!r} is {array.dtype}; version {VERSION} carries float32")
    flat = [np.ascontiguousarray(array).reshape(-1) for _, array in tensors]
    values = np.concatenate(flat) if flat else np.zeros(0, np.float32)
    layout = json.dumps([[name, list(array.shape)] for name, array in tensors], separators=(",", ":"))
    header = {
        "version": VERSION,
        "kind": payload.kind,
        "run": payload.run,
        "round": payload.round,
        "client": payload.client,
        "samples": payload.samples,
        "basis": payload.basis,
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
    values = arrays["values"]
    if values.dtype != np.float32 or values.ndim != 1:
        raise PayloadError(f"values are {values.dtype} with {values.ndim} axes; version {VERSION} carries flat float32")
    layout = _layout(header["layout"])
    sizes = [math.prod(shape) for shape in layout.values()]
    if sum(sizes) != values.size:
        raise PayloadError(f"the layout holds {sum(sizes)} values, the envelope {values.size}")
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
    return Payload(
        kind=header["kind"],
        run=str(header["run"]),
        round=int(header["round"]),
        client=str(header["client"]),
        samples=int(header["samples"]),
        basis=str(header["basis"]),
        tensors={name: part.reshape(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)},
    )


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
