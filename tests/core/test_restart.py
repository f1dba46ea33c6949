"""The arithmetic of restarts: what is counted, what waits, when it ends."""

from __future__ import annotations

import pytest

from mcp_broker.core.restart import GiveUp, Policy, Restart, Restarts, Verdict


def die(restarts: Restarts, now: float, *, ready_for_s: float = 0.0, jitter: float = 0.0) -> Verdict:
    return restarts.after_death(now, counted=True, ready_for_s=ready_for_s, jitter=jitter)


def test_first_restart_has_no_delay_and_the_next_ones_grow() -> None:
    restarts = Restarts(Policy(intensity=None, base_s=0.2, factor=2, delay_s_max=1.0))
    assert [die(restarts, now) for now in range(5)] == [Restart(s) for s in (0.0, 0.2, 0.4, 0.8, 1.0)]


def test_a_process_that_flaps_for_ever_waits_no_longer_than_the_maximum() -> None:
    restarts = Restarts(Policy(intensity=None, delay_s_max=3.0))
    assert [die(restarts, now) for now in range(5000)][-1] == Restart(3.0)


@pytest.mark.parametrize(("jitter", "after_s"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_jitter_takes_away_its_share_of_the_delay(jitter: float, after_s: float) -> None:
    restarts = Restarts(Policy(base_s=1.0, jitter=0.5))
    die(restarts, 0.0)
    assert die(restarts, 1.0, jitter=jitter) == Restart(after_s)


def test_more_deaths_than_the_intensity_within_the_period_is_giving_up() -> None:
    restarts = Restarts(Policy(intensity=2, period_s=10))
    assert isinstance(die(restarts, 0.0), Restart)
    assert isinstance(die(restarts, 4.0), Restart)
    assert die(restarts, 9.0) == GiveUp("died 3 times within 9.0 s")


def test_deaths_older_than_the_period_no_longer_count() -> None:
    restarts = Restarts(Policy(intensity=2, period_s=10))
    assert all(isinstance(die(restarts, now), Restart) for now in (0.0, 5.0, 10.5, 16.0, 21.5))


def test_a_death_charged_to_a_call_is_neither_counted_nor_delayed() -> None:
    restarts = Restarts(Policy(intensity=1))
    die(restarts, 0.0)
    for now in range(100):
        assert restarts.after_death(now, counted=False, ready_for_s=0.0, jitter=0.9) == Restart(0.0)
    assert restarts.total == 101


def test_a_healthy_life_clears_the_record() -> None:
    restarts = Restarts(Policy(intensity=1, healthy_s=5.0))
    die(restarts, 0.0)
    assert die(restarts, 6.0, ready_for_s=5.0) == Restart(0.0)
    assert isinstance(die(restarts, 7.0, ready_for_s=1.0), GiveUp)


def test_an_operator_clears_the_record() -> None:
    restarts = Restarts(Policy(intensity=0))
    assert isinstance(die(restarts, 0.0), GiveUp)
    restarts.forget()
    assert isinstance(die(restarts, 0.1), GiveUp)
    relaxed = Restarts(Policy(intensity=1))
    die(relaxed, 0.0)
    relaxed.forget()
    assert die(relaxed, 0.1) == Restart(0.0)


def test_a_shortage_waits_longer_each_time_and_never_ends_the_tries() -> None:
    restarts = Restarts(Policy(intensity=1, base_s=0.2, shortage_s_max=1.0))
    delays = [restarts.after_shortage(0.0).after_s for _ in range(6)]
    assert delays == [0.0, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert isinstance(die(restarts, 0.0), Restart), "none of them was a death"
