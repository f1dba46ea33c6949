"""A client that asks and never reads costs the broker no more than its window, and others nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mcp_broker import limits
from tests.support.load import MIB, broker_rss, percentile
from tests.support.mute import mute
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker import Client
    from tests.soak.conftest import Start
    from tests.support.load import Soak
    from tests.support.running import Running

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

TOOLS = '''
"""An echo, and results of any size."""
import os
from mcp_broker.worker import tool

@tool(name="t.echo", idempotent=True)
def echo(value: object = None) -> object:
    """Return the value."""
    return value

@tool(name="t.blob")
def blob(size: int) -> bytes:
    """Return so many bytes that do not compress."""
    return os.urandom(size)
'''
CALLS = 50_000


@pytest.fixture(scope="module")
def running(start: Start) -> Iterator[Running]:
    with start(tools=TOOLS, workers=2) as broker:
        yield broker


def echo_times(client: Client, calls: int) -> list[float]:
    """Call one after the other, and return how long each took, seconds."""
    times = []
    for number in range(calls):
        began = time.perf_counter()
        assert client.call("t.echo", {"value": number}, timeout_s=10) == number
        times.append(time.perf_counter() - began)
    return times


def p99_ms(times: list[float]) -> float:
    return percentile(times, 0.99) * 1000


def test_client_that_never_reads_is_bounded_by_its_window(running: Running, soak: Soak) -> None:
    profile = running.issue("mute", "t.*")
    samples = soak.count(sample=500, full=5000)
    with running.client() as other:
        echo_times(other, samples)
        before = broker_rss(running)
        alone = echo_times(other, samples)
        with mute(profile, "t.echo", {"value": "x" * 100}, CALLS) as silent:
            meanwhile = echo_times(other, samples)
            assert silent.stdout is not None
            sent = int(silent.stdout.readline())
            meanwhile += echo_times(other, samples)
            after = broker_rss(running)
        calls = other.call("system.status")["calls"]
    soak.report("submitted by the client that never reads", f"{sent:,}; {calls['refused']} refused")
    soak.report(
        "p99 of another client", f"{p99_ms(alone):.2f} ms alone, {p99_ms(meanwhile):.2f} ms meanwhile"
    )
    soak.report("broker RSS", f"{before / MIB:.1f} MiB, then {after / MIB:.1f} MiB")
    assert sent >= 5 * limits.CLIENT_WINDOW_MAX, "more than the window, and more than it may be refused"
    assert calls["refused"]["OVERLOADED"] >= limits.CLIENT_WINDOW_MAX
    assert after - before < 16 * MIB
    if soak.is_full:
        assert p99_ms(meanwhile) < 1.5 * p99_ms(alone)


def test_client_that_never_reads_large_results_holds_no_more_than_its_bound(
    running: Running, soak: Soak
) -> None:
    profile = running.issue("mute-large", "t.*")
    calls, size = soak.count(sample=300, full=1024), MIB - 100
    # and what libzmq, and a heap that is not given back at once, hold besides
    bound = limits.CLIENT_BEHIND_BYTES + 32 * MIB
    with running.client() as other:
        # the first large result of a tool comes as a surprise
        assert len(other.call("t.blob", {"size": size})) == size
        before = highest = broker_rss(running)
        with mute(profile, "t.blob", {"size": size}, calls) as silent:
            assert silent.stdout is not None
            assert int(silent.stdout.readline()) == calls
            for _ in range(soak.count(sample=5, full=20)):
                echo_times(other, 100)
                highest = max(highest, broker_rss(running))
        wait_for(lambda: other.call("system.status")["sessions"] == 1, what="the end of the session")
        # whoever reads gets it all, however much it asks for at a time
        futures = [other.submit("t.blob", {"size": size}, timeout_s=60) for _ in range(calls)]
        assert {len(future.result(60)) for future in futures} == {size}
        after = broker_rss(running)
    soak.report(
        "broker RSS",
        f"{before / MIB:.1f} MiB, at most {highest / MIB:.1f} MiB for {calls:,} results of 1 MiB",
    )
    soak.report("broker RSS after as many to a client that reads", f"{after / MIB:.1f} MiB")
    assert highest - before < bound
    assert after - before < bound
