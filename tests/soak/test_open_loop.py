"""Calls that arrive at a fixed rate, whoever is late: each ends well, and the broker's memory has a bound."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.load import MIB, broker_rss

if TYPE_CHECKING:
    from tests.soak.conftest import Start
    from tests.support.load import Soak

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

TOOLS = '''
"""The smallest tool that takes and returns bytes."""
from mcp_broker.worker import tool

@tool(name="t.echo")
def echo(blob: bytes) -> bytes:
    """Return what came."""
    return blob
'''

RSS_MAX = 512 * MIB
ADDED_P99_MS = 50.0
WHOLE_P99_MS = 200.0


def test_calls_at_fixed_instants_are_all_answered_within_the_broker_s_memory(
    start: Start, soak: Soak
) -> None:
    rate, seconds = soak.count(sample=1000, full=5000), soak.count(sample=5, full=60)
    with start(tools=TOOLS) as running:
        # neither an admin nor allowed everything: each call is looked at
        profile = running.issue("caller", "t.*")
        command = [sys.executable, "-m", "bench.openloop", "--json", "--profile", str(profile)]
        command += ["--tool", "t.echo", "--rate", str(rate), "--seconds", str(seconds)]
        before = broker_rss(running)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = broker_rss(running)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    soak.report("calls", f"{report['calls']:,} at {rate:,}/s, {report['outcomes']}, lost {report['lost']}")
    soak.report("whole call", f"p50 {report['whole_p50_ms']:.2f} ms, p99 {report['whole_p99_ms']:.2f} ms")
    soak.report(
        "added to the tool's own time",
        f"p50 {report['added_p50_ms']:.2f} ms, p99 {report['added_p99_ms']:.2f} ms",
    )
    soak.report("driver late by", f"p99 {report['late_p99_ms']:.2f} ms (in the figures above)")
    soak.report("broker RSS", f"{before / MIB:.1f} MiB before, {after / MIB:.1f} MiB after")
    assert report["calls"] == rate * seconds
    assert report["lost"] == 0
    assert report["outcomes"] == {"OK": rate * seconds}
    assert after < RSS_MAX
    if soak.is_full:
        assert report["added_p99_ms"] < ADDED_P99_MS
        assert report["whole_p99_ms"] < WHOLE_P99_MS
