"""What may be given in place of bytes."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mcp_broker import limits
from mcp_broker.client.sources import chunks_of, is_source, pack_rest
from mcp_broker.client.sync import prepared
from mcp_broker.wire import payload


async def later() -> AsyncIterator[bytes]:
    yield b"a"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (io.BytesIO(), True),
        (iter([b"a"]), True),
        (later(), True),
        (b"a", False),
        ([b"a"], False),
        ("a", False),
    ],
    ids=["file", "iterator", "async", "bytes", "list", "text"],
)
def test_files_and_iterators_are_sources(value: object, expected: bool) -> None:
    assert is_source(value) is expected


def test_call_with_a_source_is_packed_without_it() -> None:
    source = iter([b"a"])
    packed, wishes = prepared("call", {"data": source, "name": "x"}, {"idle_timeout_s": 2.0})
    assert payload.unpack(packed) == {"name": "x"}
    assert wishes is not None
    assert wishes.upload is not None
    assert (wishes.upload_name, wishes.upload.source, wishes.idle_timeout_s) == ("data", source, 2.0)
    assert prepared("call", {"name": "x"}, {}) == (payload.pack({"name": "x"}), None)


def test_two_sources_or_something_else_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match="not one and two"):
        prepared("call", {"one": iter([b""]), "two": io.BytesIO()}, {})
    with pytest.raises(TypeError, match="serialize"):
        prepared("call", {"one": object()}, {})
    with pytest.raises(TypeError, match="mine"):
        pack_rest(None, None, TypeError("mine"))


@pytest.mark.parametrize(
    "source",
    [io.BytesIO(b"x" * 600_000), iter([b"x" * 600_000]), iter([b"", bytearray(b"x" * 600_000)])],
    ids=["file", "iterator", "bytearray"],
)
def test_sources_are_cut_into_chunks_that_a_message_takes(source: Any) -> None:
    sizes = [len(chunk) for chunk in chunks_of(source)]
    assert sizes == [limits.CHUNK_BYTES_MAX, limits.CHUNK_BYTES_MAX, 600_000 - 2 * limits.CHUNK_BYTES_MAX]


@pytest.mark.parametrize(
    ("source", "told"),
    [(io.StringIO("text"), "mode 'rb'"), (iter(["text"]), "text"), (iter([1]), "int, not bytes")],
)
def test_source_that_gives_no_bytes_is_the_callers_fault(source: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        list(chunks_of(source))
