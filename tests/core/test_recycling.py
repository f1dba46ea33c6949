"""When a worker is replaced though it works."""

from __future__ import annotations

from dataclasses import replace

from mcp_broker import limits
from mcp_broker.core.metering import Bounds, Meter, Sample
from mcp_broker.core.recycling import Policy, Recycling

READY = Sample(memory_mb=40.0, cpu_s=0.0, open_files=0, connections=0)


def meter_of(calls: int = 0, mb: float = 0.0, *, is_resting: bool = True) -> Meter:
    meter = Meter(Bounds(memory_mb=100), READY)
    meter.observe(replace(READY, memory_mb=40 + mb), calls, is_resting=is_resting)
    return meter


def reason(
    policy: Policy, meter: Meter, *, jitter: float = 0.0, rss_mb: float = 50.0, now: float = 0.0
) -> str:
    return Recycling(policy, jitter, 0.0).reason(meter, rss_mb, now, is_resting=True)


def test_without_a_policy_nobody_is_replaced() -> None:
    assert reason(Policy(), meter_of(10**6), rss_mb=10**6, now=10**6) == ""


def test_calls_memory_and_age_each_have_their_last_moment() -> None:
    policy = Policy(calls=100, rss_mb=200, age_s=3600)
    assert reason(policy, meter_of(99), rss_mb=199, now=3599) == ""
    assert reason(policy, meter_of(100)) == "it has run 100 calls"
    assert reason(policy, meter_of(), rss_mb=200) == "its resident memory is 200 MB"
    assert reason(policy, meter_of(), now=3600) == "it is 3600 s old"


def test_jitter_only_ever_comes_earlier_and_by_a_fifth_at_most() -> None:
    policy = Policy(calls=100, rss_mb=200, age_s=3600)
    assert limits.RECYCLE_JITTER == 0.2
    assert reason(policy, meter_of(89), jitter=0.5, rss_mb=179, now=3239) == ""
    assert reason(policy, meter_of(90), jitter=0.5)
    assert reason(policy, meter_of(), jitter=0.5, rss_mb=180)
    assert reason(policy, meter_of(), jitter=0.5, now=3240)
    assert reason(policy, meter_of(80), jitter=0.9999)
    assert reason(Policy(calls=1), meter_of(0), jitter=0.9999) == "", "each runs one call at least"


def test_a_throttled_worker_that_rests_and_does_not_let_go_is_replaced() -> None:
    recycling = Recycling(Policy(), 0.0, 0.0)
    full, freed = meter_of(1, 97), meter_of(1, 10)
    assert recycling.reason(full, 137, 10.0, is_resting=False) == "", "its call may yet"
    assert recycling.reason(full, 137, 11.0, is_resting=True) == ""
    assert recycling.reason(freed, 50, 12.0, is_resting=True) == ""
    assert recycling.reason(full, 137, 13.0, is_resting=True) == ""
    later = 13.0 + limits.THROTTLED_REST_S
    assert recycling.reason(full, 137, later - 0.01, is_resting=True) == ""
    said = recycling.reason(full, 137, later, is_resting=True)
    assert said == "it holds 97 of memory_mb = 100, and does not let go"
