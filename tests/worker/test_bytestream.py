"""What a tool reads an upload from, and what its worker holds of it."""

from __future__ import annotations

import asyncio
import json
from collections import deque

import pytest

from mcp_broker.errors import InvalidArgument
from mcp_broker.worker import ByteStream, tool
from mcp_broker.worker.uploads import Received


def test_stream_gives_chunks_or_reads_like_a_file() -> None:
    assert list(ByteStream([b"ab", b"", b"c"])) == [b"ab", b"c"]
    stream = ByteStream([b"abc", b"defg", b"h"])
    assert (stream.read(2), stream.read(3), next(stream), stream.read(), stream.read(1), stream.read()) == (
        *(b"ab", b"cde", b"fg"),
        *(b"h", b"", b""),
    )
    assert ByteStream(b"whole").read(0) == b""
    assert ByteStream(b"whole").read(100) == b"whole"


def test_stream_is_read_by_async_for_too() -> None:
    async def read() -> list[bytes]:
        return [chunk async for chunk in ByteStream([b"a", b"b"])]

    assert asyncio.run(read()) == [b"a", b"b"]


def test_tool_says_which_argument_it_reads_and_takes_bytes_as_well() -> None:
    @tool
    def store(data: ByteStream, name: str = "x") -> int:
        return len(data.read())

    assert store.arguments.stream_parameter == "data"
    assert json.loads(store.definition.parameters)["properties"]["data"] == {
        "type": "string",
        "format": "byte-stream",
    }
    assert store.signature == "store(data: ByteStream, name: str = 'x')"
    assert store(**store.validate({"data": b"abc"})) == 3
    with pytest.raises(InvalidArgument, match="data") as refused:
        store.validate({"data": "text"})
    assert refused.value.details["faults"][0]["path"] == "/data"


def test_stream_may_be_left_out_where_its_parameter_says_so() -> None:
    @tool
    def store(data: ByteStream | None = None) -> bool:
        return data is None

    assert store.arguments.stream_parameter == "data"
    assert store(**store.validate({}))
    assert store(**store.validate({"data": None}))


def test_tool_has_one_stream_at_most() -> None:
    with pytest.raises(TypeError, match="one and two are both ByteStreams"):

        @tool
        def compare(one: ByteStream, two: ByteStream) -> bool:
            return one is two


def test_worker_asks_for_more_every_half_window() -> None:
    received = Received(deque())
    assert received.take() is None
    assert received.raised(16) == 16
    asked = []
    for number in range(32):
        received.add(bytes([number]), last=False)
        assert received.take() == bytes([number])
        asked.append(received.raised(16))
    assert [limit for limit in asked if limit] == [24, 32, 40, 48]
    received.add(b"", last=True)
    assert (received.take(), received.raised(16)) == (b"", None)
