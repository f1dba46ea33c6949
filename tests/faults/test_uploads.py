"""Arguments in chunks, through a real broker and worker."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import AsyncClient
from mcp_broker.errors import Cancelled, DeadlineExceeded, InvalidArgument, PayloadTooLarge, ToolFailed
from tests.support.proxy import TcpProxy
from tests.support.running import CONFIG, TOOLS, Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.process, pytest.mark.slow]

MORE = '''
import hashlib
from concurrent.futures import ThreadPoolExecutor
from mcp_broker.worker import ByteStream

@tool(name="t.digest")
def digest(data: ByteStream) -> list[object]:
    """Return SHA-256 and size of what comes."""
    hashed, size = hashlib.sha256(), 0
    for chunk in data:
        hashed.update(chunk)
        size += len(chunk)
    return [hashed.hexdigest(), size]

@tool(name="t.upper")
def upper(data: ByteStream) -> Iterator[bytes]:
    """Give back each chunk in upper case."""
    for chunk in data:
        yield chunk.upper()

@tool(name="t.first")
def first(data: ByteStream) -> int:
    """Read one chunk of all that comes."""
    return len(next(data))

@tool(name="t.afar")
def afar(data: ByteStream) -> bytes:
    """Read in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(data.read).result()
'''

ASYNC_TOOLS = """
import asyncio, hashlib
from mcp_broker.worker import tool, ByteStream

@tool(name="a.digest")
async def digest(data: ByteStream) -> list[object]:
    hashed, size = hashlib.sha256(), 0
    async for chunk in data:
        hashed.update(chunk)
        size += len(chunk)
    return [hashed.hexdigest(), size]

@tool(name="a.blocking")
def blocking(data: ByteStream) -> int:
    return len(data.read())

@tool(name="a.echo")
async def echo(value: int) -> int:
    return value
"""

NOISE = random.Random(5).randbytes(9_000_000)
DIGEST = hashlib.sha256(NOISE).hexdigest()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("uploads"), tools=TOOLS + MORE) as broker:
        yield broker


def pieces() -> Iterator[bytes]:
    for at in range(0, len(NOISE), 100_000):
        yield NOISE[at : at + 100_000]


def test_file_iterator_and_bytes_arrive_whole(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(NOISE)
    with running.client() as client, path.open("rb") as file:
        assert client.call("t.digest", {"data": file}) == [DIGEST, len(NOISE)]
        assert client.call("t.digest", {"data": pieces()}) == [DIGEST, len(NOISE)]
        assert client.call("t.digest", {"data": b"abc"})[1] == 3
        assert client.call("t.digest", {"data": io.BytesIO()})[1] == 0
        future = client.submit("t.digest", {"data": io.BytesIO(NOISE)})
        assert future.result(30) == [DIGEST, len(NOISE)]


def test_upload_and_stream_at_once(running: Running) -> None:
    with running.client() as client:
        sizes = [len(part) for part in client.stream("t.upper", {"data": iter([b"ab"] * 100)})]
        assert sizes == [2] * 100


def test_upload_goes_on_over_cut_connections(running: Running) -> None:
    endpoint: str = running.status()["endpoints"]["clients"]
    with TcpProxy(endpoint) as proxy, running.client(running.profile_through(proxy.endpoint)) as client:

        def cutting() -> Iterator[bytes]:
            for number, piece in enumerate(pieces()):
                if number % 30 == 20:
                    proxy.cut()
                yield piece

        assert client.call("t.digest", {"data": cutting()}, timeout_s=60) == [DIGEST, len(NOISE)]
        assert proxy.accepted >= 3


def test_source_that_raises_cancels_the_call_and_frees_its_worker(running: Running) -> None:
    def broken() -> Iterator[bytes]:
        yield b"abc"
        raise OSError("the disk is gone")

    with running.client() as client:
        with pytest.raises(Cancelled, match="the disk is gone") as cancelled:
            client.call("t.digest", {"data": broken()})
        assert isinstance(cancelled.value.__cause__, OSError)
        assert client.call("t.echo", {"value": 1}, timeout_s=10) == 1


def test_tool_that_stops_reading_ends_the_upload(running: Running) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    with running.client() as client:
        assert client.call("t.first", {"data": endless()}) == 1000
        wait_for(
            lambda: not [one for one in threading.enumerate() if one.name == "mcp-broker-upload"],
            what="the feeding thread's end",
        )
        assert taken <= 100
        assert client.call("t.echo", {"value": 1}) == 1


def test_source_that_has_nothing_for_long_lets_the_deadline_interrupt_the_tool(running: Running) -> None:
    release = threading.Event()

    def stuck() -> Iterator[bytes]:
        yield b"abc"
        release.wait(30)

    with running.client() as client:
        before = client.call("t.pid")
        with pytest.raises(DeadlineExceeded):
            client.call("t.digest", {"data": stuck()}, timeout_s=0.5)
        assert client.call("t.pid", timeout_s=10) == before, "it was interrupted, not killed"
    release.set()


def test_tool_that_takes_no_stream_says_so_and_large_arguments_say_what_to_do(running: Running) -> None:
    with running.client() as client:
        with pytest.raises(InvalidArgument, match="does not read 'value' in chunks"):
            client.call("t.echo", {"value": io.BytesIO(b"abc")})
        with pytest.raises(PayloadTooLarge, match="ByteStream"):
            client.call("t.digest", {"data": NOISE})
        with pytest.raises(ToolFailed, match="thread that its tool was called in"):
            client.call("t.afar", {"data": io.BytesIO(b"abc")})


def test_asyncio_client_sends_files_and_both_kinds_of_iterators(running: Running) -> None:
    async def later() -> AsyncIterator[bytes]:
        for piece in pieces():
            await asyncio.sleep(0)
            yield piece

    async def broken() -> AsyncIterator[bytes]:
        yield b"abc"
        raise OSError("the disk is gone")

    async def main() -> None:
        async with AsyncClient.connect(str(running.profile)) as client:
            sources: list[Any] = [later(), pieces(), io.BytesIO(NOISE)]
            for source in sources:
                assert await client.call("t.digest", {"data": source}) == [DIGEST, len(NOISE)]
            with pytest.raises(Cancelled, match="the disk is gone"):
                await client.call("t.digest", {"data": broken()})
            assert await client.call("t.echo", {"value": 1}) == 1

    asyncio.run(main())


def test_asynchronous_tool_reads_while_others_run(tmp_path: Path) -> None:
    release = threading.Event()

    def slow() -> Iterator[bytes]:
        yield NOISE[:1000]
        assert release.wait(30)
        yield NOISE[1000:]

    with (
        Running(tmp_path, tools=ASYNC_TOOLS, config=CONFIG + "concurrency = 4\n") as running,
        running.client() as client,
    ):
        future = client.submit("a.digest", {"data": slow()})
        assert client.call("a.echo", {"value": 1}, timeout_s=10) == 1
        release.set()
        assert future.result(30) == [DIGEST, len(NOISE)]
        assert client.call("a.blocking", {"data": io.BytesIO(NOISE)}) == len(NOISE)
