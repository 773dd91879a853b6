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

from fedsb.federation.payload import LAYOUT_LIMIT, VERSION, Payload, PayloadError, pack, unpack

HEADER: dict[str, Any] = {
    "version": VERSION,
    "kind": "update",
    "run": "r",
    "round": 1,
    "client": "a",
    "samples": 3,
    "basis": "",
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
    with pytest.raises(PayloadError, match=rf"'a' is {np.dtype(dtype)}; version 1 carries float32"):
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
    future = save({"other": np.zeros(1, np.int8)}, metadata={"fedsb": json.dumps({"version": 2})})
    with pytest.raises(PayloadError, match="an envelope of version 2; this fedsb reads version 1"):
        unpack(future)
    with pytest.raises(PayloadError, match="version None"):
        unpack(save({"values": np.zeros(1, np.float32)}, metadata={"fedsb": "{}"}))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        pytest.param([["a", [7]]], "the layout holds 7 values, the envelope 6", id="too many"),
        pytest.param([["a", [5]]], "the layout holds 5 values, the envelope 6", id="too few"),
        pytest.param([], "the layout holds 0 values, the envelope 6", id="none"),
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
