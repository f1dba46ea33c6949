"""A tool's life: every cell of its table, what is refused and how, and its history."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker import limits
from mcp_broker.core.lifecycle import LIFECYCLE, TREATMENT, Event, Lifecycle, State, Treatment
from mcp_broker.errors import InvalidTransition

#: a way to each state from REGISTERED
WAYS: dict[State, tuple[Event, ...]] = {
    State.REGISTERED: (),
    State.STARTING: (Event.START,),
    State.STARTED: (Event.START, Event.DONE),
    State.ACTIVE: (Event.READY,),
    State.PAUSING: (Event.READY, Event.PAUSE),
    State.PAUSED: (Event.READY, Event.PAUSE, Event.DONE),
    State.RESUMING: (Event.READY, Event.PAUSE, Event.RESUME),
    State.UPDATING: (Event.READY, Event.UPDATE),
    State.STOPPING: (Event.READY, Event.STOP),
    State.STOPPED: (Event.READY, Event.STOP, Event.DONE),
    State.INACTIVE: (Event.DEACTIVATE,),
    State.ERROR: (Event.FAIL,),
    State.RECOVERING: (Event.READY, Event.RECOVER),
    State.UNREGISTERED: (Event.UNREGISTER,),
}
#: the graph of the Machine Context Protocol 1.1.0; what we leave out of it, and why, stands in docs/recovery.md
ORIGIN: dict[State, set[State]] = {
    State.REGISTERED: {State.ACTIVE, State.STARTING, State.UNREGISTERED, State.ERROR},
    State.ACTIVE: {State.INACTIVE, State.STARTING, State.STOPPING, State.PAUSING, State.ERROR},
    State.STARTING: {State.STARTED, State.STOPPING, State.ERROR, State.RECOVERING},
    State.STARTED: {State.ACTIVE, State.STOPPING, State.PAUSING, State.ERROR, State.RECOVERING},
    State.STOPPING: {State.STOPPED, State.ERROR, State.RECOVERING},
    State.STOPPED: {State.INACTIVE, State.STARTING, State.UNREGISTERED, State.ERROR},
    State.PAUSING: {State.PAUSED, State.ERROR, State.RECOVERING},
    State.PAUSED: {State.RESUMING, State.STOPPING, State.ERROR, State.RECOVERING},
    State.RESUMING: {State.ACTIVE, State.ERROR, State.RECOVERING},
    State.UPDATING: {State.ACTIVE, State.INACTIVE, State.ERROR, State.RECOVERING},
    State.ERROR: {State.RECOVERING, State.INACTIVE, State.STOPPED, State.UNREGISTERED},
    State.RECOVERING: {State.ACTIVE, State.INACTIVE, State.ERROR, State.UNREGISTERED},
    State.INACTIVE: {State.ACTIVE, State.STARTING, State.UNREGISTERED, State.ERROR},
    State.UNREGISTERED: set(),
}
#: (from, to) that we leave out: what waits or is on its way down is not recovered behind an operator's back, and an
#: update that fails leaves the version that works
LEFT_OUT = {
    (State.STOPPING, State.RECOVERING),
    (State.PAUSING, State.RECOVERING),
    (State.PAUSED, State.RECOVERING),
    (State.UPDATING, State.ERROR),
}


def life_in(state: State) -> Lifecycle:
    life = Lifecycle(0.0)
    for event in WAYS[state]:
        life.handle(event, 1.0)
    assert life.state is state
    return life


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_cell_leads_where_the_table_says_or_is_refused_by_name(state: State, event: Event) -> None:
    life, after = life_in(state), LIFECYCLE[state][event]
    lines = len(life.history)
    assert life.may(event) is (after is not None)
    if after is None:
        with pytest.raises(
            InvalidTransition, match=f"is {state.name.lower()} cannot {event.name.lower()}"
        ) as caught:
            life.handle(event, 2.0)
        possible = caught.value.details["possible"]
        assert all(life.may(Event[name.upper()]) for name in possible)
        assert (life.state, len(life.history)) == (state, lines)
        return
    assert life.handle(event, 2.0) is (after is not state)
    assert life.state is after
    assert len(life.history) == lines + (after is not state)


def test_the_table_has_a_cell_for_every_state_and_event() -> None:
    assert [len(row) for row in LIFECYCLE] == [len(Event)] * len(State)
    assert len(TREATMENT) == len(State)


def test_every_step_of_the_origins_graph_is_there_but_for_those_left_out() -> None:
    ours = {(state, after) for state in State for after in LIFECYCLE[state] if after is not None}
    theirs = {(state, after) for state, afters in ORIGIN.items() for after in afters}
    assert theirs - ours == LEFT_OUT
    assert (State.ACTIVE, State.UPDATING) in ours, "the gap into Updating is closed"


def test_from_every_state_a_tool_can_be_brought_to_serve() -> None:
    for start in State:
        reached, new = {start}, {start}
        while new:
            new = {after for state in new for after in LIFECYCLE[state] if after is not None} - reached
            reached |= new
        assert State.ACTIVE in reached, start


def test_no_state_lets_calls_wait_that_nothing_but_an_operator_ends_except_paused() -> None:
    waiting = {state for state in State if TREATMENT[state] is Treatment.WAIT}
    by_itself = {state for state in waiting if LIFECYCLE[state][Event.DONE] is not None}
    assert waiting - by_itself == {State.PAUSED}


def test_history_tells_when_what_and_how_long() -> None:
    life = Lifecycle(10.0)
    life.handle(Event.READY, 11.5)
    life.handle(Event.PAUSE, 12.0, reason="maintenance")
    life.handle(Event.DONE, 14.0, error="the pause hook failed: OSError")
    first, _, last = life.history
    assert (first.event, first.before, first.after, first.duration_s) == (
        Event.READY, State.REGISTERED, State.ACTIVE, 1.5,
    )  # fmt: skip
    assert (last.at, last.duration_s, last.error) == (14.0, 2.0, "the pause hook failed: OSError")
    assert life.reason == "the pause hook failed: OSError"


@given(st.lists(st.sampled_from(list(Event)), max_size=400))
def test_whatever_happens_the_history_is_bounded_and_joins_up(events: list[Event]) -> None:
    life = Lifecycle(0.0)
    for number, event in enumerate(events):
        if life.may(event):
            life.handle(event, float(number))
    assert len(life.history) <= limits.LIFECYCLE_KEPT
    for before, after in itertools.pairwise(life.history):
        assert before.after is after.before
