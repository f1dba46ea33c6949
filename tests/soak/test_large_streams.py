"""A gigabyte goes through the broker, in and out, and neither its memory nor its other callers notice."""

from __future__ import annotations

import concurrent.futures
import os
import time
from typing import TYPE_CHECKING

import pytest

from bench import kernel
from mcp_broker import limits
from tests.support.load import MIB
from tests.support.pulse import pulse
from tests.support.running import CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def test_bytes_without_end_leave_memory_and_others_alone(running: Running, soak: Soak) -> None:
    chunks, samples = soak.count(sample=256, full=4096), soak.count(sample=100, full=500)
    block = os.urandom(CHUNK)
    pid = running.status()["broker"]["pid"]
    with running.client() as client, pulse(running.profile) as other:
        other.look(10)
        idle = other.look(samples)
        before = highest = kernel.sample(pid).rss_bytes
        began = time.perf_counter()
        future = client.submit("big.size", {"data": (block for _ in range(chunks))}, timeout_s=600)
        while not future.done():
            highest = max(highest, kernel.sample(pid).rss_bytes)
            concurrent.futures.wait([future], 0.05)
        took_in = time.perf_counter() - began
        assert future.result() == chunks * CHUNK
        uploading = other.look()
        began, received = time.perf_counter(), 0
        for part in client.stream("big.random", {"chunks": chunks, "size": CHUNK}, timeout_s=600):
            received += len(part)
            highest = max(highest, kernel.sample(pid).rss_bytes) if received % (16 * CHUNK) == 0 else highest
        took_out = time.perf_counter() - began
        downloading = other.look()
        assert received == chunks * CHUNK
    size = chunks * CHUNK / MIB
    soak.report("in", f"{size:,.0f} MiB at {size / took_in:,.0f} MiB/s; out: {size / took_out:,.0f} MiB/s")
    soak.report("broker RSS", f"{before / MIB:.1f} MiB, at most {highest / MIB:.1f} MiB")
    soak.report(
        "p99 of an echo every 10 ms",
        f"{idle.p99_ms:.1f} ms alone, {uploading.p99_ms:.1f} ms in ({uploading.count} echoes),"
        f" {downloading.p99_ms:.1f} ms out ({downloading.count})",
    )
    assert highest - before < 64 * MIB
    assert limits.BODY_BYTES_MAX >= CHUNK
    if soak.is_full:
        assert max(uploading.p99_ms, downloading.p99_ms) < 5 * idle.p99_ms
