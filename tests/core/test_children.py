"""The Child machine: every cell of its table, then the stories that the table should tell."""

from __future__ import annotations

import pytest

from mcp_broker.core.children import (
    Announce,
    BackoffOver,
    BecameReady,
    CalledUp,
    Child,
    Died,
    Dismiss,
    Effect,
    Event,
    Kill,
    Refused,
    Retire,
    RetireTimedOut,
    Signal,
    Spawn,
    Spawned,
    SpawnFailed,
    StartTimedOut,
    State,
    StopTimedOut,
    Unwanted,
    Wanted,
)
from mcp_broker.core.restart import Policy, Restarts
from mcp_broker.errors import InvalidTransition

START_S = 30.0
STOP_S = 1.0
RETIRE_S = 60.0


def child(policy: Policy | None = None) -> Child:
    return Child(Restarts(policy or Policy(intensity=2)), start_s=START_S, stop_s=STOP_S, retire_s=RETIRE_S)


def drive(machine: Child, *events: Event, now: float = 0.0) -> list[Effect]:
    """Feed events at one instant; return the effects of the last."""
    effects: list[Effect] = []
    for event in events:
        effects = machine.handle(event, now)
    return effects


#: how to reach each state from a new child
PATHS: dict[State, tuple[Event, ...]] = {
    State.STOPPED: (),
    State.STARTING: (Wanted(), Spawned()),
    State.RUNNING: (Wanted(), Spawned(), BecameReady()),
    State.RETIRING: (Wanted(), Spawned(), BecameReady(), Retire()),
    State.STOPPING: (Wanted(), Spawned(), BecameReady(), Unwanted()),
    State.BACKOFF: (Wanted(), Spawned(), Died("x"), Spawned(), Died("x")),
    State.FATAL: (Wanted(), Spawned(), Died("x", hopeless=True)),
}

START = (Announce(State.STARTING, ""), Spawn())
STOP = (Announce(State.STOPPING, ""), Signal())
STOPPED = (Announce(State.STOPPED, ""),)
RETIRE = (Announce(State.RETIRING, ""), Dismiss())
IMPOSSIBLE = None

#: (state, event) -> state afterwards and effects, or IMPOSSIBLE. Every cell.
CELLS: dict[tuple[State, Event], tuple[State, tuple[Effect, ...]] | None] = {
    (State.STOPPED, Wanted()): (State.STARTING, START),
    (State.STOPPED, Unwanted()): (State.STOPPED, ()),
    (State.STOPPED, Spawned()): IMPOSSIBLE,
    (State.STOPPED, SpawnFailed("no")): IMPOSSIBLE,
    (State.STOPPED, BecameReady()): (State.STOPPED, ()),
    (State.STOPPED, Refused("no")): (State.STOPPED, ()),
    (State.STOPPED, Died("crash")): IMPOSSIBLE,
    (State.STOPPED, StartTimedOut()): IMPOSSIBLE,
    (State.STOPPED, StopTimedOut()): IMPOSSIBLE,
    (State.STOPPED, BackoffOver()): IMPOSSIBLE,
    (State.STARTING, Wanted()): (State.STARTING, ()),
    (State.STARTING, Unwanted()): (State.STOPPING, STOP),
    (State.STARTING, Spawned()): (State.STARTING, ()),
    (State.STARTING, SpawnFailed("no")): (State.STARTING, START),
    (State.STARTING, BecameReady()): (State.RUNNING, (Announce(State.RUNNING, ""),)),
    (State.STARTING, Refused("no")): (State.STOPPING, (Announce(State.STOPPING, "no"), Signal())),
    (State.STARTING, Died("crash")): (State.STARTING, START),
    (State.STARTING, StartTimedOut()): (
        State.STOPPING,
        (Announce(State.STOPPING, "was not ready after 30 s"), Kill()),
    ),
    (State.STARTING, StopTimedOut()): IMPOSSIBLE,
    (State.STARTING, BackoffOver()): IMPOSSIBLE,
    (State.RUNNING, Wanted()): (State.RUNNING, ()),
    (State.RUNNING, Unwanted()): (State.STOPPING, STOP),
    (State.RUNNING, Spawned()): IMPOSSIBLE,
    (State.RUNNING, SpawnFailed("no")): IMPOSSIBLE,
    (State.RUNNING, BecameReady()): (State.RUNNING, ()),
    (State.RUNNING, Refused("no")): (State.STOPPING, (Announce(State.STOPPING, "no"), Signal())),
    (State.RUNNING, Died("crash")): (State.STARTING, START),
    (State.RUNNING, StartTimedOut()): IMPOSSIBLE,
    (State.RUNNING, StopTimedOut()): IMPOSSIBLE,
    (State.RUNNING, BackoffOver()): IMPOSSIBLE,
    (State.STOPPING, Wanted()): (State.STOPPING, ()),
    (State.STOPPING, Unwanted()): (State.STOPPING, ()),
    (State.STOPPING, Spawned()): (State.STOPPING, (Signal(),)),
    (State.STOPPING, SpawnFailed("no")): (State.STOPPED, STOPPED),
    (State.STOPPING, BecameReady()): (State.STOPPING, ()),
    (State.STOPPING, Refused("no")): (State.STOPPING, ()),
    (State.STOPPING, Died("crash")): (State.STOPPED, STOPPED),
    (State.STOPPING, StartTimedOut()): IMPOSSIBLE,
    (State.STOPPING, StopTimedOut()): (State.STOPPING, (Kill(),)),
    (State.STOPPING, BackoffOver()): IMPOSSIBLE,
    (State.BACKOFF, Wanted()): (State.BACKOFF, ()),
    (State.BACKOFF, Unwanted()): (State.STOPPED, STOPPED),
    (State.BACKOFF, Spawned()): IMPOSSIBLE,
    (State.BACKOFF, SpawnFailed("no")): IMPOSSIBLE,
    (State.BACKOFF, BecameReady()): (State.BACKOFF, ()),
    (State.BACKOFF, Refused("no")): (State.BACKOFF, ()),
    (State.BACKOFF, Died("crash")): IMPOSSIBLE,
    (State.BACKOFF, StartTimedOut()): IMPOSSIBLE,
    (State.BACKOFF, StopTimedOut()): IMPOSSIBLE,
    (State.BACKOFF, BackoffOver()): (State.STARTING, START),
    (State.FATAL, Wanted()): (State.STARTING, START),
    (State.FATAL, Unwanted()): (State.STOPPED, STOPPED),
    (State.FATAL, Spawned()): IMPOSSIBLE,
    (State.FATAL, SpawnFailed("no")): IMPOSSIBLE,
    (State.FATAL, BecameReady()): (State.FATAL, ()),
    (State.FATAL, Refused("no")): (State.FATAL, ()),
    (State.FATAL, Died("crash")): IMPOSSIBLE,
    (State.FATAL, StartTimedOut()): IMPOSSIBLE,
    (State.FATAL, StopTimedOut()): IMPOSSIBLE,
    (State.FATAL, BackoffOver()): IMPOSSIBLE,
    (State.STOPPED, CalledUp()): IMPOSSIBLE,
    (State.STOPPED, Retire()): (State.STOPPED, ()),
    (State.STOPPED, RetireTimedOut()): IMPOSSIBLE,
    (State.STARTING, CalledUp()): IMPOSSIBLE,
    (State.STARTING, Retire()): (State.STOPPING, STOP),
    (State.STARTING, RetireTimedOut()): IMPOSSIBLE,
    (State.RUNNING, CalledUp()): (State.STARTING, (Announce(State.STARTING, ""),)),
    (State.RUNNING, Retire()): (State.RETIRING, RETIRE),
    (State.RUNNING, RetireTimedOut()): IMPOSSIBLE,
    (State.RETIRING, Wanted()): (State.RETIRING, ()),
    (State.RETIRING, Unwanted()): (State.STOPPING, STOP),
    (State.RETIRING, CalledUp()): IMPOSSIBLE,
    (State.RETIRING, Retire()): (State.RETIRING, ()),
    (State.RETIRING, Spawned()): IMPOSSIBLE,
    (State.RETIRING, SpawnFailed("no")): IMPOSSIBLE,
    (State.RETIRING, BecameReady()): (State.RETIRING, ()),
    (State.RETIRING, Refused("no")): (State.STOPPING, STOP),
    (State.RETIRING, Died("crash")): (State.STOPPED, STOPPED),
    (State.RETIRING, StartTimedOut()): IMPOSSIBLE,
    (State.RETIRING, RetireTimedOut()): (State.STOPPING, STOP),
    (State.RETIRING, StopTimedOut()): IMPOSSIBLE,
    (State.RETIRING, BackoffOver()): IMPOSSIBLE,
    (State.STOPPING, CalledUp()): IMPOSSIBLE,
    (State.STOPPING, Retire()): (State.STOPPING, ()),
    (State.STOPPING, RetireTimedOut()): IMPOSSIBLE,
    (State.BACKOFF, CalledUp()): IMPOSSIBLE,
    (State.BACKOFF, Retire()): (State.STOPPED, STOPPED),
    (State.BACKOFF, RetireTimedOut()): IMPOSSIBLE,
    (State.FATAL, CalledUp()): IMPOSSIBLE,
    (State.FATAL, Retire()): (State.STOPPED, STOPPED),
    (State.FATAL, RetireTimedOut()): IMPOSSIBLE,
}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell[0].name}-{type(cell[1]).__name__}")
def test_cell(cell: tuple[State, Event]) -> None:
    state, event = cell
    machine = child()
    drive(machine, *PATHS[state])
    assert machine.state is state
    expected = CELLS[cell]
    if expected is IMPOSSIBLE:
        with pytest.raises(InvalidTransition, match=state.name):
            machine.handle(event, 0.0)
        assert machine.state is state
        return
    effects = tuple(machine.handle(event, 0.0))
    assert (machine.state, effects) == expected


def test_no_cell_is_missing() -> None:
    visited = {(state, type(event)) for state, event in CELLS}
    assert visited == {(state, event) for state in State for event in Child.TABLE}
    assert all(len(row) == len(State) for row in Child.TABLE.values())


def test_a_state_has_a_deadline_exactly_when_it_waits() -> None:
    waiting = set()
    for state, path in PATHS.items():
        machine = child()
        drive(machine, *path)
        if machine.deadline() is not None:
            waiting.add(state)
    assert waiting == {State.STARTING, State.RETIRING, State.STOPPING, State.BACKOFF}


def test_expiring_too_early_does_nothing() -> None:
    machine = child()
    drive(machine, *PATHS[State.STARTING])
    assert machine.deadline() == START_S
    assert machine.expire(START_S - 0.001) == []
    assert machine.state is State.STARTING


def test_a_start_that_hangs_is_killed_and_counted() -> None:
    machine = child(Policy(intensity=0))
    drive(machine, Wanted(), Spawned())
    assert Kill() in machine.expire(START_S)
    assert machine.handle(Died("killed by SIGKILL"), START_S + 0.01) == [
        Announce(State.FATAL, "died 1 times within 0.0 s; the last time: was not ready after 30 s")
    ]


def test_a_stop_escalates_and_comes_back_to_it() -> None:
    machine = child()
    drive(machine, *PATHS[State.STOPPING])
    assert machine.expire(STOP_S) == [Kill()]
    assert machine.expire(2 * STOP_S) == [Kill()]
    assert drive(machine, Died("killed"), now=2.5) == [Announce(State.STOPPED, "")]
    assert machine.deadline() is None


def test_a_retiring_child_that_does_not_finish_in_time_is_told_to_end_then_killed() -> None:
    machine = child()
    drive(machine, *PATHS[State.RETIRING])
    assert machine.expire(RETIRE_S) == list(STOP)
    assert machine.expire(RETIRE_S + STOP_S) == [Kill()]
    assert drive(machine, Died("killed"), now=RETIRE_S + 2) == [Announce(State.STOPPED, "")]


def test_a_retired_child_ends_without_being_counted_however_it_died() -> None:
    restarts = Restarts(Policy(intensity=0))
    machine = Child(restarts)
    drive(machine, *PATHS[State.RETIRING], Died("crash"))
    assert (machine.state, restarts.total) == (State.STOPPED, 0)


def test_a_spare_that_is_called_up_has_to_become_ready_in_time_once_more() -> None:
    machine = child(Policy(intensity=0))
    drive(machine, *PATHS[State.RUNNING])
    drive(machine, CalledUp(), now=100.0)
    assert machine.deadline() == 100.0 + START_S
    assert Kill() in machine.expire(100.0 + START_S)


def test_wanted_again_while_it_stops_starts_once_it_is_gone_without_being_counted() -> None:
    machine = child(Policy(intensity=0))
    drive(machine, *PATHS[State.STOPPING])
    drive(machine, Wanted())
    assert drive(machine, Died("stopped")) == list(START)


def test_a_refused_registration_is_fatal_with_the_reason_of_the_broker() -> None:
    machine = child()
    drive(machine, Wanted(), Spawned(), Refused("text.count belongs to the pool text"))
    drive(machine, Died("exited with code 1"))
    assert (machine.state, machine.reason) == (State.FATAL, "text.count belongs to the pool text")


def test_an_import_error_is_fatal_at_once_and_no_crash_loop() -> None:
    machine = child()
    effects = drive(machine, Wanted(), Spawned(), Died("No module named 'duckdb'", hopeless=True))
    assert effects == [Announce(State.FATAL, "No module named 'duckdb'")]


def test_whose_place_another_one_takes_rests_before_it_starts_again() -> None:
    machine = child(Policy(intensity=2, base_s=0.2))
    drive(machine, Wanted(), Spawned(), now=0.0)
    assert drive(machine, Died("x", rest_s=0.1), now=0.0) == [Announce(State.BACKOFF, "")], (
        "nothing is wrong with it"
    )
    assert machine.deadline() == pytest.approx(0.1)
    assert machine.expire(0.1) == list(START)
    drive(machine, Spawned(), now=0.2)
    assert drive(machine, Died("x", rest_s=0.1), now=0.3) == [Announce(State.BACKOFF, "x")]
    assert machine.deadline() == pytest.approx(0.5), "the longer wait counts"


def test_other_boot_failures_restart_at_once_then_back_off_then_end() -> None:
    machine = child(Policy(intensity=2, base_s=0.2))
    assert drive(machine, Wanted(), Spawned(), Died("x"), now=0.0) == list(START)
    drive(machine, Spawned(), now=0.1)
    assert drive(machine, Died("x"), now=0.2) == [Announce(State.BACKOFF, "x")]
    assert machine.deadline() == pytest.approx(0.4)
    assert machine.expire(0.4) == list(START)
    drive(machine, Spawned(), Died("x"), now=0.5)
    assert machine.state is State.FATAL
    assert "died 3 times" in machine.reason


def test_deaths_during_calls_never_end_a_child() -> None:
    machine = child(Policy(intensity=0))
    drive(machine, *PATHS[State.RUNNING])
    for second in range(50):
        drive(machine, Died("killed by SIGKILL", charged=True), Spawned(), BecameReady(), now=float(second))
    assert machine.state is State.RUNNING


def test_an_operator_brings_a_fatal_child_back_with_a_clean_record() -> None:
    machine = child(Policy(intensity=1))
    drive(machine, Wanted(), Spawned(), Died("x"), Spawned(), Died("x"))
    assert machine.state is State.FATAL
    drive(machine, Wanted(), Spawned())
    assert drive(machine, Died("x")) == list(START)


def test_children_of_a_pool_share_one_record() -> None:
    restarts = Restarts(Policy(intensity=1))
    left, right = Child(restarts), Child(restarts)
    drive(left, Wanted(), Spawned(), Died("x"))
    drive(right, Wanted(), Spawned(), Died("x"))
    assert (left.state, right.state) == (State.STARTING, State.FATAL)


def test_a_machine_with_nothing_left_is_waited_for() -> None:
    machine = child(Policy(intensity=0))
    drive(machine, Wanted())
    (told,) = machine.handle(SpawnFailed("Too many open files", shortage=True), 0.0)
    assert told == Announce(State.BACKOFF, "Too many open files")
    assert machine.deadline() == 0.0
    assert Spawn() in machine.expire(0.0)


def test_a_start_that_this_machine_cannot_do_is_given_up_at_once() -> None:
    machine = child()
    drive(machine, Wanted(), SpawnFailed("no Landlock here", hopeless=True))
    assert (machine.state, machine.reason) == (State.FATAL, "no Landlock here")
