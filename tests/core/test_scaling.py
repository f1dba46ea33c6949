"""A pool's size by what is asked of it, under a virtual clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker.core.scaling import BUSY_SHARE, Bounds, Load, Scaler

GROW_S = 0.25
SHRINK_S = 30.0


class Pool:
    """A pool that does what its scaler says: workers are ready after a while, calls come at a rate.

    Args:
        service_s: what a call takes.
        start_s: until a new worker is ready.
    """

    def __init__(self, least: int = 1, most: int = 4, service_s: float = 0.1, start_s: float = 0.5) -> None:
        self.now = 0.0
        self.size = least
        self.scaler = Scaler(Bounds(least, most, GROW_S, SHRINK_S), self.now)
        self.service_s, self._start_s = service_s, start_s
        self.backlog = 0.0
        self._ready_at: list[float] = [0.0] * least
        self.sizes: list[int] = [least]

    def run(self, seconds: float, calls_per_s: float, step_s: float = 0.25) -> None:
        """Let calls come for so long."""
        for _ in range(round(seconds / step_s)):
            self.now += step_s
            ready = sum(at <= self.now for at in self._ready_at)
            served = min(self.backlog + calls_per_s * step_s, ready * step_s / self.service_s)
            self.backlog += calls_per_s * step_s - served
            waiting = int(self.backlog)
            rate = ready / self.service_s
            busy = ready if waiting else min(ready, round(calls_per_s * self.service_s))
            wait_s = waiting / rate if rate else float(waiting > 0)
            self.scaler.observe(Load(waiting, wait_s, ready, busy), self.now)
            self.size = self.scaler.decide(self.size, self.now)
            while len(self._ready_at) < self.size:
                self._ready_at.append(self.now + self._start_s)
            del self._ready_at[self.size :]
            if self.sizes[-1] != self.size:
                self.sizes.append(self.size)


def test_a_burst_takes_a_pool_from_its_least_to_its_most_and_back() -> None:
    pool = Pool()
    pool.run(20, calls_per_s=38)
    assert pool.sizes == [1, 2, 4], "twofold at a time, and not before the new ones were ready"
    pool.run(SHRINK_S + 20, calls_per_s=0)
    assert pool.sizes == [1, 2, 4, 3, 2, 1]


def test_a_steady_load_finds_a_size_and_keeps_it() -> None:
    pool = Pool(most=16)
    pool.run(600, calls_per_s=25)
    found = pool.size
    assert 3 <= found <= 5
    before = list(pool.sizes)
    pool.run(600, calls_per_s=25)
    assert pool.sizes == before, "it does not flap"


def test_bursts_that_come_back_find_their_workers() -> None:
    pool = Pool()
    for _ in range(20):
        pool.run(5, calls_per_s=38)
        pool.run(SHRINK_S / 2, calls_per_s=0)
    assert pool.sizes == [1, 2, 4]


def test_a_short_wait_is_no_reason_to_grow() -> None:
    pool = Pool()
    scaler = pool.scaler
    scaler.observe(Load(waiting=1, wait_s=GROW_S, ready=1, busy=1), 1.0)
    assert scaler.decide(1, 1.0) == 1


def test_waiting_that_more_workers_would_not_shorten_is_none() -> None:
    scaler = Pool().scaler
    scaler.observe(Load(waiting=50, wait_s=0.0, ready=1, busy=1), 1.0)
    assert scaler.decide(1, 9.0) == 1


def test_it_does_not_grow_before_those_that_start_have_had_their_chance() -> None:
    scaler = Pool(most=64).scaler
    scaler.observe(Load(waiting=100, wait_s=9.0, ready=1, busy=1), 1.0)
    assert scaler.decide(1, 1.0) == 2
    assert scaler.decide(2, 5.0) == 2
    scaler.observe(Load(waiting=100, wait_s=9.0, ready=2, busy=2), 6.0)
    assert scaler.decide(2, 6.0) == 4


def test_a_pool_without_any_worker_gets_one_for_the_first_call_and_loses_it_when_none_comes() -> None:
    pool = Pool(least=0, service_s=0.01)
    assert pool.size == 0
    pool.run(1, calls_per_s=4)
    assert pool.size == 1
    pool.run(3 * SHRINK_S, calls_per_s=0)
    assert pool.size == 0


def test_busy_workers_stay_though_nothing_waits() -> None:
    pool = Pool(most=4)
    pool.run(20, calls_per_s=38)
    pool.run(200, calls_per_s=4 * 10 * BUSY_SHARE + 3)
    assert pool.size == 4


@pytest.mark.parametrize(("size", "wanted"), [(0, 2), (1, 2), (9, 5), (3, 3)])
def test_other_bounds_are_kept_at_once(size: int, wanted: int) -> None:
    scaler = Scaler(Bounds(2, 5, GROW_S, SHRINK_S), 0.0)
    assert scaler.decide(size, 0.0) == wanted


@given(
    st.lists(
        st.tuples(
            st.integers(0, 100), st.floats(0, 60), st.integers(0, 9), st.integers(0, 9), st.floats(0, 40)
        ),
        max_size=40,
    )
)
def test_whatever_is_asked_the_size_is_within_its_bounds_and_at_most_doubles(
    loads: list[tuple[int, float, int, int, float]],
) -> None:
    scaler, size, now = Scaler(Bounds(1, 8, GROW_S, SHRINK_S), 0.0), 1, 0.0
    for waiting, wait_s, ready, busy, pause_s in loads:
        now += pause_s
        scaler.observe(Load(waiting, wait_s, ready, busy), now)
        after = scaler.decide(size, now)
        assert 1 <= after <= 8
        assert size - 1 <= after <= 2 * size
        size = after
