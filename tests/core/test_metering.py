"""What a worker uses against what it may: levels, what they are counted from, and when they change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mcp_broker.core.metering import LIMITS, TABLE, Band, Bounds, Level, Meter, Rest, Sample, band

READY = Sample(memory_mb=40.0, cpu_s=1.0, processes=0, open_files=0, connections=2, scratch_mb=0.0)
BOUNDS = Bounds(memory_mb=100, cpu_s=10, open_files=20, connections=4, processes=2, scratch_mb=50)


def metered() -> Meter:
    return Meter(BOUNDS, READY)


def memory(meter: Meter, mb: float) -> Level:
    meter.observe(replace(READY, memory_mb=40.0 + mb), 1, is_resting=False)
    return meter.reading.level


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, Band.LOW),
        (0.7499, Band.LOW),
        (0.75, Band.CALM),
        (0.8, Band.HIGH),
        (0.9, Band.CLOSE),
        (0.95, Band.TIGHT),
        (1.0, Band.OVER),
        (7.0, Band.OVER),
    ],
)
def test_a_share_is_in_one_band(share: float, expected: Band) -> None:
    assert band(share) is expected


#: what each level means for the next sample, written again by hand
EXPECTED = {
    Level.NORMAL: "NNWWTE",
    Level.WARNING: "NWWWTE",
    Level.THROTTLE: "NWWTTE",
    Level.EXCEEDED: "EEEEEE",
}
SHARES = {Band.LOW: 10, Band.CALM: 77, Band.HIGH: 85, Band.CLOSE: 92, Band.TIGHT: 97, Band.OVER: 100}
TO_REACH = {Level.NORMAL: 0, Level.WARNING: 85, Level.THROTTLE: 97, Level.EXCEEDED: 101}


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("in_band", Band)
def test_every_level_goes_where_the_table_says(level: Level, in_band: Band) -> None:
    meter = metered()
    assert memory(meter, TO_REACH[level]) is level
    after = memory(meter, SHARES[in_band])
    assert after.name[0] == EXPECTED[level][in_band]
    assert TABLE[level][in_band] is after


def test_the_table_has_a_cell_for_every_level_and_band() -> None:
    assert [len(row) for row in TABLE] == [len(Band)] * len(Level)


def test_only_growth_above_what_it_held_when_it_was_ready_counts() -> None:
    meter = metered()
    assert memory(meter, 0) is Level.NORMAL
    assert meter.used["memory_mb"] == 0
    assert memory(meter, -10) is Level.NORMAL, "it let go of something"
    meter.observe(replace(READY, connections=2 + 4), 1, is_resting=False)
    assert meter.used["connections"] == 4


@pytest.mark.parametrize("limit", ["open_files", "connections", "processes"])
def test_a_count_may_reach_its_limit_and_not_pass_it(limit: str) -> None:
    meter = metered()
    allowed = getattr(BOUNDS, limit) + getattr(READY, limit)
    meter.observe(replace(READY, **{limit: allowed}), 1, is_resting=False)
    assert meter.reading.level < Level.EXCEEDED
    assert meter.observe(replace(READY, **{limit: allowed + 1}), 1, is_resting=False)
    assert (meter.reading.level, meter.reading.limit) == (Level.EXCEEDED, limit)


def test_nothing_is_allowed_where_the_limit_is_none() -> None:
    meter = Meter(replace(BOUNDS, processes=0), READY)
    levels = []
    for processes in (0, 1):
        meter.observe(replace(READY, processes=processes), 1, is_resting=False)
        levels.append(meter.reading.level)
    assert levels == [Level.NORMAL, Level.EXCEEDED]


def test_cpu_counts_for_the_call_that_runs() -> None:
    meter = metered()
    meter.observe(replace(READY, cpu_s=9.0), 1, is_resting=False)
    assert meter.used["cpu_s"] == 8.0, "it rested before, so all since is the call's"
    meter.observe(replace(READY, cpu_s=9.5), 2, is_resting=False)
    assert meter.used["cpu_s"] == 0.0, "what went before was another's"
    meter.observe(replace(READY, cpu_s=19.4), 2, is_resting=False)
    assert meter.reading.level is Level.THROTTLE
    meter.observe(replace(READY, cpu_s=19.45), 2, is_resting=True)
    assert (meter.reading.level, meter.used["cpu_s"]) == (Level.NORMAL, 0.0)
    assert meter.peaks["cpu_s"] == pytest.approx(9.9)


def test_a_worker_that_says_that_it_rests_and_burns_cpu_does_not_rest() -> None:
    rest = Rest(now=0.0)
    assert rest.observe(5.0, 1, 1.0, is_resting=True), "what it used was the call's, which has just ended"
    assert not rest.observe(6.0, 1, 2.0, is_resting=True)
    assert not rest.observe(6.1, 1, 2.1, is_resting=True)
    assert not rest.observe(6.2, 1, 2.2, is_resting=False)
    assert not rest.observe(6.3, 1, 2.3, is_resting=True), "it says so for the second time of the same call"
    assert rest.observe(6.7, 1, 3.3, is_resting=True), "a little is used by who rests, too"
    assert rest.observe(8.0, 9, 4.3, is_resting=True), "others have run since"


def test_cpu_of_a_worker_that_does_not_rest_as_it_says_counts_from_where_it_was_believed() -> None:
    meter, rest = metered(), Rest(now=0.0)
    for second in range(12):
        sample = replace(READY, cpu_s=1.0 + second)
        meter.observe(sample, 1, is_resting=rest.observe(sample.cpu_s, 1, float(second), is_resting=True))
    assert (meter.reading.level, meter.reading.limit) == (Level.EXCEEDED, "cpu_s")


def test_a_call_among_several_since_the_last_look_is_not_charged_what_they_used() -> None:
    meter = metered()
    meter.observe(replace(READY, cpu_s=5.0), 4, is_resting=False)
    assert meter.used["cpu_s"] == 0.0
    assert meter.calls == 4
    meter.observe(replace(READY, cpu_s=16.0), 4, is_resting=False)
    assert meter.reading.level is Level.EXCEEDED


def test_calls_are_counted_over_connections_that_number_them_anew() -> None:
    meter = metered()
    for seq in (3, 7, 2, 5):
        meter.observe(READY, seq, is_resting=True)
    assert meter.calls == 12


def test_what_was_not_looked_at_stays_as_it_was() -> None:
    meter = metered()
    meter.observe(replace(READY, open_files=18, scratch_mb=45), 1, is_resting=False)
    meter.observe(replace(READY, open_files=None, connections=None, scratch_mb=None), 1, is_resting=False)
    assert (meter.used["open_files"], meter.used["scratch_mb"]) == (18, 45)


def test_a_change_is_told_once_and_names_the_limit_of_which_most_is_used() -> None:
    meter = metered()
    high = replace(READY, memory_mb=40 + 85)
    assert meter.observe(high, 1, is_resting=False)
    assert not meter.observe(high, 1, is_resting=False)
    assert meter.reading.limit == "memory_mb"
    assert meter.observe(replace(high, scratch_mb=45), 1, is_resting=False)
    assert (meter.reading.level, meter.reading.limit, meter.reading.used) == (Level.WARNING, "scratch_mb", 45)
    assert meter.observe(READY, 1, is_resting=False)
    assert meter.reading.level is Level.NORMAL
    assert not meter.observe(replace(READY, scratch_mb=10), 1, is_resting=False), "nobody asks which it is"


def test_limits_that_are_raised_count_from_the_next_sample() -> None:
    meter = metered()
    assert memory(meter, 96) is Level.THROTTLE
    meter.bounds = replace(BOUNDS, memory_mb=200)
    assert memory(meter, 96) is Level.NORMAL


def test_every_limit_of_the_configuration_is_metered() -> None:
    assert set(LIMITS) == {"memory_mb", "cpu_s", "open_files", "connections", "processes", "scratch_mb"}
