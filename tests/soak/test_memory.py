"""Calls that have ended leave nothing behind in the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.load import MIB, broker_rss

if TYPE_CHECKING:
    from mcp_broker import Client
    from tests.soak.conftest import Start
    from tests.support.load import Soak

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

GROWTH_MAX = 8 * MIB
STEP = 10_000


def echo(client: Client, calls: int, soak: Soak) -> None:
    for done in range(0, calls, STEP):
        for number, value in enumerate(client.map("t.echo", ({"value": n} for n in range(STEP)))):
            assert value == number
        soak.progress(f"{done + STEP:,} of {calls:,} calls")


def test_echo_calls_leave_the_broker_s_memory_where_it_was(start: Start, soak: Soak) -> None:
    calls = soak.count(sample=50_000, full=1_000_000)
    with start() as running, running.client() as client:
        # what a broker keeps for ever, such as the records for `why`, is full after these
        echo(client, STEP, soak)
        before = broker_rss(running)
        echo(client, calls, soak)
        after = broker_rss(running)
    soak.report("broker RSS", f"{before / MIB:.1f} MiB, after {calls:,} calls {after / MIB:.1f} MiB")
    assert after - before < GROWTH_MAX
