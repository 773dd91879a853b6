"""The envelope: what goes in comes out, and whatever else comes in is refused with a PayloadError, nothing else."""

from __future__ import annotations

import base64
import json
import math
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedsb.protocol.codec import CODECS, payload_bytes
from fedsb.config.training import Codec
from fedsb.protocol.payload import LAYOUT_LIMIT, VERSION, Payload, PayloadError, pack, unpack
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
}


def packed_layout(layout: Any) -> str:
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    return base64.b64encode(zlib.compress(text)).decode()


def forge(layout: Any, /, count: int = 6, tensors: dict[str, Any] | None = None, **header: Any) -> bytes:
    """An envelope of `count` values whose layout and header say what the test wants."""
    arrays = {"values": np.zeros(count, np.float32)} if tensors is None else tensors
    facts = {**HEADER, "layout": packed_layout(layout), **header}
    return save(arrays, metadata={"fedsb": json.dumps(facts)})


def test_round_trip() -> None:
    payload = Payload(
        kind="update",
        run="run",
        round=7,
        client="the client / ü [x]",
        samples=12,
        basis="hash",
        tensors={
            "layer.R": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
            "scalar": np.array(2.5, np.float32),
            "empty": np.zeros((0, 4), np.float32),
            "strided": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        },
    )
    back = unpack(pack(payload))
    assert {key: getattr(back, key) for key in vars(back) if key != "tensors"} == {
        key: getattr(payload, key) for key in vars(payload) if key != "tensors"
    }
    assert back.values == 6 + 1 + 0 + 6 + 4
    assert list(back.tensors) == sorted(payload.tensors)
    for name, array in payload.tensors.items():
        assert back.tensors[name].shape == array.shape
        assert back.tensors[name].tobytes() == array.tobytes()


def test_no_tensors() -> None:
    back = unpack(pack(Payload(kind="broadcast", run="r", round=0, tensors={})))
    assert back.tensors == {} and back.values == 0


def test_the_same_message_is_the_same_bytes() -> None:
    """Whatever order the tensors came in; a set of names has another order in every process."""
    a, b = np.ones((2, 2), np.float32), np.zeros(3, np.float32)
    one, other = ({"a": a, "b": b}, {"b": b, "a": a})
    assert pack(Payload(kind="update", run="r", round=0, tensors=one)) == pack(
        Payload(kind="update", run="r", round=0, tensors=other)
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_only_float32_goes_in(dtype: Any) -> None:
    with pytest.raises(PayloadError, match=rf"'a' is {np.dtype(dtype)}; an envelope takes float32"):
        pack(Payload(kind="update", run="r", round=0, tensors={"a": np.zeros(2, dtype)}))


def test_every_torn_envelope_is_refused() -> None:
    whole = pack(Payload(kind="update", run="r", round=0, tensors={"a": np.ones(3, np.float32)}))
    for length in range(len(whole)):
        with pytest.raises(PayloadError):
            unpack(whole[:length])


def test_a_flipped_byte_is_refused_or_harmless() -> None:
    """No checksum here: the values may change, but nothing other than PayloadError is ever raised."""
    whole = pack(Payload(kind="update", run="r", round=0, tensors={"a": np.ones(3, np.float32)}))
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
    future = save({"other": np.zeros(1, np.int8)}, metadata={"fedsb": json.dumps({"version": 3})})
    with pytest.raises(PayloadError, match="an envelope of version 3; this fedsb reads version 2"):
        unpack(future)
    with pytest.raises(PayloadError, match="version None"):
        unpack(save({"values": np.zeros(1, np.float32)}, metadata={"fedsb": "{}"}))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        pytest.param([["a", [7]]], "holds 7 values, 28 bytes in float32; the envelope has 24", id="too many"),
        pytest.param([["a", [5]]], "the layout holds 5 values, 20 bytes", id="too few"),
        pytest.param([], "the layout holds 0 values, 0 bytes", id="none"),
        pytest.param([["a", [-1]], ["b", [7]]], r"the shape \[-1\]", id="negative"),
        pytest.param([["a", [-2, -3]]], r"the shape \[-2, -3\]", id="negative twice"),
        pytest.param([["a", [2**62, 4]]], "the shape", id="huge"),
        pytest.param([["a", [2**39] * 8]], "the layout holds", id="huge product"),
        pytest.param([["a", [10**4000]]], "the shape", id="a very long number"),
        pytest.param([["a", [1] * 9]], "the shape", id="too many axes"),
        pytest.param([["a", [6.0]]], "the shape", id="no whole number"),
        pytest.param([["a", [True, 6]]], "the shape", id="truth"),
        pytest.param([["a", ["6"]]], "the shape", id="text"),
        pytest.param([["a", 6]], "TypeError", id="no list"),
        pytest.param([["a", [3]], ["a", [3]]], "names 'a' twice", id="twice"),
        pytest.param([[["a"], [6]]], "twice, or by no text", id="name is a list"),
        pytest.param([["a", [0, 2**39]], ["b", [6]]], None, id="empty but wide"),
        pytest.param({"a": [6]}, "ValueError", id="a table"),
        pytest.param(b"[" * 100_000, "RecursionError", id="deep"),
        pytest.param(b"\x80abc", "UnicodeDecodeError", id="no text"),
        pytest.param(b"[[", "JSONDecodeError", id="torn"),
        pytest.param(b" " * (LAYOUT_LIMIT + 1), "a layout above", id="zip bomb"),
        pytest.param(b"9" * 100_000, "ValueError", id="a number only"),
    ],
)
def test_a_layout_that_lies(layout: Any, said: str | None) -> None:
    started = time.perf_counter()
    if said is None:
        assert unpack(forge(layout)).tensors["a"].size == 0
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
    with pytest.raises(PayloadError, match="a layout above"):
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
    with pytest.raises(PayloadError, match="not an envelope"):
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

LOSSY: tuple[Codec, ...] = ("bfloat16", "int8", "int4")


def coded(codec: Codec) -> bytes:
    draw = keyed_generator(0, "values")
    tensors = {
        "a.R": draw.standard_normal((2, 5, 7)).astype(np.float32),
        "b.rank": np.array([3], np.float32),
        "c.weight": draw.standard_normal((9, 9)).astype(np.float32),
        "d.empty": np.zeros((0, 4), np.float32),
        "e.scalar": np.array(-0.1, np.float32),
    }
    return pack(Payload(kind="update", run="r", round=0, codec=codec, tensors=tensors), keyed_generator(0, "codec"))


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_codec_carries(codec: Codec) -> None:
    """151 values by the codec; the two tensors of one value as they were."""
    plain, back = unpack(coded("float32")), unpack(coded(codec))
    assert back.codec == codec
    assert list(back.tensors) == list(plain.tensors)
    for name, array in plain.tensors.items():
        got = back.tensors[name]
        assert got.shape == array.shape and got.dtype == np.float32
        bound = {"float32": 0, "bfloat16": 2**-8 * 4, "int8": 4 / 127, "int4": 4 / 7}[codec]
        assert np.all(np.abs(got - array) <= (0 if array.size == 1 else bound))
    assert back.values_bytes == payload_bytes(codec, 151, exact=2)
    assert back.values_bytes == {"float32": 612, "bfloat16": 310, "int8": 151 + 3 * 2 + 8, "int4": 76 + 6 + 8}[codec]
    assert len(coded("float32")) - len(coded(codec)) == pytest.approx(612 - back.values_bytes, abs=40)  # the header


@pytest.mark.parametrize("codec", LOSSY)
def test_every_torn_coded_envelope_is_refused(codec: Codec) -> None:
    whole = coded(codec)
    for length in range(len(whole)):
        with pytest.raises(PayloadError):
            unpack(whole[:length])


@pytest.mark.parametrize("codec", LOSSY)
def test_a_flipped_byte_of_a_coded_envelope_is_refused_or_harmless(codec: Codec) -> None:
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
        ([["a", [101]]], "the layout holds 101 values"),
        ([["a", [36]]], "the layout holds 36 values"),
        ([], "the layout holds 0 values, 0 bytes"),
        ([["a", [1]], ["b", [99]]], "the layout holds 100 values"),  # one of them in float32
        ([["a", [2**39] * 8]], "the layout holds"),
        ([["a", [2**62]]], "the shape"),
    ],
)
def test_a_layout_that_lies_of_coded_values(codec: Codec, layout: Any, said: str | None) -> None:
    tensors = {"values": np.zeros(payload_bytes(codec, 100), np.uint8)}
    started = time.perf_counter()
    if said is None:
        assert unpack(forge(layout, tensors=tensors, codec=codec)).values == 100
    else:
        with pytest.raises(PayloadError, match=said):
            unpack(forge(layout, tensors=tensors, codec=codec))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("codec", ["int2", "", None, 8, ["int8"], {"int8": 1}, "int8" * 100])
def test_an_unknown_codec_is_named(codec: Any) -> None:
    with pytest.raises(PayloadError, match="; this fedsb reads float32, bfloat16, int8, int4"):
        unpack(forge([["a", [6]]], codec=codec))


def test_values_of_another_codec_than_the_header_says() -> None:
    with pytest.raises(PayloadError, match="values are float32 with 1 axes; int8 is flat uint8"):
        unpack(forge([["a", [6]]], codec="int8"))
    with pytest.raises(PayloadError, match="values are uint8 with 1 axes; float32 is flat float32"):
        unpack(forge([["a", [6]]], tensors={"values": np.zeros(24, np.uint8)}))
    with pytest.raises(PayloadError, match="6 values, 8 bytes in int8; the envelope has 5"):
        unpack(forge([["a", [6]]], tensors={"values": np.zeros(5, np.uint8)}, codec="int8"))


def test_a_codec_that_rounds_by_chance_needs_a_draw() -> None:
    with pytest.raises(ValueError, match="int8 rounds by chance"):
        pack(Payload(kind="update", run="r", round=0, codec="int8", tensors={"a": np.ones(2, np.float32)}))
