"""Payloads: what one side packs the other unpacks, and bytes from strangers cost a MalformedFrame."""

from __future__ import annotations

import collections
import enum
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker.errors import MalformedFrame
from mcp_broker.wire import payload
from tests.wire import strategies


@given(strategies.payloads)
def test_payload_survives_the_wire(value: Any) -> None:
    assert payload.unpack(payload.pack(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_become_a_payload_or_a_malformed_frame(data: bytes) -> None:
    for unpack in (payload.unpack, payload.unpack_map):
        try:
            unpack(data)
        except MalformedFrame:
            continue


@given(st.dictionaries(st.text(strategies.TEXT), strategies.payloads, max_size=4))
def test_map_survives_the_wire(value: dict[str, Any]) -> None:
    assert payload.unpack_map(payload.pack(value)) == value


@pytest.mark.parametrize("value", [None, 1, "text", [], b"", [{}]], ids=repr)
def test_arguments_must_be_a_map(value: Any) -> None:
    with pytest.raises(MalformedFrame):
        payload.unpack_map(payload.pack(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x01",
        b"\x81\x01\x01",
        b"\x81\x90\x01",
        b"\xa1\xff",
        b"\xd4\x05\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
    ],
    ids=lambda data: data[:4].hex(),
)
def test_hostile_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFrame):
        payload.unpack(data)


def test_map_with_bytes_for_keys_is_no_arguments() -> None:
    with pytest.raises(MalformedFrame):
        payload.unpack_map(msgpack.packb({b"a": 1}))


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, print], ids=lambda value: type(value).__name__)
def test_what_msgpack_cannot_carry_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        payload.pack(value)


def test_unpaired_surrogate_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        payload.pack("\ud800")


def test_tuples_become_lists() -> None:
    assert payload.unpack(payload.pack((1, (2, 3)))) == [1, [2, 3]]


@pytest.mark.parametrize("seconds", [1, 2**33 + 0.5, 2.0**40])
def test_timestamp_is_read_as_its_seconds(seconds: float) -> None:
    stamp = msgpack.Timestamp.from_unix_nano(int(seconds * 10**9))
    assert payload.unpack(msgpack.packb({"at": [stamp]})) == {"at": [seconds]}


@pytest.mark.parametrize(
    "value", [msgpack.ExtType(5, b""), {"at": [msgpack.ExtType(127, b"1234")]}], ids=repr
)
def test_ext_types_are_refused_by_whoever_receives_them(value: Any) -> None:
    with pytest.raises(MalformedFrame):
        payload.unpack(msgpack.packb(value))


def test_bytes_that_look_like_a_timestamp_are_no_timestamp() -> None:
    assert payload.unpack(payload.pack({"raw": b"\xd6\xff1234"})) == {"raw": b"\xd6\xff1234"}


def test_subclasses_are_packed_as_what_they_are() -> None:
    class Shade(enum.IntEnum):
        DARK = 7

    value = collections.OrderedDict(shade=Shade.DARK, pair=(1, 2))
    assert payload.unpack(payload.pack(value)) == {"shade": 7, "pair": [1, 2]}


def test_value_that_cannot_be_packed_leaves_nothing_behind_for_the_next() -> None:
    with pytest.raises(TypeError):
        payload.pack([1, 2, object()])
    assert payload.pack([3]) == b"\x91\x03"


def test_integer_beyond_64_bits_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="range"):
        payload.pack(2**64)
