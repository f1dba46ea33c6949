"""Every cell of the broker's state tables, visited through the machines where a peer can reach it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mcp_broker.core.calls import CALL_TABLE, Call, CallEvent, CallState
from mcp_broker.core.client_session import CLIENT_TABLE, ClientEvent, ClientState, Verdict
from mcp_broker.core.client_session import EVENT_OF_KIND as CLIENT_EVENTS
from mcp_broker.core.worker import EVENT_OF_KIND as WORKER_EVENTS
from mcp_broker.core.worker import WORKER_TABLE, WorkerEvent, WorkerState
from mcp_broker.errors import InvalidTransition
from mcp_broker.wire import messages, node
from tests.core.support import EPOCH, FakeGrant, World, definition

ID = b"i" * 16

CLIENT_MESSAGES: dict[ClientEvent, Any] = {
    ClientEvent.RENEW: messages.Renew(EPOCH, "token"),
    ClientEvent.GOODBYE: messages.Goodbye(EPOCH),
    ClientEvent.CALLS: messages.Calls(EPOCH, 0, (messages.Call(ID, "echo.echo", 1000, b"\x80"),)),
    ClientEvent.CANCEL: messages.Cancel(EPOCH, (ID,)),
    ClientEvent.ACK: messages.Ack(EPOCH, 0),
    ClientEvent.CREDIT: messages.Credit(EPOCH, (messages.StreamCredit(ID, 1),)),
    ClientEvent.HEARTBEAT: messages.Heartbeat(EPOCH),
}

WORKER_MESSAGES: dict[WorkerEvent, Any] = {
    WorkerEvent.REGISTER: messages.Register(0, "MCPB", (1,), (definition("echo.echo"),)),
    WorkerEvent.READY: messages.Ready(EPOCH, 4),
    WorkerEvent.OUTCOMES: messages.Outcomes(EPOCH, 1, (messages.Outcome(ID, "OK", b"\xc0"),)),
    WorkerEvent.PARTIAL: messages.Partial(EPOCH, (messages.Part(ID, 0, b"\xc0"),)),
    WorkerEvent.HEARTBEAT: messages.Heartbeat(EPOCH),
    WorkerEvent.GOODBYE: messages.Goodbye(EPOCH),
}


def test_tables_have_a_cell_for_every_state_and_event() -> None:
    assert [len(row) for row in CALL_TABLE] == [len(CallEvent)] * len(CallState)
    assert [len(row) for row in CLIENT_TABLE] == [len(ClientEvent)] * len(ClientState)
    assert [len(row) for row in WORKER_TABLE] == [len(WorkerEvent)] * len(WorkerState)


def test_every_message_that_a_door_takes_is_an_event_of_its_table() -> None:
    assert set(CLIENT_EVENTS) == set(messages.FromClient.__args__)
    assert set(WORKER_EVENTS) == set(messages.FromWorker.__args__)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(CallState, CallEvent)))
def test_call_moves_by_its_table_or_names_the_bug(state: CallState, event: CallEvent) -> None:
    world = World()
    session = world.hello()
    world.ready()
    tool = world.machine.registry.tools["echo.echo"]
    slot = world.machine.ledger.slot(world.now + 1)
    call = Call(ID, b"\x80", None, None, session, tool, world.now + 1, slot)
    call.state = state
    after = CALL_TABLE[state][event]
    if after is None:
        with pytest.raises(InvalidTransition, match=f"{event.name} in state {state.name}"):
            call.step(event)
        assert call.state is state
    else:
        call.step(event)
        assert call.state is after


def client_in(state: ClientState) -> tuple[World, Any]:
    """Make a world whose client "c1" is in a state; returns its session, if it has one."""
    world = World()
    world.ready()
    if state is ClientState.STRANGER:
        return world, None
    session = world.hello()
    world.heard_by(session)
    if state is ClientState.LOST:
        world.machine.clients.unreachable(b"c1", world.now)
    elif state is ClientState.CLOSED:
        world.client_says("c1", messages.Goodbye(EPOCH))
    assert session.state is state
    return world, session


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ClientState, ClientEvent)))
def test_client_session_obeys_its_table(state: ClientState, event: ClientEvent) -> None:
    world, session = client_in(state)
    after, verdict = CLIENT_TABLE[state][event]
    clients = world.machine.clients
    if event is ClientEvent.HELLO:
        again = world.hello(session_id=session.session_id if state is ClientState.LOST else None)
        assert again.state is ClientState.OPEN
        assert (again is session) is (state in {ClientState.OPEN, ClientState.LOST})
    elif event is ClientEvent.UNREACHABLE:
        clients.unreachable(b"c1", world.now)
        assert session is None or session.state is after
    elif event is ClientEvent.GRACE_OVER:
        world.later(5)
        assert session is None or session.state is after
    elif event is ClientEvent.RENEW and state is ClientState.OPEN:
        assert clients.renew(b"c1", "key-c1", FakeGrant(), world.now)
    else:
        taken = world.client_says("c1", CLIENT_MESSAGES[event])
        if state is ClientState.OPEN:
            assert taken
            assert session.state is after
        else:
            # its routing id is a stranger's now, whatever it was
            assert taken is (CLIENT_TABLE[ClientState.STRANGER][event][1] is not Verdict.REFUSE)
    assert verdict in Verdict
    world.check()


def worker_in(state: WorkerState) -> World:
    world = World()
    if state is WorkerState.ADMITTED:
        world.admit("echo-1")
    else:
        world.ready()
    if state is WorkerState.REGISTERED:
        world.worker_says("echo-1", WORKER_MESSAGES[WorkerEvent.REGISTER])
    elif state is WorkerState.RETIRING:
        # it holds a call, or it would be sent away at once
        world.hello()
        world.call()
        world.machine.from_node(node.Retire(("echo-1",)), world.now)
    elif state is WorkerState.DRAINING:
        world.machine.workers.dismiss()
    elif state in {WorkerState.DYING, WorkerState.GONE}:
        world.hello()
        world.call()
        world.died("echo-1")
        if state is WorkerState.GONE:
            world.later(1)
    return world


@pytest.mark.parametrize(("state", "event"), list(itertools.product(WorkerState, WorkerEvent)))
def test_worker_obeys_its_table(state: WorkerState, event: WorkerEvent) -> None:
    world = worker_in(state)
    workers = world.machine.workers
    worker = workers.by_id.get("echo-1")
    assert (worker is None) is (state is WorkerState.GONE)
    assert worker is None or worker.state is state
    after, verdict = WORKER_TABLE[state][event]
    if event is WorkerEvent.UNREACHABLE:
        workers.unreachable(b"echo-1")
    elif event is WorkerEvent.DRAIN:
        workers.dismiss()
    elif event is WorkerEvent.RETIRE:
        world.machine.from_node(node.Retire(("echo-1",)), world.now)
    elif event is WorkerEvent.DIED:
        world.died("echo-1")
    elif event is WorkerEvent.SETTLED:
        world.later(1)
    else:
        taken = world.worker_says("echo-1", WORKER_MESSAGES[event])
        assert taken is (verdict is not Verdict.REFUSE)
    if worker is None:
        assert "echo-1" not in workers.by_id
    elif event is WorkerEvent.DIED and state is not WorkerState.DYING:
        assert worker.state is WorkerState.DYING
    elif verdict is not Verdict.BUG:
        assert worker.state is after
    world.check()
