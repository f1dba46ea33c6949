"""Token buckets and rate limits, by themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mcp_broker.limits as bounds
from mcp_broker.core.bucket import Bucket, Rate
from mcp_broker.core.rates import Rates
from mcp_broker.core.registry import Tool
from tests.core.support import definition

RATES = st.builds(Rate, st.floats(0.01, 10_000), st.integers(1, 100))


@settings(deadline=None)
@given(rate=RATES, gaps=st.lists(st.floats(0, 2), min_size=1, max_size=200), start=st.floats(0, 1e6))
def test_no_span_of_time_sees_more_than_its_rate_and_one_burst(
    rate: Rate, gaps: list[float], start: float
) -> None:
    bucket, now = Bucket(rate), start
    taken: list[float] = []
    for gap in gaps:
        now += gap
        if not bucket.wait_s(now):
            bucket.take(now)
            taken.append(now)
    for first, since in enumerate(taken):
        for last, until in enumerate(taken[first:], first):
            assert last - first + 1 <= rate.burst + rate.per_s * (until - since) * (1 + 1e-6) + 1e-6


@settings(deadline=None)
@given(rate=RATES, many=st.integers(1, 300))
def test_asking_without_pause_takes_the_burst_and_then_one_each_wait(rate: Rate, many: int) -> None:
    bucket, now = Bucket(rate), 50.0
    for number in range(many):
        wait_s = bucket.wait_s(now)
        assert (wait_s == 0) == (number < rate.burst)
        now += wait_s
        assert not bucket.wait_s(now), "what it said was true"
        bucket.take(now)
    served_late = max(0, many - rate.burst)
    assert now - 50.0 == pytest.approx(served_late / rate.per_s, rel=1e-6, abs=1e-6)


def test_pause_fills_a_bucket_up_to_its_burst_and_no_further() -> None:
    bucket = Bucket(Rate(10, 3))
    for now in (0.0, 100.0):
        assert bucket.is_full(now)
        for _ in range(3):
            assert not bucket.wait_s(now)
            bucket.take(now)
        assert bucket.wait_s(now) == pytest.approx(0.1)
        assert not bucket.is_full(now + 0.2)


def test_clock_that_stands_still_or_goes_back_gives_nothing_away() -> None:
    bucket = Bucket(Rate(1, 1))
    bucket.take(10.0)
    assert bucket.wait_s(10.0) == pytest.approx(1)
    assert bucket.wait_s(9.0) == pytest.approx(2)


def test_burst_that_nobody_names_is_a_seconds_calls() -> None:
    assert Rate.of(2.5, None) == Rate(2.5, 3)
    assert Rate.of(0.1, None) == Rate(0.1, 1)
    assert Rate.of(None, None) is Rate.of(None, 5) is None


def test_refused_call_takes_no_token_of_either_bucket() -> None:
    rates = Rates()
    rates.principal = Rate(1, 2)
    slow = Tool(definition("echo.slow", rate_per_s=1, burst=1), None)
    fast = Tool(definition("echo.fast"), None)
    assert rates.refusal(b"1", slow, "alice", 0.0) is None
    refusal = rates.refusal(b"2", slow, "alice", 0.0)
    assert refusal is not None
    assert refusal.code == "RATE_LIMITED"
    assert rates.refusal(b"3", fast, "alice", 0.0) is None, "her second token is still there"
    assert rates.refusal(b"4", fast, "alice", 0.0) is not None
    assert rates.refusal(b"5", fast, "bob", 0.0) is None


def test_rates_remember_a_bounded_number_of_principals_and_those_who_are_over_it_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "BUCKETS_MAX", 4)
    rates = Rates()
    rates.principal = Rate(1, 1)
    tool = Tool(definition("echo.echo"), None)
    for number in range(20):
        rates.refusal(b"x", tool, f"p{number}", number * 0.3)
        assert len(rates._buckets) <= 4
    assert rates.refusal(b"x", tool, "p19", 19 * 0.3) is not None
