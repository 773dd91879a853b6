"""The values of a message as bytes: a safetensors file with one tensor, which any language can read.

Its metadata contain: kind, run, round, client, samples, hash of the shared state, codec, and the layout (name and shape
of each tensor, compressed, because names would need more bytes than a small core). Reading a payload never runs code,
and checks every length before it uses it.

With a codec other than float32 (codec.py) the single tensor is bytes: first the tensors of one value, in float32, then
all others concatenated and encoded. If only a part of the values is sent (part.py), they are in the same order, and the
layout is that of all values.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedsb.adapters.layout import Layout
from fedsb.config.training import Codec
from fedsb.protocol.codec import CODECS, Bytes, decode, encode, payload_bytes
from fedsb.protocol.part import Part, single_values

VERSION = 4
LAYOUT_LIMIT = 1 << 24  # bytes of a layout when unpacked: a million tensors; more is an attack
AXES_LIMIT = 8
Kind = Literal["start", "broadcast", "update", "basis-up", "basis-down"]
Vector = NDArray[np.float32]


class PayloadError(ValueError):
    """Raised for bytes that are not a fedsb payload, or have a different version."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """The values of one message: float32 in one vector, and the layout that names its tensors."""

    kind: Kind
    run: str  # the run's id: a message of another run is refused
    round: int
    client: str = ""  # empty: from the server
    samples: int = 0  # n_k, the rows that an update was trained on
    basis: str = ""  # hash of the shared state, see adapters/basis.py
    codec: Codec = "float32"
    change: bool = False  # whether the values are to be added to what the receiver has, see compressor.py
    layout: Layout
    part: Part | None = None
    vector: Vector  # (P,): as given, or as the codec decodes it; (its size,): the values at `part.places(layout)`

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], *, kind: Kind, run: str, round: int, codec: Codec = "float32"
    ) -> Self:
        """Returns a payload of these tensors, from the server."""
        layout = Layout.of(tensors)
        vector = layout.flatten(tensors).cpu().numpy()
        return cls(kind=kind, run=run, round=round, codec=codec, layout=layout, vector=vector)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name: views of one copy of the vector, so that the message's bytes are not changed.

        Raises PayloadError if only a part of the values was sent.
        """
        if self.part is not None:
            raise PayloadError("A part of the values, where all are expected.")
        return self.layout.views(torch.from_numpy(self.vector.copy()))

    @property
    def values(self) -> int:
        """The number of values that are sent."""
        return len(self.vector)

    @property
    def values_bytes(self) -> int:
        """The bytes that the values take on the wire: with the codec's scales, without the header."""
        return payload_bytes(self.codec, *_counts(self.layout, self.part))

    def only(self, part: Part | None) -> Payload:
        """Returns the payload of one part of its values; all of them for None."""
        return self if part is None else replace(self, part=part, vector=self.vector[part.places(self.layout)])

    def whole(self, expected: Layout) -> Payload:
        """Returns the payload of all values, with zeros for those that were not sent.

        Raises PayloadError for another layout, which could claim more values than fit into memory.
        """
        if self.part is None:
            return self
        if self.layout != expected:
            raise PayloadError(f"A part of {self.layout.size} values with a layout that is not this round's.")
        vector = np.zeros(self.layout.size, np.float32)
        vector[self.part.places(self.layout)] = self.vector
        return replace(self, part=None, vector=vector)


def pack(payload: Payload, draw: np.random.Generator | None = None) -> bytes:
    """Returns the message's bytes: the values as their codec encodes them, and a header of some hundred bytes.

    Raises PayloadError for a vector that is not float32, ValueError where the codec rounds by a draw and has none.
    """
    if payload.vector.dtype != np.float32:
        raise PayloadError(f"The values are {payload.vector.dtype}. A payload takes float32.")
    values = payload.vector if payload.codec == "float32" else _encoded(payload, draw)
    layout = json.dumps([[name, list(shape)] for name, shape in payload.layout.shapes], separators=(",", ":"))
    header = {
        "version": VERSION,
        "kind": payload.kind,
        "run": payload.run,
        "round": payload.round,
        "client": payload.client,
        "samples": payload.samples,
        "basis": payload.basis,
        "codec": payload.codec,
        "change": payload.change,
        "part": asdict(payload.part) if payload.part else None,
        "layout": base64.b64encode(zlib.compress(layout.encode(), 9)).decode(),
    }
    return save({"values": values}, metadata={"fedsb": json.dumps(header, separators=(",", ":"))})


def unpack(data: bytes) -> Payload:
    """Raises PayloadError, saying what is wrong, for anything but a payload of this version."""
    try:
        return _unpack(data)
    except PayloadError:
        raise
    except Exception as error:  # a stranger's bytes: whatever they make a parser do, the round goes on without them
        raise PayloadError(f"Not a payload of fedsb ({len(data)} bytes): {type(error).__name__}: {error}") from error


def _unpack(data: bytes) -> Payload:
    header = _header(data)
    if header.get("version") != VERSION:
        raise PayloadError(f"A payload of version {header.get('version')!r:.40}. This fedsb reads version {VERSION}.")
    arrays = load(data)
    if arrays.keys() != {"values"}:
        raise PayloadError(f"A payload of {len(arrays)} tensors. Version {VERSION} has one, 'values'.")
    codec, values = header["codec"], arrays["values"]
    if codec not in CODECS:
        raise PayloadError(f"Its codec is {codec!r:.40}. This fedsb reads {', '.join(CODECS)}.")
    dtype = np.float32 if codec == "float32" else np.uint8
    if values.dtype != dtype or values.ndim != 1:
        raise PayloadError(f"The values are {values.dtype} with {values.ndim} axes. {codec} is flat {dtype.__name__}.")
    layout, part = _layout(header["layout"]), _part(header["part"])
    coded, exact = _counts(layout, part)
    if (expected := payload_bytes(codec, coded, exact)) != values.nbytes:
        raise PayloadError(
            f"The layout has {coded + exact} values, {expected} bytes in {codec}, but the payload has {values.nbytes}."
        )
    return Payload(
        kind=header["kind"],
        run=str(header["run"]),
        round=int(header["round"]),
        client=str(header["client"]),
        samples=int(header["samples"]),
        basis=str(header["basis"]),
        codec=codec,
        change=bool(header["change"]),
        layout=layout,
        part=part,
        vector=values if codec == "float32" else _decoded(values, layout, part, codec),
    )


def measure(data: bytes) -> tuple[Layout, int, int]:
    """Returns (the layout, the values that are sent, their bytes), from the header.

    Raises PayloadError for other bytes.
    """
    try:
        header = _header(data)
        layout = _layout(header["layout"])
        coded, exact = _counts(layout, _part(header["part"]))
        return layout, coded + exact, payload_bytes(header["codec"], coded, exact)
    except PayloadError:
        raise
    except Exception as error:
        raise PayloadError(f"Not a payload of fedsb ({len(data)} bytes): {type(error).__name__}: {error}") from error


def _counts(layout: Layout, part: Part | None) -> tuple[int, int]:
    """Returns (values that are encoded, tensors of one value, which stay float32), of those that are sent."""
    exact = layout.sizes.count(1)
    coded = layout.size - exact
    return part.size(coded) if part else coded, exact


def _exact(layout: Layout, part: Part | None) -> NDArray[np.bool_]:
    """Returns (values,), true for the tensors of one value: they may be whole numbers (a rank)."""
    if part is None:
        return single_values(layout)
    coded, exact = _counts(layout, part)
    return np.arange(coded + exact) < exact


def _encoded(payload: Payload, draw: np.random.Generator | None) -> Bytes:
    exact = _exact(payload.layout, payload.part)
    coded = encode(payload.vector[~exact], payload.codec, draw)
    return np.concatenate([encode(payload.vector[exact], "float32"), coded])


def _decoded(values: Bytes, layout: Layout, part: Part | None, codec: Codec) -> Vector:
    """Returns the decoded values. The caller has checked the lengths."""
    exact = _exact(layout, part)
    vector, count = np.empty(len(exact), np.float32), int(exact.sum())
    vector[exact] = decode(values[: 4 * count], "float32", count)
    vector[~exact] = decode(values[4 * count :], codec, len(exact) - count)
    return vector


def _part(facts: Any) -> Part | None:
    """Returns the part that the header names. Raises PayloadError for one that cannot exist."""
    if facts is None:
        return None
    seed, round, fraction = facts["seed"], facts["round"], facts["fraction"]
    if type(seed) is not int or type(round) is not int or type(fraction) is not float or not 0 < fraction <= 1:
        raise PayloadError(f"The part {facts!r:.80} is not valid.")
    return Part(seed=seed, round=round, fraction=fraction)


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise PayloadError(f"Not a payload of fedsb ({len(data)} bytes): its header claims {length} bytes.")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fedsb"])
    if not isinstance(header, dict):
        raise PayloadError("Not a payload of fedsb: the header is not a table.")
    return header


@lru_cache(maxsize=16)  # the updates of a round have the same
def _layout(packed: str) -> Layout:
    """Returns the layout. Every length is checked before it is used."""
    inflate = zlib.decompressobj()
    text = inflate.decompress(base64.b64decode(packed), LAYOUT_LIMIT)
    if inflate.unconsumed_tail:
        raise PayloadError(f"A layout of more than {LAYOUT_LIMIT} bytes.")
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in json.loads(text):
        if not isinstance(name, str) or (shapes and name <= shapes[-1][0]):
            raise PayloadError(f"The layout names {name!r:.60} twice, out of order, or not by a string.")
        if len(shape) > AXES_LIMIT or not all(type(axis) is int and 0 <= axis < 1 << 40 for axis in shape):
            raise PayloadError(f"The layout gives {name!r:.60} the shape {shape!r:.60}.")
        shapes.append((name, tuple(shape)))
    return Layout(tuple(shapes))
