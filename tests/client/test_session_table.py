"""Every cell of the client session's table is visited, and does what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mcp_broker import errors
from mcp_broker.client.session import TABLE, Cell, ClientSession, Event, State
from mcp_broker.client.session.table import EVENTS
from mcp_broker.wire import messages

EPOCH = 7
GRANTED = messages.GrantedLimits(window=4, heartbeat_ms=250)
SESSION = b"s" * 16
EMPTY = b"\x80"

MESSAGES: dict[Any, messages.ToClient] = {
    messages.Welcome: messages.Welcome(EPOCH, (1, 0), SESSION, False, "me", GRANTED),
    messages.Outcomes: messages.Outcomes(EPOCH, 1, (messages.Outcome(b"c" * 16, "OK", b"\xc0"),)),
    messages.Partial: messages.Partial(EPOCH, (messages.Part(b"c" * 16, 0, b"\xc0"),)),
    messages.Heartbeat: messages.Heartbeat(EPOCH),
    messages.Goodbye: messages.Goodbye(EPOCH, "over"),
    messages.Error: messages.Error(EPOCH, "UNAUTHENTICATED", "no", EMPTY, fatal=True),
    messages.Renewed: messages.Renewed(EPOCH, 1000),
    messages.Credit: messages.Credit(EPOCH, (messages.StreamCredit(b"c" * 16, 16),)),
    messages.Progresses: messages.Progresses(EPOCH, (messages.Progress(b"c" * 16, 0.5),)),
}


def reach(state: State) -> ClientSession:
    session = ClientSession(b"p" * 8, "token")
    if state is State.DISCONNECTED:
        return session
    session.dial(0.0)
    if state is State.OPENING:
        return session
    session.connected(0.0)
    if state is State.WAITING:
        return session
    session.outgoing(0.0)
    session.receive(MESSAGES[messages.Welcome], None, 0.0)
    if state is State.REFUSED:
        session.refuse(errors.Unauthenticated("no"))
    if state is State.CLOSED:
        session.close()
        session.outgoing(0.0)
    assert session.state is state
    return session


def fire(session: ClientSession, event: Any) -> None:
    actions: dict[Any, Callable[[], object]] = {
        Event.DIAL: lambda: session.dial(1.0),
        Event.CONNECTED: lambda: session.connected(1.0),
        Event.DISCONNECTED: lambda: session.disconnected("cut"),
        Event.BACK_OFF: lambda: session.back_off(1.0, 0.5),
        Event.REFUSE: lambda: session.refuse(errors.Unauthenticated("no")),
        Event.SUBMIT: lambda: session.submit("t", 5.0, EMPTY, 1.0),
        Event.EXPIRE: lambda: session.expire(1.0),
        Event.CLOSE: session.close,
    }
    if event in {Event.CANCEL, Event.TAKE}:
        other = ClientSession(b"q" * 8, "token")
        pending = other.submit("t", 5.0, EMPTY, 0.0)
        other.cancel(pending)
        actions[event] = lambda: session.cancel(pending) if event is Event.CANCEL else session.took(pending)
    if event in actions:
        actions[event]()
    else:
        session.receive(MESSAGES[event], None, 1.0)


#: where a cell leads, if not back to where it was
LEADS = {
    Cell.DIAL: State.OPENING,
    Cell.CONNECTED: State.WAITING,
    Cell.DISCONNECTED: State.DISCONNECTED,
    Cell.REFUSE: State.REFUSED,
    Cell.CLOSE: State.CLOSED,
    Cell.WELCOME: State.OPEN,
    Cell.GOODBYE: State.DISCONNECTED,
    Cell.REFUSED_HELLO: State.REFUSED,
    Cell.ERROR: State.DISCONNECTED,
    # nothing was sent for which number 1 could be the outcome, and still it counts
    Cell.OUTCOMES: State.OPEN,
}


def test_table_has_every_state_and_event_and_every_message_of_the_broker() -> None:
    assert set(TABLE) == set(State)
    assert all(set(row) == set(EVENTS) for row in TABLE.values())
    assert set(messages.ToClient.__args__) == set(EVENTS) - set(Event)
    assert set(Event) <= set(EVENTS)
    assert {cell for row in TABLE.values() for cell in row.values()} == set(Cell)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: getattr(event, "value", None) or event.__name__)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_cell(state: State, event: Any) -> None:
    session = reach(state)
    cell = TABLE[state][event]
    if cell is Cell.BUG:
        with pytest.raises(errors.InvalidTransition):
            fire(session, event)
        assert session.state is state
    elif cell is Cell.NO_SUBMIT:
        with pytest.raises(errors.BrokerError):
            fire(session, event)
        assert session.book.calls == {}
    else:
        before = session.outgoing(0.5) if cell is Cell.IGNORE else None
        fire(session, event)
        due_at_once = event is Event.EXPIRE and state in {State.OPENING, State.WAITING}
        if cell is Cell.IGNORE:
            assert session.outgoing(0.5) == []
            assert session.book.ended == []
            assert before is not None
        if due_at_once and state is State.OPENING:
            assert session.state is State.DISCONNECTED
        else:
            assert session.state is LEADS.get(cell, state)
    if cell is Cell.SUBMIT:
        assert len(session.book.calls) == 1
    if cell is Cell.HEARTBEAT:
        assert session.outgoing(1.0) == [(messages.Ack(EPOCH, 0), None)]
    if cell is Cell.BACK_OFF:
        assert session.dial_at is not None
        assert session.dial_at > 1.0
