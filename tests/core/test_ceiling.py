"""Bounds of the whole broker: calls that workers hold, and tools that there are."""

from __future__ import annotations

from mcp_broker.wire import messages, node
from tests.core.support import EPOCH, World, definition


def bounded(**limits: int) -> World:
    world = World()
    world.hello()
    world.machine.from_node(node.Limits(dict(limits)), world.now)
    return world


def test_no_more_calls_are_with_workers_than_may_be_and_pools_take_turns() -> None:
    world = bounded(executions=2)
    for pool in ("a", "b"):
        world.serve(f"{pool}-1", 16, pool, definition(f"{pool}.echo"))
    first = world.calls("c1", ["a.echo"] * 4)
    second = world.calls("c1", ["b.echo"] * 2)
    assert world.dispatched("a-1") == first[:2]
    assert world.dispatched("b-1") == []
    world.answer("a-1", first[0])
    assert (world.dispatched("a-1"), world.dispatched("b-1")) == ([], second[:1]), (
        "it is the other pool's turn"
    )
    world.answer("a-1", first[1])
    assert (world.dispatched("a-1"), world.dispatched("b-1")) == (first[2:3], [])
    world.answer("b-1", second[0])
    assert world.dispatched("b-1") == second[1:]
    held = sum(len(worker.held) for worker in world.machine.workers.by_id.values())
    assert held == 2


def test_a_dead_workers_places_are_free_again() -> None:
    world = bounded(executions=1)
    for pool in ("a", "b"):
        world.serve(f"{pool}-1", 16, pool, definition(f"{pool}.echo"))
    world.call(tool="a.echo")
    waits = world.call(tool="b.echo")
    assert world.dispatched("b-1") == []
    world.died("a-1", 1)
    world.later(0.1)
    assert world.dispatched("b-1") == [waits]


def test_without_the_bound_workers_take_what_they_can() -> None:
    world = bounded(executions=1)
    world.machine.from_node(node.Limits({}), world.now)
    world.serve("a-1", 16, "a", definition("a.echo"))
    assert world.dispatched("a-1") == []
    assert len(world.calls("c1", ["a.echo"] * 5)) == 5
    assert len(world.dispatched("a-1")) == 5


def test_a_worker_that_brings_too_many_tools_is_refused_with_the_key_to_raise() -> None:
    world = bounded(tools=2)
    world.serve("a-1", 1, "a", definition("a.one"), definition("a.two"))
    world.admit("b-1", "b")
    world.worker_says("b-1", messages.Register(0, "MCPB", (1,), (definition("b.one"),)))
    (error,) = world.heard_by_worker("b-1")
    assert isinstance(error, messages.Error)
    assert "raise tools in [limits]" in error.message
    world.admit("a-2", "a")
    world.worker_says("a-2", messages.Register(0, "MCPB", (1,), (definition("a.one"), definition("a.two"))))
    assert world.worker_says("a-2", messages.Ready(EPOCH, 1)), "its tools are there already"
