"""A breaker: every cell of its table, what it counts, and that nobody closes a tool for others alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker import limits
from mcp_broker.core.breaker import COUNTS, Breaker, Event, State, Tally, event_of
from mcp_broker.errors import CALL_ERRORS, InvalidTransition
from mcp_broker.wire import messages
from tests.core.support import EPOCH, FakeGrant, World

ID = b"a" * 16


def breaker_in(state: State, now: float = 100.0) -> Breaker:
    breaker = Breaker(now)
    if state is State.CLOSED:
        return breaker
    for number in range(limits.BREAKER_CALLS_MIN):
        breaker.handle(Event.FAILED, ID, ("ann", "bob")[number % 2], now)
    if state is State.HALF_OPEN:
        assert breaker.handle(Event.ASKED, b"trial", "ann", breaker.until) == 0
    return breaker


@pytest.mark.parametrize(
    ("state", "event", "after", "answer"),
    [
        (State.CLOSED, Event.ASKED, State.CLOSED, 0.0),
        (State.CLOSED, Event.SUCCEEDED, State.CLOSED, 0.0),
        (State.CLOSED, Event.FAILED, State.CLOSED, 0.0),
        (State.CLOSED, Event.ABANDONED, State.CLOSED, 0.0),
        (State.OPEN, Event.ASKED, State.OPEN, limits.BREAKER_OPEN_S),
        (State.OPEN, Event.SUCCEEDED, State.OPEN, 0.0),
        (State.OPEN, Event.FAILED, State.OPEN, 0.0),
        (State.OPEN, Event.ABANDONED, State.OPEN, 0.0),
        (State.HALF_OPEN, Event.ASKED, State.HALF_OPEN, limits.BREAKER_TRIAL_S),
        (State.HALF_OPEN, Event.SUCCEEDED, State.CLOSED, 0.0),
        (State.HALF_OPEN, Event.FAILED, State.OPEN, 0.0),
        (State.HALF_OPEN, Event.ABANDONED, State.HALF_OPEN, 0.0),
    ],
)
def test_every_cell_of_the_table(state: State, event: Event, after: State, answer: float) -> None:
    breaker = breaker_in(state)
    assert breaker.state is state
    call_id = b"other" if event is Event.ASKED else b"trial"
    assert breaker.handle(event, call_id, "ann", 100.0) == pytest.approx(answer)
    assert breaker.state is after


def test_the_table_has_a_cell_for_every_state_and_event() -> None:
    assert [len(row) for row in Breaker.TABLE] == [len(Event)] * len(State)


def test_every_outcome_code_says_something_or_nothing_of_its_tool() -> None:
    assert set(COUNTS) == {"OK", *CALL_ERRORS}
    assert event_of("CANCELLED") is event_of("INVALID_ARGUMENT") is Event.ABANDONED
    assert event_of("OK") is Event.SUCCEEDED
    assert event_of("WORKER_LOST") is Event.FAILED
    with pytest.raises(InvalidTransition, match="NEVER_HEARD"):
        event_of("NEVER_HEARD")


def test_outcomes_of_calls_that_are_not_the_trial_decide_nothing() -> None:
    breaker = breaker_in(State.HALF_OPEN)
    for event in (Event.SUCCEEDED, Event.FAILED, Event.ABANDONED):
        breaker.handle(event, b"let in before it opened", "ann", 106.0)
        assert breaker.state is State.HALF_OPEN
        assert breaker.trial == b"trial"


def test_another_call_tries_when_a_trial_came_to_nothing() -> None:
    breaker = breaker_in(State.HALF_OPEN)
    breaker.handle(Event.ABANDONED, b"trial", "ann", 106.0)
    assert breaker.handle(Event.ASKED, b"second", "bob", 106.0) == 0
    assert breaker.trial == b"second"


def test_each_opening_in_a_row_lasts_twice_as_long_up_to_a_cap() -> None:
    breaker, now, waits = breaker_in(State.OPEN), 100.0, []
    for number in range(8):
        waits.append(breaker.until - now)
        now = breaker.until
        assert breaker.handle(Event.ASKED, b"trial", f"principal {number}", now) == 0
        breaker.handle(Event.FAILED, b"trial", f"principal {number}", now)
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0, 60.0]


def test_a_principal_whose_trial_failed_tries_again_only_after_twice_the_time() -> None:
    breaker = breaker_in(State.HALF_OPEN)
    breaker.handle(Event.FAILED, b"trial", "ann", 105.0)
    opened_s = breaker.until - 105.0
    assert breaker.handle(Event.ASKED, b"again", "ann", breaker.until) == pytest.approx(opened_s)
    assert breaker.handle(Event.ASKED, b"his", "bob", breaker.until) == 0


def test_one_principal_does_not_open_it_whatever_it_does() -> None:
    breaker = Breaker(0.0)
    for _ in range(1000):
        breaker.handle(Event.FAILED, ID, "mallory", 1.0)
    assert breaker.state is State.CLOSED
    for _ in range(3):
        breaker.handle(Event.SUCCEEDED, ID, "ann", 1.0)
    breaker.handle(Event.FAILED, ID, "ann", 1.0)
    breaker.handle(Event.FAILED, ID, "mallory", 1.0)
    assert breaker.state is State.CLOSED, "for ann most calls succeed"
    for _ in range(2):
        breaker.handle(Event.FAILED, ID, "ann", 1.0)
    assert breaker.state.name == "OPEN", "it fails for ann as well"


def test_what_is_a_window_ago_counts_no_more() -> None:
    tally = Tally(0.0)
    for _ in range(5):
        tally.count("ann", 1.0, failed=True)
    tally.turn(limits.BREAKER_WINDOW_S / 2 + 1)
    assert (tally.calls, tally.failures) == (5, 5)
    tally.turn(limits.BREAKER_WINDOW_S + 1)
    assert (tally.calls, tally.failures) == (0, 0)


def test_a_quiet_window_makes_a_breaker_forgettable() -> None:
    breaker = Breaker(0.0)
    breaker.handle(Event.FAILED, ID, "ann", 0.0)
    assert not breaker.is_quiet(limits.BREAKER_WINDOW_S * 0.9)
    assert breaker.is_quiet(limits.BREAKER_WINDOW_S * 1.5)


EVENTS = st.tuples(
    st.sampled_from(list(Event)),
    st.sampled_from([b"1", b"2", b"3"]),
    st.sampled_from(["ann", "bob", "eve"]),
    st.floats(min_value=0, max_value=10),
)


@given(st.lists(EVENTS, max_size=300))
def test_whatever_happens_one_call_tries_at_a_time_and_the_wait_is_bounded(
    events: list[tuple[Event, bytes, str, float]],
) -> None:
    breaker, now = Breaker(0.0), 0.0
    for event, call_id, principal, passes in events:
        now += passes
        was, trial = breaker.state, breaker.trial
        wait_s = breaker.handle(event, call_id, principal, now)
        assert 0 <= wait_s <= 2 * limits.BREAKER_OPEN_S_MAX
        assert (breaker.trial is None) or breaker.state is State.HALF_OPEN
        if event is Event.ASKED and was is State.HALF_OPEN and trial is not None:
            assert wait_s > 0
        assert breaker.until - now <= limits.BREAKER_OPEN_S_MAX
        assert breaker.tally.failures <= breaker.tally.calls


# -- in the broker -----------------------------------------------------------------------------------


def failing_world(failures: int = limits.BREAKER_CALLS_MIN) -> World:
    """Return a broker of whose tool so many calls have failed, for two principals in turn."""
    world = World()
    world.ready(depth=64)
    world.hello("c1", FakeGrant(principal="ann"))
    world.hello("c2", FakeGrant(principal="bob"))
    for number in range(failures):
        world.answer("echo-1", world.call(("c1", "c2")[number % 2]), "TOOL_FAILED")
    world.later(0)
    return world


def test_calls_of_a_tool_that_fails_for_everybody_are_refused_at_once_with_the_time_to_come_back() -> None:
    world = failing_world()
    session = world.machine.clients.open[b"c1"]
    world.heard_by(session)
    world.dispatched("echo-1")
    call_id = world.call("c1")
    fault = world.faults(session)[call_id]
    assert fault["code"] == "UNAVAILABLE"
    assert fault["reason"] == "breaker open"
    assert 0 < fault["retry_after_s"] <= limits.BREAKER_OPEN_S
    assert not world.dispatched("echo-1")
    world.check()


def test_calls_that_wait_when_the_breaker_opens_end_at_once() -> None:
    world = failing_world(limits.BREAKER_CALLS_MIN - 2)
    session = world.machine.clients.open[b"c1"]
    running = [world.call(name) for name in ("c1", "c2")]
    world.worker_says("echo-1", messages.Ready(EPOCH, 0))
    waiting = world.call("c1")
    for call_id in running:
        world.answer("echo-1", call_id, "TOOL_FAILED")
    world.heard_by(session)
    world.later(0)
    assert world.outcomes(session) == {waiting: "UNAVAILABLE"}
    world.check()


def test_one_call_tries_after_a_while_and_its_success_lets_everybody_in() -> None:
    world = failing_world()
    session = world.machine.clients.open[b"c1"]
    world.later(limits.BREAKER_OPEN_S)
    world.heard_by(session)
    world.dispatched("echo-1")
    trial, other = world.calls("c1", ("echo.echo", "echo.echo"))
    assert world.dispatched("echo-1") == [trial]
    assert world.outcomes(session) == {other: "UNAVAILABLE"}
    world.answer("echo-1", trial)
    world.later(0)
    both = world.calls("c1", ("echo.echo", "echo.echo"))
    assert world.dispatched("echo-1") == both


def test_a_trial_that_was_never_accepted_does_not_keep_the_tool_closed() -> None:
    world = failing_world()
    session = world.machine.clients.open[b"c1"]
    world.later(limits.BREAKER_OPEN_S)
    condition = world.machine.registry.tools["echo.echo"].condition
    assert condition is not None
    assert world.machine.health.refusal(condition.tool, b"never", "ann", world.now) is None
    world.dispatched("echo-1")
    call_id = world.call("c1")
    assert world.dispatched("echo-1") == [call_id]
    world.heard_by(session)


def test_a_callers_own_faults_never_open_a_breaker() -> None:
    world = World()
    world.ready(depth=64)
    for name in ("c1", "c2"):
        world.hello(name, FakeGrant(principal=name))
        for code in ("INVALID_ARGUMENT", "CANCELLED", "PAYLOAD_TOO_LARGE") * 20:
            world.answer("echo-1", world.call(name), code)
    world.later(0)
    assert not world.machine.health.watched


def test_a_tool_that_nobody_needs_to_watch_is_forgotten() -> None:
    world = failing_world(1)
    tool = world.machine.registry.tools["echo.echo"]
    assert tool in world.machine.health.watched
    world.later(2 * limits.BREAKER_WINDOW_S)
    assert tool not in world.machine.health.watched
    assert tool.condition is not None
    assert tool.condition.breaker is None
