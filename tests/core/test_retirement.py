"""Workers that are to go: no new calls, and sent away once they hold nothing."""

from __future__ import annotations

import mcp_broker.limits as bounds
from mcp_broker.core.worker import WorkerState
from mcp_broker.wire import messages, node
from tests.core.support import EPOCH, World, definition


def retire(world: World, *workers: str) -> None:
    world.machine.from_node(node.Retire(workers), world.now)
    world.machine.expire(world.now)


def is_dismissed(world: World, worker_id: str) -> bool:
    return any(isinstance(message, messages.Drain) for message in world.heard_by_worker(worker_id))


def test_a_free_worker_that_retires_is_sent_away_at_once() -> None:
    world = World()
    world.ready("echo-1")
    retire(world, "echo-1")
    assert is_dismissed(world, "echo-1")
    assert world.machine.workers.by_id["echo-1"].state is WorkerState.DRAINING


def test_a_worker_that_retires_gets_no_new_call_and_goes_when_its_caller_has_the_last_outcome() -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1")
    first = world.call()
    world.dispatched("echo-1")
    retire(world, "echo-1")
    second = world.call()
    assert world.dispatched("echo-1") == []
    world.ready("echo-2")
    assert world.dispatched("echo-2") == [second]
    world.answer("echo-1", first)
    world.machine.expire(world.now)
    assert not is_dismissed(world, "echo-1"), "its outcome may yet be lost on its way"
    assert world.outcomes(session) == {first: "OK"}
    world.client_says("c1", messages.Ack(EPOCH, 1))
    world.machine.expire(world.now)
    assert is_dismissed(world, "echo-1")
    world.check()


def test_a_client_that_acknowledges_nothing_keeps_a_retiring_worker_for_a_second_only() -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1")
    call_id = world.call()
    world.dispatched("echo-1")
    retire(world, "echo-1")
    world.later(bounds.ARRIVE_S * 2)
    assert not is_dismissed(world, "echo-1"), "it runs a call"
    world.answer("echo-1", call_id)
    world.later(bounds.ARRIVE_S * 0.9)
    assert not is_dismissed(world, "echo-1")
    assert world.outcomes(session) == {call_id: "OK"}
    world.later(bounds.ARRIVE_S)
    assert is_dismissed(world, "echo-1")
    world.machine.clients.unreachable(b"c1", world.now)
    session = world.hello("c1", session_id=session.session_id)
    assert world.outcomes(session) == {call_id: "OK"}, "the broker keeps what its client has not acknowledged"


def test_a_new_connection_does_not_bring_a_retiring_worker_back() -> None:
    world = World()
    world.hello()
    world.ready("echo-1")
    call_id = world.call()
    retire(world, "echo-1")
    world.machine.workers.unreachable(b"echo-1")
    held = (messages.Held(call_id, 1, "c1"),)
    world.worker_says("echo-1", messages.Register(0, "MCPB", (1,), (definition("echo.echo"),), held=held))
    world.worker_says("echo-1", messages.Ready(EPOCH, 4))
    assert world.machine.workers.by_id["echo-1"].state is WorkerState.RETIRING
    world.call()
    assert world.dispatched("echo-1") == []
    world.check()


def test_a_worker_that_retires_before_it_was_ready_is_sent_away_when_it_comes() -> None:
    world = World()
    world.admit("echo-1")
    retire(world, "echo-1", "nobody")
    world.worker_says("echo-1", messages.Register(0, "MCPB", (1,), (definition("echo.echo"),)))
    world.worker_says("echo-1", messages.Ready(EPOCH, 4))
    world.machine.expire(world.now)
    assert is_dismissed(world, "echo-1")


def test_what_a_new_broker_has_not_been_asked_for_yet_keeps_a_retiring_worker() -> None:
    world = World()
    world.admit("echo-1")
    retire(world, "echo-1")
    held = (messages.Held(b"o" * 16, 3, "someone"),)
    world.worker_says("echo-1", messages.Register(0, "MCPB", (1,), (definition("echo.echo"),), held=held))
    world.worker_says("echo-1", messages.Ready(EPOCH, 4))
    world.machine.expire(world.now)
    assert not is_dismissed(world, "echo-1")


def test_the_death_of_a_retiring_worker_is_like_any_other() -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1")
    call_id = world.call()
    retire(world, "echo-1")
    world.died("echo-1", started_seq=1)
    world.later(1)
    assert world.outcomes(session) == {call_id: "WORKER_LOST"}
    assert not world.machine.workers.retiring
