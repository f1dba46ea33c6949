"""Limits that follow what is used, under a clock that the test turns."""

from __future__ import annotations

import pytest

from mcp_broker import limits
from mcp_broker.core.adaptive import Adaptive

STEP_S = limits.ADAPT_STEP_S
EVERY_S = limits.ADAPT_EVERY_S


class Clock:
    """Feeds a limit its use, a sample each ten seconds."""

    def __init__(self, base: float = 100.0, most: float = 500.0) -> None:
        self.now = 1000.0
        self.adaptive = Adaptive(base, most)
        self.changes: list[float] = []

    def use(self, *values: float) -> float:
        for value in values:
            if self.adaptive.observe(value, self.now):
                self.changes.append(self.now)
            self.now += STEP_S
        return self.adaptive.value


def test_a_steady_use_gives_itself_and_a_fifth() -> None:
    clock = Clock()
    assert clock.use(*[150.0] * 40) == pytest.approx(180.0)
    assert clock.adaptive.trend == pytest.approx(0.0)


def test_a_limit_never_leaves_what_was_configured() -> None:
    assert Clock().use(*[10.0] * 400) == 100.0
    assert Clock().use(*[490.0] * 400) == 500.0
    assert Clock(base=600.0, most=500.0).use(*[1000.0] * 400) == 600.0, (
        "the operator's word is above the usual"
    )


def test_growth_is_met_before_it_comes() -> None:
    clock = Clock()
    values = [50.0 + number for number in range(91)]  # 0.1 a second
    value = clock.use(*values)
    assert clock.adaptive.trend == pytest.approx(0.1)
    at_last_change = 50.0 + (clock.changes[-1] - 1000.0) / STEP_S
    assert value == pytest.approx((at_last_change + 0.1 * limits.ADAPT_AHEAD_S) * 1.2)


def test_a_use_that_falls_lowers_the_limit_when_its_hour_is_over() -> None:
    clock = Clock()
    assert clock.use(*[300.0] * 40) == pytest.approx(360.0)
    within = clock.use(*[50.0] * 100)
    assert within >= 300.0, "a burst of this hour may come again"
    assert clock.use(*[50.0] * int(limits.ADAPT_WINDOW_S / STEP_S)) == 100.0


def test_a_limit_changes_at_most_every_five_minutes_and_not_at_first_sight() -> None:
    clock = Clock()
    assert clock.use(200.0) == 100.0
    clock.use(*(200.0 + number % 7 * 10 for number in range(300)))
    assert len(clock.changes) > 1
    gaps = [after - before for before, after in zip(clock.changes, clock.changes[1:], strict=False)]
    assert min(gaps) >= EVERY_S
    assert clock.changes[0] >= 1000.0 + EVERY_S


def test_many_samples_of_ten_seconds_take_the_place_of_one() -> None:
    adaptive = Adaptive(1.0, 1000.0)
    for number in range(200_000):
        adaptive.observe(float(number % 50), number * 0.05)
    assert len(adaptive._history) <= limits.ADAPT_WINDOW_S / STEP_S + 1
    assert adaptive.highest == 49.0
    assert adaptive.average == pytest.approx(49.0)


def test_before_any_sample_there_is_nothing_to_say() -> None:
    adaptive = Adaptive(5.0, 10.0)
    assert (adaptive.average, adaptive.trend, adaptive.highest, adaptive.predicted(0.0)) == (0, 0, 0, 0)
