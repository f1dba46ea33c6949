"""A gigabyte goes through the broker, in and out, and neither its memory nor its other callers notice."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from typing import TYPE_CHECKING, Self

import pytest

from bench import kernel
from mcp_broker import limits
from tests.support.load import MIB, percentile
from tests.support.running import CONFIG
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker import Client
    from tests.soak.conftest import Start
    from tests.support.load import Soak
    from tests.support.running import Running

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

TOOLS = '''
"""Bytes in chunks, both ways, and an echo."""
import os
from collections.abc import Iterator
from mcp_broker.worker import tool, ByteStream

@tool(name="big.size")
def size(data: ByteStream) -> int:
    """Return how many bytes come."""
    return sum(len(chunk) for chunk in data)

@tool(name="big.random")
def random(chunks: int, size: int) -> Iterator[bytes]:
    """Stream chunks that do not compress."""
    block = os.urandom(size)
    for _ in range(chunks):
        yield block
'''
#: the echo has a worker of its own: what is measured is the broker
ECHO_POOL = """
[pools.echo]
module = "mcp_broker_workers.echo"
"""
CHUNK = 256 * 1024


@pytest.fixture(scope="module")
def running(start: Start) -> Iterator[Running]:
    with start(tools=TOOLS, config=CONFIG + ECHO_POOL) as broker:
        yield broker


class Pulse:
    """A small echo every 10 ms, in a thread of its own, and how long each took."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.times: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            began = time.perf_counter()
            assert self._client.call("echo.echo", {"value": 7}, timeout_s=30) == 7
            self.times.append(time.perf_counter() - began)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def p99_ms(self) -> float:
        return percentile(self.times, 0.99) * 1000


def test_bytes_without_end_leave_memory_and_others_alone(running: Running, soak: Soak) -> None:
    chunks, samples = soak.count(sample=256, full=4096), soak.count(sample=100, full=500)
    block = bytes(range(256)) * (CHUNK // 256)
    pid = running.status()["broker"]["pid"]
    with running.client() as client, running.client() as other:
        with Pulse(other) as idle:
            wait_for(lambda: len(idle.times) >= samples, within_s=60, what="enough echoes to compare with")
        before = highest = kernel.sample(pid).rss_bytes
        with Pulse(other) as uploading:
            began = time.perf_counter()
            future = client.submit("big.size", {"data": (block for _ in range(chunks))}, timeout_s=600)
            while not future.done():
                highest = max(highest, kernel.sample(pid).rss_bytes)
                concurrent.futures.wait([future], 0.05)
            took_in = time.perf_counter() - began
            assert future.result() == chunks * CHUNK
        with Pulse(other) as downloading:
            began, received = time.perf_counter(), 0
            for part in client.stream("big.random", {"chunks": chunks, "size": CHUNK}, timeout_s=600):
                received += len(part)
                highest = (
                    max(highest, kernel.sample(pid).rss_bytes) if received % (16 * CHUNK) == 0 else highest
                )
            took_out = time.perf_counter() - began
        assert received == chunks * CHUNK
    size = chunks * CHUNK / MIB
    soak.report("in", f"{size:,.0f} MiB at {size / took_in:,.0f} MiB/s; out: {size / took_out:,.0f} MiB/s")
    soak.report("broker RSS", f"{before / MIB:.1f} MiB, at most {highest / MIB:.1f} MiB")
    soak.report(
        "p99 of an echo every 10 ms",
        f"{idle.p99_ms():.1f} ms alone, {uploading.p99_ms():.1f} ms in, {downloading.p99_ms():.1f} ms out",
    )
    assert highest - before < 64 * MIB
    assert limits.BODY_BYTES_MAX >= CHUNK
    if soak.is_full:
        assert max(uploading.p99_ms(), downloading.p99_ms()) < 5 * idle.p99_ms()
