"""Workers of another edition of their pool, which may bring other tools while earlier ones live; pools that close or go."""

from __future__ import annotations

import pytest

from mcp_broker import limits
from mcp_broker.core.worker import WorkerState
from mcp_broker.wire import messages, node
from tests.core.support import EPOCH, World, definition

OLD = definition("echo.echo")
NEW = definition("echo.echo", version="2.0.0")
MORE = definition("echo.more")


def serve(world: World, worker_id: str, edition: int, *tools: messages.ToolDefinition) -> None:
    """Have a worker of this edition come with these tools."""
    admitted = node.Admitted(thumbprint=f"key-{worker_id}", worker_id=worker_id, pool="echo", edition=edition)
    world.machine.from_node(node.Admit((admitted,)), world.now)
    world.worker_says(worker_id, messages.Register(0, "MCPB", (1,), tools))
    world.worker_says(worker_id, messages.Ready(EPOCH, 4))


def report(world: World, state: node.PoolState = "ready", reason: str = "", *names: str) -> None:
    pools = tuple(
        node.PoolReport(name=name, state=state, wanted=1, reason=reason) for name in names or ("echo",)
    )
    world.machine.from_node(node.Report(pools), world.now)


def superseded(world: World) -> list[tuple[str, int]]:
    return [(told.pool, told.edition) for told in world.machine.to_node if isinstance(told, node.Superseded)]


def state(world: World, worker_id: str) -> WorkerState:
    return world.machine.workers.by_id[worker_id].state


def version(world: World, name: str = "echo.echo") -> str:
    return world.machine.registry.tools[name].definition.version


def test_a_later_edition_with_the_same_tools_works_beside_the_earlier_one() -> None:
    world = World()
    world.hello()
    serve(world, "echo-1", 1, OLD)
    serve(world, "echo-2", 2, OLD)
    assert superseded(world) == []
    world.call()
    world.call()
    assert world.dispatched("echo-1")
    assert world.dispatched("echo-2")


def test_a_later_edition_with_other_tools_is_the_one_that_gets_calls() -> None:
    world = World()
    session = world.hello()
    serve(world, "echo-1", 1, OLD)
    running = world.call()
    assert world.dispatched("echo-1") == [running]
    serve(world, "echo-2", 2, NEW, MORE)
    assert superseded(world) == [("echo", 2)]
    assert version(world) == "2.0.0"
    later = [world.call(), world.call(tool="echo.more")]
    assert world.dispatched("echo-2") == later
    assert world.dispatched("echo-1") == []
    world.answer("echo-1", running)
    assert world.outcomes(session) == {running: "OK"}
    world.check()


def test_a_tool_that_a_later_edition_lacks_is_gone() -> None:
    world = World()
    session = world.hello()
    serve(world, "echo-1", 1, OLD, MORE)
    serve(world, "echo-2", 2, OLD)
    call_id = world.call(tool="echo.more")
    assert world.outcomes(session) == {call_id: "NOT_FOUND"}
    assert state(world, "echo-1") is WorkerState.RETIRING


def test_a_worker_of_an_earlier_edition_that_comes_back_gets_no_calls_and_changes_nothing() -> None:
    world = World()
    world.hello()
    serve(world, "echo-1", 1, OLD)
    serve(world, "echo-2", 2, NEW)
    serve(world, "echo-3", 1, OLD)
    assert version(world) == "2.0.0"
    assert state(world, "echo-3") is WorkerState.RETIRING
    call_id = world.call()
    assert world.dispatched("echo-2") == [call_id]


def test_within_an_edition_tools_may_not_differ() -> None:
    world = World()
    serve(world, "echo-1", 2, NEW)
    serve(world, "echo-2", 2, OLD)
    refused = [told for told in world.machine.to_node if isinstance(told, node.WorkerRefused)]
    assert [one.worker_id for one in refused] == ["echo-2"]
    assert "differs" in refused[0].reason


def test_a_pool_that_closes_serves_what_waits_takes_no_more_and_says_when_none_waits() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=1)
    running, waiting = world.call(), world.call()
    report(world, "closing", "drained")
    refused = world.call()
    assert world.outcomes(session) == {refused: "UNAVAILABLE"}

    def vacant() -> bool:
        return any(isinstance(told, node.Vacant) for told in world.machine.to_node)

    world.later(1)
    assert not vacant()
    world.answer("echo-1", running)
    world.answer("echo-1", waiting)
    assert world.outcomes(session) == {running: "OK", waiting: "OK"}
    world.later(1)
    assert vacant()
    assert sum(isinstance(told, node.Vacant) for told in world.machine.to_node) == 1
    report(world, "ready")
    again = world.call()
    assert world.dispatched("echo-1")[-1] == again


def test_a_pool_that_is_opened_and_closed_again_at_once_is_said_to_have_nothing_waiting_again() -> None:
    world = World()
    world.ready()
    report(world, "closing", "drained")
    world.later(1)
    report(world, "ready")
    report(world, "closing", "drained")
    world.later(1)
    assert sum(isinstance(told, node.Vacant) for told in world.machine.to_node) == 2


def test_that_nothing_waits_for_a_closing_pool_is_said_after_each_report_that_it_still_closes() -> None:
    world = World()
    world.ready()
    report(world, "closing", "drained")
    world.later(1)
    # a supervisor that had just opened it took no notice
    report(world, "closing", "drained")
    world.later(1)
    world.later(1)
    assert sum(isinstance(told, node.Vacant) for told in world.machine.to_node) == 2


def test_a_closed_pool_ends_what_still_waits_with_its_reason() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=1)
    world.call()
    waiting = world.call()
    report(world, "closed", "drained")
    fault = world.faults(session)[waiting]
    assert (fault["code"], fault["reason"]) == ("UNAVAILABLE", "drained")
    world.check()


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_pool_that_is_reported_no_more_is_forgotten_with_its_tools(goes_on: bool) -> None:
    world = World()
    session = world.hello()
    world.ready()
    world.ready("other-1", pool="other")
    report(world, "ready", "", "echo", "other")
    if not goes_on:
        world.died("echo-1")
        world.later(1)
    report(world, "ready", "", "other")
    assert ("echo" in world.machine.dispatcher.pools) is goes_on
    call_id = world.call()
    assert world.outcomes(session) == {call_id: "NOT_FOUND"}
    world.check()


def test_a_tool_may_move_from_a_pool_that_closes_to_another_one() -> None:
    world = World()
    world.hello()
    world.ready(depth=1)
    held = world.call()
    report(world, "closing", "gone")
    world.serve("other-1", 4, "other", OLD)
    moved = world.call()
    assert world.dispatched("other-1") == [moved]
    world.answer("echo-1", held)
    world.check()


def test_the_supervisor_is_told_what_is_asked_of_pools_only_when_it_is_something_else() -> None:
    world = World()
    world.hello()
    world.ready(depth=1)

    def demands() -> list[node.PoolDemand]:
        told = [one for one in world.machine.to_node if isinstance(one, node.Demand)]
        world.machine.to_node.clear()
        return [demand for one in told for demand in one.pools]

    world.later(1)
    assert [(one.ready, one.busy, one.waiting) for one in demands()] == [(1, 0, 0)]
    world.later(5)
    assert demands() == []
    for _ in range(3):
        world.call()
    world.later(1)
    seen = demands()
    assert (seen[-1].ready, seen[-1].busy, seen[-1].waiting) == (1, 1, 2)
    assert 0 < seen[-1].wait_s <= 1
    assert len(seen) <= 4, "no more often than the heartbeat"


def test_each_report_is_answered_with_the_next_heartbeat_also_when_nothing_is_different() -> None:
    world = World()
    world.ready()
    world.later(1)
    for _ in range(2):
        world.machine.to_node.clear()
        world.machine.from_node(node.Report(()), world.now)
        world.machine.from_node(node.Report(()), world.now)
        world.later(limits.HEARTBEAT_S)
        assert world.machine.to_node == [node.Demand(())]
    world.machine.to_node.clear()
    world.later(5)
    assert world.machine.to_node == []


def test_calls_behind_a_closed_gate_are_no_reason_for_more_workers() -> None:
    world = World()
    world.hello()
    world.ready(depth=4, concurrency_max=1)
    for _ in range(3):
        world.call()
    world.later(1)
    told = [demand for one in world.machine.to_node if isinstance(one, node.Demand) for demand in one.pools]
    assert (told[-1].waiting, told[-1].wait_s) == (2, 0.0)


def test_rates_of_a_configuration_that_was_read_again_count_at_once() -> None:
    world = World()
    session = world.hello()
    world.ready()
    world.machine.from_node(node.Limits({"rate_per_s": 1.0, "burst": 1}), world.now)
    first, second = world.call(), world.call()
    assert world.outcomes(session) == {second: "RATE_LIMITED"}
    world.machine.from_node(node.Limits({}), world.now)
    world.call()
    assert world.outcomes(session) == {}
    assert len(world.dispatched("echo-1")) == 2
    assert first


def test_a_tool_may_move_from_a_pool_whose_later_edition_is_on_its_way_to_another_one() -> None:
    world = World()
    world.hello()
    serve(world, "echo-1", 1, OLD, MORE)
    held = world.call()
    admitted = node.Admitted(thumbprint="key-echo-2", worker_id="echo-2", pool="echo", edition=2)
    world.machine.from_node(node.Admit((admitted,)), world.now)
    world.serve("other-1", 4, "other", OLD)
    moved = world.call()
    assert world.dispatched("other-1") == [moved]
    # what comes of its pool serves the rest; should it bring the tool all the same, it is refused
    world.worker_says("echo-2", messages.Register(0, "MCPB", (1,), (MORE,)))
    world.answer("echo-1", held)
    assert [told for told in world.machine.to_node if isinstance(told, node.WorkerRefused)] == []
    world.check()


def test_a_worker_of_an_earlier_edition_may_come_back_with_a_tool_that_another_pool_has_by_now() -> None:
    world = World()
    world.hello()
    serve(world, "echo-2", 2, MORE)
    world.serve("other-1", 4, "other", OLD)
    serve(world, "echo-1", 1, OLD, MORE)
    assert [told for told in world.machine.to_node if isinstance(told, node.WorkerRefused)] == []
    assert state(world, "echo-1") is WorkerState.RETIRING


def test_a_call_that_was_sent_before_of_a_tool_that_is_no_more_may_have_run() -> None:
    world = World()
    session = world.hello()
    serve(world, "echo-2", 2, MORE)
    call_id = world.call(again=True)
    assert world.outcomes(session) == {call_id: "BROKER_LOST"}
