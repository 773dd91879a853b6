"""Payloads: what is packed is unpacked unchanged, and any other bytes raise PayloadError, nothing else."""

from __future__ import annotations

import base64
import json
import math
import resource
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from fedsb.adapters.layout import Layout
from fedsb.config.training import Codec
from fedsb.protocol.codec import CODECS, payload_bytes
from fedsb.protocol.part import Part
from fedsb.protocol.payload import LAYOUT_LIMIT, VERSION, Payload, PayloadError, measure, pack, unpack
from fedsb.utils.rng import keyed_generator

HEADER: dict[str, Any] = {
    "version": VERSION,
    "kind": "update",
    "run": "r",
    "round": 1,
    "client": "a",
    "samples": 3,
    "basis": "",
    "codec": "float32",
    "change": False,
    "part": None,
}


def message(tensors: Mapping[str, torch.Tensor], codec: Codec = "float32", **fields: Any) -> Payload:
    return replace(Payload.of(tensors, kind="update", run="r", round=0, codec=codec), **fields)


def packed_layout(layout: Any) -> str:
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    return base64.b64encode(zlib.compress(text)).decode()


def forge(layout: Any, /, count: int = 6, tensors: dict[str, Any] | None = None, **header: Any) -> bytes:
    """A payload of `count` values with any layout and header."""
    arrays = {"values": np.zeros(count, np.float32)} if tensors is None else tensors
    facts = {**HEADER, "layout": packed_layout(layout), **header}
    return save(arrays, metadata={"fedsb": json.dumps(facts)})


def test_round_trip() -> None:
    tensors = {
        "layer.R": torch.arange(6.0).reshape(1, 2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "odd": torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
    }
    payload = message(tensors, run="run", round=7, client="the client / ü [x]", samples=12, basis="hash")
    back = unpack(pack(payload))
    fields = ("kind", "run", "round", "client", "samples", "basis", "codec", "layout")
    assert {key: getattr(back, key) for key in fields} == {key: getattr(payload, key) for key in fields}
    assert back.values == 6 + 1 + 0 + 6 + 4
    assert list(back.tensors) == sorted(tensors)
    for name, x in tensors.items():
        assert back.tensors[name].shape == x.shape
        assert back.tensors[name].numpy().tobytes() == x.numpy().tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_a_part_of_the_values_comes_back_at_its_places(codec: Codec) -> None:
    """And a tensor of one value unchanged, whatever the codec; all others are zero."""
    draw = keyed_generator(0)
    tensors = {name: torch.from_numpy(draw.standard_normal((9, 31)).astype(np.float32)) for name in ("a", "c")}
    payload = message({**tensors, "b": torch.tensor([3.0])}, codec, change=True)
    part = Part(seed=4, round=2, fraction=0.25)
    sent = payload.only(part)
    data = pack(sent, keyed_generator(1))
    back = unpack(data)
    assert back.part == part and back.change and back.layout == payload.layout
    assert back.values == len(back.vector) == 1 + math.ceil(2 * 9 * 31 / 4)
    assert back.values_bytes == payload_bytes(codec, back.values - 1, 1)
    assert measure(data) == (payload.layout, back.values, back.values_bytes)
    places, whole = part.places(payload.layout), back.whole(payload.layout)
    assert whole.part is None and whole.tensors["b"].item() == 3
    assert not np.delete(whole.vector, places).any()
    error = np.linalg.norm(whole.vector[places] - payload.vector[places]) / np.linalg.norm(payload.vector[places])
    assert error < {"float32": 1e-9, "bfloat16": 0.01, "int8": 0.02, "int4": 0.2, "int3": 0.25, "int2": 0.5}[codec]


def test_a_part_is_made_whole_in_the_expected_layout_only() -> None:
    """A message of 300 bytes can claim a layout that does not fit into memory."""
    part = {"seed": 0, "round": 0, "fraction": 1e-12}
    forged = unpack(forge([["a", [1 << 20, 1 << 20]]], tensors={"values": np.zeros(2, np.float32)}, part=part))
    expected = Layout((("a", (2, 2)),))
    with pytest.raises(PayloadError, match=r"A part of 1099511627776 values with a layout that is not this round's\."):
        forged.whole(expected)
    with pytest.raises(PayloadError, match=r"A part of the values, where all are expected\."):
        _ = forged.tensors


@pytest.mark.parametrize(
    "part",
    [
        {},
        [],
        "x",
        {"seed": "0", "round": 0, "fraction": 0.5},
        {"seed": 0, "round": 0.5, "fraction": 0.5},
        {"seed": 0, "round": 0, "fraction": 1},
        {"seed": 0, "round": 0, "fraction": 0.0},
        {"seed": 0, "round": 0, "fraction": 1.5},
        {"seed": 0, "round": 0, "fraction": math.nan},
    ],
)
def test_a_part_that_cannot_exist_is_refused(part: Any) -> None:
    with pytest.raises(PayloadError):
        unpack(forge([["a", [6]]], part=part))


def test_tensors_are_a_copy_of_the_message() -> None:
    payload = message({"a": torch.ones(2)})
    payload.tensors["a"].zero_()
    assert payload.vector.tolist() == [1.0, 1.0]


def test_no_tensors() -> None:
    back = unpack(pack(Payload.of({}, kind="broadcast", run="r", round=0)))
    assert back.tensors == {} and back.values == 0


def test_the_same_message_is_the_same_bytes() -> None:
    """In whatever order the tensors are given: the order of a set of names differs between processes."""
    a, b = torch.ones(2, 2), torch.zeros(3)
    assert pack(message({"a": a, "b": b})) == pack(message({"b": b, "a": a}))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_only_float32_goes_in(dtype: Any) -> None:
    with pytest.raises(PayloadError, match=rf"The values are {np.dtype(dtype)}\. A payload takes float32\."):
        pack(message({"a": torch.zeros(2)}, vector=np.zeros(2, dtype)))


def test_every_torn_payload_is_refused() -> None:
    whole = pack(message({"a": torch.ones(3)}))
    for length in range(len(whole)):
        with pytest.raises(PayloadError):
            unpack(whole[:length])


def test_a_flipped_byte_is_refused_or_harmless() -> None:
    """No checksum here: the values may change, but nothing other than PayloadError is ever raised."""
    whole = pack(message({"a": torch.ones(3)}))
    for position in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            torn = bytearray(whole)
            torn[position] ^= mask
            try:
                unpack(bytes(torn))
            except PayloadError:
                continue


def test_random_bytes_are_refused() -> None:
    draw = np.random.default_rng(0)
    for length in (0, 1, 7, 8, 9, 100, 1000):
        for _ in range(50):
            with pytest.raises(PayloadError):
                unpack(draw.bytes(length))
    for header in (b"{}", b"[]", b"null", b"3", b'"x"', b'{"__metadata__": {"fedsb": "[]"}}', b"[" * 100_000):
        with pytest.raises(PayloadError):
            unpack(struct.pack("<Q", len(header)) + header)


def test_another_version_is_named_before_anything_else_is_read() -> None:
    future = save({"other": np.zeros(1, np.int8)}, metadata={"fedsb": json.dumps({"version": VERSION + 1})})
    with pytest.raises(
        PayloadError, match=rf"A payload of version {VERSION + 1}\. This fedsb reads version {VERSION}\."
    ):
        unpack(future)
    with pytest.raises(PayloadError, match="version None"):
        unpack(save({"values": np.zeros(1, np.float32)}, metadata={"fedsb": "{}"}))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        pytest.param([["a", [7]]], "has 7 values, 28 bytes in float32, but the payload has 24", id="too many"),
        pytest.param([["a", [5]]], "The layout has 5 values, 20 bytes", id="too few"),
        pytest.param([], "The layout has 0 values, 0 bytes", id="none"),
        pytest.param([["a", [-1]], ["b", [7]]], r"the shape \[-1\]", id="negative"),
        pytest.param([["a", [-2, -3]]], r"the shape \[-2, -3\]", id="negative twice"),
        pytest.param([["a", [2**62, 4]]], "the shape", id="huge"),
        pytest.param([["a", [2**39] * 8]], "The layout has", id="huge product"),
        pytest.param([["a", [10**4000]]], "the shape", id="a very long number"),
        pytest.param([["a", [1] * 9]], "the shape", id="too many axes"),
        pytest.param([["a", [6.0]]], "the shape", id="no whole number"),
        pytest.param([["a", [True, 6]]], "the shape", id="truth"),
        pytest.param([["a", ["6"]]], "the shape", id="text"),
        pytest.param([["a", 6]], "TypeError", id="no list"),
        pytest.param([["a", [3]], ["a", [3]]], "names 'a' twice", id="twice"),
        pytest.param([["b", [3]], ["a", [3]]], "names 'a' twice, out of order", id="out of order"),
        pytest.param([[["a"], [6]]], "out of order, or not by a string", id="name is a list"),
        pytest.param([["a", [0, 2**39]], ["b", [6]]], None, id="empty but wide"),
        pytest.param({"a": [6]}, "ValueError", id="a table"),
        pytest.param(b"[" * 100_000, "RecursionError", id="deep"),
        pytest.param(b"\x80abc", "UnicodeDecodeError", id="no text"),
        pytest.param(b"[[", "JSONDecodeError", id="torn"),
        pytest.param(b" " * (LAYOUT_LIMIT + 1), "A layout of more than", id="zip bomb"),
        pytest.param(b"9" * 100_000, "ValueError", id="a number only"),
    ],
)
def test_a_layout_that_lies(layout: Any, said: str | None) -> None:
    started = time.perf_counter()
    if said is None:
        assert unpack(forge(layout)).tensors["a"].numel() == 0
    else:
        with pytest.raises(PayloadError, match=said):
            unpack(forge(layout))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("bomb", [200 << 20])
def test_a_zip_bomb_costs_little_memory(bomb: int) -> None:
    import tracemalloc

    data = forge(b" " * bomb)
    assert len(data) < 1 << 20
    tracemalloc.start()
    with pytest.raises(PayloadError, match="A layout of more than"):
        unpack(data)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        {"layout": "%%%"},
        {"layout": base64.b64encode(b"not zlib").decode()},
        {"layout": None},
        {"round": "x"},
        {"round": math.inf},
        {"samples": [1]},
    ],
)
def test_a_broken_header(header: dict[str, Any]) -> None:
    with pytest.raises(PayloadError, match="Not a payload of fedsb"):
        unpack(forge([["a", [6]]], **header))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"values": np.zeros(6)}, "values are float64"),
        ({"values": np.zeros((2, 3), np.float32)}, "with 2 axes"),
        ({"values": np.zeros(6, np.float32), "more": np.zeros(100, np.float32)}, "of 2 tensors"),
        ({"other": np.zeros(6, np.float32)}, "of 1 tensors"),
    ],
)
def test_values_of_another_kind(tensors: dict[str, Any], said: str) -> None:
    with pytest.raises(PayloadError, match=said):
        unpack(forge([["a", [6]]], tensors=tensors))


# --- codecs ---

LOSSY: tuple[Codec, ...] = ("bfloat16", "int8", "int4", "int3", "int2")


def coded(codec: Codec) -> bytes:
    draw = keyed_generator(0, "values")
    tensors = {
        "a.R": torch.from_numpy(draw.standard_normal((2, 5, 7))),
        "b.rank": torch.tensor([3.0]),
        "c.weight": torch.from_numpy(draw.standard_normal((9, 9))),
        "d.empty": torch.zeros(0, 4),
        "e.scalar": torch.tensor(-0.1),
    }
    return pack(message(tensors, codec), keyed_generator(0, "codec"))


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_codec_carries(codec: Codec) -> None:
    """151 values are coded; the two tensors of one value arrive unchanged."""
    plain, back = unpack(coded("float32")), unpack(coded(codec))
    assert back.codec == codec
    assert list(back.tensors) == list(plain.tensors)
    for name, x in plain.tensors.items():
        got = back.tensors[name]
        assert got.shape == x.shape and got.dtype == torch.float32
        bound = {"float32": 0, "bfloat16": 2**-8 * 4, "int8": 4 / 127, "int4": 4 / 7, "int3": 2, "int2": 4}[codec]
        assert torch.all((got - x).abs() <= (0 if x.numel() == 1 else bound))
    assert back.values_bytes == payload_bytes(codec, 151, exact=2)
    sizes = {"float32": 612, "bfloat16": 310, "int8": 151 + 3 * 2 + 8, "int4": 76 + 6 + 8}
    sizes |= {"int3": 96 + 6 + 8, "int2": 64 + 6 + 8}  # a block of 256, its scale, the key of the signs
    assert back.values_bytes == sizes[codec]
    assert len(coded("float32")) - len(coded(codec)) == pytest.approx(612 - back.values_bytes, abs=40)  # the header


@pytest.mark.parametrize("codec", LOSSY)
def test_every_torn_coded_payload_is_refused(codec: Codec) -> None:
    whole = coded(codec)
    for length in range(len(whole)):
        with pytest.raises(PayloadError):
            unpack(whole[:length])


@pytest.mark.parametrize("codec", LOSSY)
def test_a_flipped_byte_of_a_coded_payload_is_refused_or_harmless(codec: Codec) -> None:
    whole = coded(codec)
    for position in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            torn = bytearray(whole)
            torn[position] ^= mask
            try:
                unpack(bytes(torn))
            except PayloadError:
                continue


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ([["a", [100]]], None),
        ([["a", [10, 10]], ["b", [0, 5]]], None),
        ([["a", [201]]], "The layout has 201 values"),
        ([["a", [36]]], "The layout has 36 values"),
        ([["a", [2**36]]], "The layout has 68719476736 values"),
        ([], "The layout has 0 values, 0 bytes"),
        ([["a", [1]], ["b", [99]]], "The layout has 100 values"),  # one of them in float32
        ([["a", [2**39] * 8]], "The layout has"),
        ([["a", [2**62]]], "the shape"),
    ],
)
def test_a_layout_that_lies_of_coded_values(codec: Codec, layout: Any, said: str | None) -> None:
    tensors = {"values": np.zeros(payload_bytes(codec, 100), np.uint8)}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if said is None:
        assert unpack(forge(layout, tensors=tensors, codec=codec)).values == 100
    else:
        with pytest.raises(PayloadError, match=said):
            unpack(forge(layout, tensors=tensors, codec=codec))
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB; a layout is not believed


@pytest.mark.parametrize("codec", ["int5", "", None, 8, ["int8"], {"int8": 1}, "int8" * 100])
def test_an_unknown_codec_is_named(codec: Any) -> None:
    with pytest.raises(PayloadError, match=r"\. This fedsb reads float32, bfloat16, int8, int4, int3, int2\."):
        unpack(forge([["a", [6]]], codec=codec))


def test_values_of_another_codec_than_the_header_says() -> None:
    with pytest.raises(PayloadError, match=r"values are float32 with 1 axes\. int8 is flat uint8"):
        unpack(forge([["a", [6]]], codec="int8"))
    with pytest.raises(PayloadError, match=r"values are uint8 with 1 axes\. float32 is flat float32"):
        unpack(forge([["a", [6]]], tensors={"values": np.zeros(24, np.uint8)}))
    with pytest.raises(PayloadError, match="6 values, 8 bytes in int8, but the payload has 5"):
        unpack(forge([["a", [6]]], tensors={"values": np.zeros(5, np.uint8)}, codec="int8"))


def test_a_codec_that_rounds_by_chance_needs_a_draw() -> None:
    with pytest.raises(ValueError, match="int8 draws: give a generator"):
        pack(message({"a": torch.ones(2)}, "int8"))
